"""Pictures of a result: the loss by batch, the share of the floor by shape, the phases and the breakdown of a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import categories
from .case import OURS
from .tables import sizes

OUR_COLOUR = "#0b6e4f"
# Products are green; what a step could do without is grey.
COLOURS = {
    categories.GEMM: "#0b6e4f", categories.CONVOLUTION: "#5aa17f", categories.ATTENTION: "#2c7fb8",
    categories.NORM: "#7fcdbb", categories.INPUT: "#c7a252", categories.LOSS: "#d95f0e",
    categories.OPTIMIZER: "#8856a7", categories.COPIES: "#fdbe85", categories.OTHER: "#e7298a",
    categories.DATA: "#969696", categories.HOST: "#d9d9d9",
}  # fmt: skip


def draw(run: dict[str, Any], path: Path) -> list[Path]:
    """Draw every picture that ``run`` has data for, into files named after ``path``, and return the files."""
    cases = run["cases"]
    loss = [case for case in cases if case["suite"] == "loss"]
    pictures: dict[str, tuple[Callable[..., Figure], list[Any]]] = {
        "loss": (_against_batch, loss if len({case["shape"]["pairs"] for case in loss}) > 1 else []),
        "floor": (_share_of_floor, [case for case in cases if case["floor"] and _have(case, "samples_s")]),
        "step": (_phases, [case for case in cases if case["suite"] == "step" and _have(case, "phases_s")]),
        "breakdown": (_breakdown, [case for case in cases if _have(case, "breakdown")]),
    }
    written = []
    for name, (picture, drawn) in pictures.items():
        if drawn:
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            picture(run, drawn).savefig(written[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    return written


def _have(case: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the candidates of a case that have something at ``key``."""
    return [candidate for candidate in case["candidates"] if candidate.get(key)]


def _where(run: dict[str, Any]) -> str:
    name = run["machine"].get("gpu") or run["machine"]["cpu"]
    return f"{name}, torch {run['versions']['torch']}, {run['when'][:10]}"


def _against_batch(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.6))
    time_axes, memory_axes = figure.subplots(1, 2)
    # one width and one dtype: nobody could read a picture of several
    embed_dim, dtype = min((case["shape"]["embed_dim"], case["dtype"]) for case in cases)
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
    for name in [candidate["name"] for candidate in cases[0]["candidates"]]:
        points = [
            (case["shape"]["pairs"], factor * candidate[key])
            for case in cases
            for candidate in _have(case, key)
            if candidate["name"] == name
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
    for row, case in enumerate(cases):
        shares = {candidate["name"]: 100 * candidate["share_of_floor"] for candidate in _have(case, "share_of_floor")}
        ours, best = shares.pop(OURS, 0.0), max(shares.values(), default=0.0)
        axes.barh(row - 0.18, ours, height=0.34, color=OUR_COLOUR, label="clipfast" if row == 0 else None)
        axes.barh(row + 0.18, best, height=0.34, color="0.7", label="best other" if row == 0 else None)
    _name_rows(axes, [f"{case['op']}\n{sizes(case)} {case['dtype']}" for case in cases])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the floor reached, at the rates of this machine")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_title(_where(run), fontsize=10)
    return figure


def _phases(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    bars = [(_label(case, c), c["phases_s"]) for case in cases for c in _have(case, "phases_s")]
    colours = {phase: f"C{index}" for index, phase in enumerate(bars[0][1])}
    return _stacked(run, bars, colours, "ms in a step, waiting for the device after each part")


def _breakdown(run: dict[str, Any], cases: list[dict[str, Any]]) -> Figure:
    bars = [(_label(case, c), c["breakdown"]["seconds"]) for case in cases for c in _have(case, "breakdown")]
    used = {name: COLOURS[name] for name in categories.CATEGORIES if any(parts[name] for _, parts in bars)}
    return _stacked(run, bars, used, "ms in a step, by what the device does; host: the device waits, or there is none")


def draw_steps(record: dict[str, Any], path: Path) -> None:
    """Draw into a file where the time of predicted steps goes; ``record`` is that of ``clipfast inspect --predict``."""
    steps = [one for one in record["forecasts"] if one["name"] == "step"]
    colours = {name: COLOURS[name] for name in categories.CATEGORIES if any(name in one["shares"] for one in steps)}
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(steps)))
    axes = figure.subplots()
    for row, one in enumerate(steps):
        left = 0.0
        for name, colour in colours.items():
            width = 100 * one["shares"].get(name, 0.0) / one["seconds"]
            axes.barh(row, width, left=left, color=colour, label=name if row == 0 else None)
            left += width
        axes.text(left, row, f" {one['items_per_s']:,.0f} pairs/s", va="center", fontsize=8)
    _name_rows(axes, [f"{one['shape']['model']}, {one['shape']['batch']} pairs" for one in steps])
    axes.set_xlim(0, 118)
    axes.set_xlabel("% of a training step, predicted by the model of the GPU; the host is left out")
    _legend_below(axes, len(steps), len(colours))
    axes.set_title(f"{record['card']}, Triton {record['triton']}", fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def _label(case: dict[str, Any], candidate: dict[str, Any]) -> str:
    return f"{candidate['name']}\n{case['shape']['model']}, {case['shape']['batch']} pairs"


def _stacked(
    run: dict[str, Any], bars: list[tuple[str, dict[str, float]]], colours: dict[str, str], label: str
) -> Figure:
    """Draw a horizontal bar for each of ``bars``: a label, and seconds by the names in ``colours``."""
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(bars)))
    axes = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for name, colour in colours.items():
            width = 1e3 * parts[name]
            axes.barh(row, width, left=left, color=colour, label=name if row == 0 else None)
            left += width
        axes.text(left, row, f" {left:.0f} ms", va="center", fontsize=8)
    _name_rows(axes, [name for name, _ in bars])
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    _legend_below(axes, len(bars), len(colours))
    axes.set_title(_where(run), fontsize=10)
    return figure


def _legend_below(axes: Axes, rows: int, names: int) -> None:
    below = -0.6 / (1.4 + 0.45 * rows)
    axes.legend(fontsize=8, frameon=False, ncols=min(names, 6), loc="upper center", bbox_to_anchor=(0.5, below))


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
