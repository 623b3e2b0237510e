"""Pictures of a result: the loss against the batch, the share of the floor by shape, the phases of a step, and where
its time goes.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .case import OURS
from .categories import (
    ATTENTION,
    CATEGORIES,
    CONVOLUTION,
    COPIES,
    DATA,
    GEMM,
    HOST,
    INPUT,
    LOSS,
    NORM,
    OPTIMIZER,
    OTHER,
)

OUR_COLOUR = "#0b6e4f"
# Products are green, what a step could do without is grey.
COLOURS = {
    GEMM: "#0b6e4f", CONVOLUTION: "#5aa17f", ATTENTION: "#2c7fb8", NORM: "#7fcdbb", INPUT: "#c7a252", LOSS: "#d95f0e",
    OPTIMIZER: "#8856a7", COPIES: "#fdbe85", OTHER: "#e7298a", DATA: "#969696", HOST: "#d9d9d9",
}  # fmt: skip


def draw(run: dict[str, Any], path: Path) -> list[Path]:
    """Draw what ``run`` has; files are named after ``path``.

    Returns:
        the pictures written.
    """
    written = []
    loss = [case for case in run["cases"] if case["suite"] == "loss"]
    if len({case["shape"]["pairs"] for case in loss}) > 1:
        written.append(_save(_against_batch(run, loss), path.with_name(path.stem + "-loss.png")))
    timed = [case for case in run["cases"] if case["floor"] and any(c["samples_s"] for c in case["candidates"])]
    if timed:
        written.append(_save(_share_of_floor(run, timed), path.with_name(path.stem + "-floor.png")))
    steps = [case for case in run["cases"] if any(c["phases_s"] for c in case["candidates"])]
    if steps:
        written.append(_save(_phases(run, steps), path.with_name(path.stem + "-step.png")))
    traced = [case for case in run["cases"] if any(c.get("breakdown") for c in case["candidates"])]
    if traced:
        written.append(_save(_breakdown(run, traced), path.with_name(path.stem + "-breakdown.png")))
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path


def _where(run: dict[str, Any]) -> str:
    name = run["machine"].get("gpu") or run["machine"]["cpu"]
    return f"{name}, torch {run['versions']['torch']}, {run['when'][:10]}"


def _against_batch(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.6))
    time_axes, memory_axes = figure.subplots(1, 2)
    kinds = sorted({(case["shape"]["embed_dim"], case["dtype"]) for case in cases})
    # one width and dtype: a picture of several would not be read
    embed_dim, dtype = kinds[0]
    chosen = [c for c in cases if (c["shape"]["embed_dim"], c["dtype"]) == (embed_dim, dtype)]
    chosen.sort(key=lambda case: case["shape"]["pairs"])
    _lines(time_axes, chosen, "median_s", 1e3, "time, ms")
    _lines(memory_axes, chosen, "peak_bytes", 2**-20, "peak memory beyond the inputs, MiB")
    floor = [(c["shape"]["pairs"], 1e3 * c["floor"]["seconds"]) for c in chosen]
    time_axes.plot(*zip(*floor, strict=True), color="0.6", linestyle=":", label="floor without N² matrix (8N²D)")
    time_axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Contrastive loss, forward and backward, D = {embed_dim}, {dtype}\n{_where(run)}", fontsize=11)
    figure.tight_layout()
    return figure


def _lines(axes: Axes, cases: list[dict[str, Any]], key: str, factor: float, label: str) -> None:
    names = [candidate["name"] for candidate in cases[0]["candidates"]]
    for name in names:
        points = [
            (case["shape"]["pairs"], factor * candidate[key])
            for case in cases
            for candidate in case["candidates"]
            if candidate["name"] == name and candidate.get(key)
        ]
        if not points:
            continue
        is_ours = name == OURS
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=4, label=name,
            color=OUR_COLOUR if is_ours else None, linewidth=2.5 if is_ours else 1.2, zorder=3 if is_ours else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("pairs in the batch")
    axes.set_ylabel(label)
    axes.set_xticks([case["shape"]["pairs"] for case in cases], [f"{case['shape']['pairs']:,}" for case in cases])
    axes.grid(True, which="major", color="0.9")


def _share_of_floor(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(cases)))
    axes = figure.subplots()
    labels = []
    for row, case in enumerate(cases):
        sizes = " ".join(f"{key}={value}" for key, value in case["shape"].items())
        labels.append(f"{case['op']}\n{sizes} {case['dtype']}")
        timed = [c for c in case["candidates"] if c.get("share_of_floor")]
        best = max((c["share_of_floor"] for c in timed if c["name"] != OURS), default=None)
        ours = next((c["share_of_floor"] for c in timed if c["name"] == OURS), 0.0)
        axes.barh(row - 0.18, 100 * ours, height=0.34, color=OUR_COLOUR, label="clipfast" if row == 0 else None)
        if best is not None:
            axes.barh(row + 0.18, 100 * best, height=0.34, color="0.7", label="best other" if row == 0 else None)
    axes.set_yticks(range(len(cases)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the floor reached, at the rates of this machine")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_title(_where(run), fontsize=10)
    return figure


def _phases(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    bars = [(_label(case, c), c["phases_s"]) for case in cases for c in case["candidates"] if c["phases_s"]]
    colours = {phase: f"C{index}" for index, phase in enumerate(bars[0][1])}
    return _stacked(run, bars, colours, "ms in a step, waiting for the device after each part")


def _breakdown(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    bars = [
        (_label(case, c), c["breakdown"]["seconds"]) for case in cases for c in case["candidates"] if c.get("breakdown")
    ]
    used = {name: COLOURS[name] for name in CATEGORIES if any(parts[name] for _, parts in bars)}
    return _stacked(run, bars, used, "ms in a step, by what the device does; host: the device waits, or there is none")


def _label(case: dict[str, Any], candidate: dict[str, Any]) -> str:
    return f"{candidate['name']}\n{case['shape']['model']}, {case['shape']['batch']} pairs"


def _stacked(
    run: dict[str, Any], bars: list[tuple[str, dict[str, float]]], colours: dict[str, str], label: str
) -> Figure:
    """A bar for each of ``bars``, of seconds by the names in ``colours``."""
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(bars)))
    axes = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for name, colour in colours.items():
            width = 1e3 * parts[name]
            axes.barh(row, width, left=left, color=colour, label=name if row == 0 else None)
            left += width
        axes.text(left, row, f" {left:.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    below = -0.6 / (1.4 + 0.45 * len(bars))
    axes.legend(fontsize=8, frameon=False, ncols=min(len(colours), 6), loc="upper center", bbox_to_anchor=(0.5, below))
    axes.set_title(_where(run), fontsize=10)
    return figure
