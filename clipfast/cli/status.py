"""``clipfast status``: show how far training runs are, and plot their metrics."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import local_path
from .arguments import DRAWN, add_output

if TYPE_CHECKING:  # imported for annotations only, since these modules would make --help slow
    from matplotlib.axes import Axes

    from ..runs.status import History

# Each panel of the plot: its title, the key of its metric in ``metrics.jsonl``, and a factor on the metric.
PANELS = (
    ("training loss", "loss", 1.0), ("learning rate", "lr", 1.0), ("logit scale", "logit_scale", 1.0),
    ("pairs per second", "pairs_per_second", 1.0), ("waiting for data, %", "data_wait", 100.0),
)  # fmt: skip
METRICS = (
    ("top-1", "zeroshot-val-top1", "-"), ("ImageNet top-1", "imagenet-zeroshot-val-top1", "--"),
    ("text to image R@1", "text_to_image_R@1", ":"),
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast status``."""
    parser = commands.add_parser(
        "status",
        description="Show how far runs are: loss, speed, remaining time, the last evaluation and checkpoint, warnings. "
        "Nothing is written to their folders.",
        epilog="Example: clipfast status runs/demo --plot demo.png",
    )
    add = parser.add_argument
    runs = "folder of a run, or a folder of runs (default: runs); several runs are one table"
    add("runs", nargs="*", type=local_path, default=[Path("runs")], metavar="RUN", help=runs)
    curves = "also draw loss, learning rate, logit scale, speed, waiting for data and evaluations over the steps"
    add_output(parser, "--plot", ends=DRAWN, is_held=False, help=f"{curves}; several runs lie over each other")
    add("--json", action="store_true", help="print JSON: a list with an object for each run")
    add("--follow", action="store_true", help="refresh until every run has ended, or Ctrl-C")
    add("--interval", type=float, default=5.0, metavar="SECONDS", help="time between two refreshes (default: 5)")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast status``: print the status of all runs, and return the exit code."""
    from ..runs.status import ENDED, described, find_runs, read_history, read_status, table

    if not args.interval > 0:
        raise ValueError(f"--interval must be more than 0, got {args.interval}")
    while True:
        runs = find_runs(args.runs)
        statuses = [read_status(path) for path in runs]
        if args.plot is not None:
            plot_runs([read_history(path) for path in runs], args.plot)
        text = described(statuses[0]) if len(statuses) == 1 else table(statuses)
        if args.follow and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")  # clear the terminal, to replace the previous output
        print(json.dumps(statuses, indent=2) if args.json else text, flush=True)
        if not args.follow or all(status["state"] in ENDED for status in statuses):
            return 0
        time.sleep(args.interval)


def plot_runs(histories: Sequence["History"], path: Path) -> None:
    """Plot loss, learning rate, logit scale, speed, data waits and evaluations of runs for ``clipfast status``."""
    from matplotlib.figure import Figure

    from ..io.files import save_figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (title, key, factor) in zip(axes, PANELS, strict=False):
        for number, history in enumerate(histories):
            _curve(
                axis, [(line["step"], factor * line[key]) for line in history.lines if key in line], f"C{number % 10}"
            )
        axis.set_title(title, fontsize=11)
        if key not in ("loss", "logit_scale"):
            axis.set_ylim(bottom=0)
    _evaluations(axes[len(PANELS)], histories)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    names = [history.folder.path.name for history in histories]
    if len(names) == 1:
        figure.suptitle(names[0])
    else:
        lines = [axes[0].plot([], [], color=f"C{number % 10}")[0] for number in range(len(names))]
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    save_figure(figure, path)


def _curve(axis: "Axes", points: Sequence[tuple[int, float]], colour: str, **style: Any) -> None:
    """Draw a curve in the plot of ``clipfast status``; a single point, invisible as a line, gets a marker."""
    if points:
        marker = {"marker": "o"} if len(points) == 1 else {}
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, **marker | style)


def _evaluations(axis: "Axes", histories: Sequence["History"]) -> None:
    """Draw accuracies and recall of the runs' evaluations in the plot of ``clipfast status``."""
    for number, history in enumerate(histories):
        for place, (name, key, style) in enumerate(METRICS):
            found = [
                (line["step"], 100 * line["metrics"][key]) for line in history.evaluations if key in line["metrics"]
            ]
            is_alone = len(histories) == 1
            label = f"{name}: {found[-1][1]:.1f}%" if is_alone and found else name if number == 0 else None
            colour = f"C{place if is_alone else number % 10}"
            _curve(axis, found, colour, linestyle=style, marker="o", markersize=4, label=label)
    axis.set_title("evaluations, %", fontsize=11)
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False)
