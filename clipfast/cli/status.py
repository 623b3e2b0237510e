"""``clipfast status``: show how far training runs are, and plot their metrics."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..io.files import local_path
from .arguments import DRAWN, add_output


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
            from ..evaluate.pictures import plot_runs

            plot_runs([read_history(path) for path in runs], args.plot)
        text = described(statuses[0]) if len(statuses) == 1 else table(statuses)
        if args.follow and sys.stdout.isatty():
            print("\x1b[H\x1b[J", end="")  # clear the terminal, to replace the previous output
        print(json.dumps(statuses, indent=2) if args.json else text, flush=True)
        if not args.follow or all(status["state"] in ENDED for status in statuses):
            return 0
        time.sleep(args.interval)
