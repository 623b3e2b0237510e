"""The arguments of the tasks that can evaluate the checkpoints of a run while it is being trained."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

from ..files import local_path

INTERVAL = 30  # seconds between two looks at a run that is watched


def add_watch_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what watches a run; ``name`` is that of the file in its folder for the lines."""
    add = parser.add_argument
    watched = "evaluate each checkpoint of a run that is being trained, as it appears, until the run is finished"
    add("--watch", type=local_path, metavar="RUN", help=f"in place of --model: {watched}; lines go to RUN/{name}")
    add("--interval", type=float, metavar="SECONDS", help=f"time between two looks at RUN (default: {INTERVAL})")
    raw = "the weights themselves where a checkpoint of RUN also has their average (EMA)"
    add("--raw", action="store_true", help=f"evaluate {raw}")


def check_unwatched(args: argparse.Namespace) -> None:
    """Refuse a command that names nothing to evaluate, and flags that have no use without ``--watch``.

    Raises:
        ValueError: as above.
    """
    if not args.model:
        raise ValueError("--model or --watch is needed: what to evaluate")
    if args.raw or args.interval is not None:
        name = "--raw" if args.raw else "--interval"
        raise ValueError(f"{name} is for the checkpoints of a run: give --watch RUN in place of --model")


def check_watch(args: argparse.Namespace, refused: Iterable[str]) -> float:
    """Refuse what cannot be watched, and flags that have no use then.

    Args:
        args: the arguments.
        refused: names of these flags.

    Returns:
        The seconds between two looks at the run.

    Raises:
        ValueError: there is no run, a flag is refused, or the interval is no time.
    """
    from ..training.history import is_run

    given = [flag for flag in refused if getattr(args, flag)]
    if given:
        raise ValueError(f"--watch cannot be used with --{given[0].replace('_', '-')}")
    if not is_run(args.watch):
        raise ValueError(f"--watch {args.watch}: there is no run in that folder")
    interval: float = INTERVAL if args.interval is None else args.interval
    if not 0 < interval < math.inf:
        raise ValueError(f"--interval must be more than 0, and finite, got {interval}")
    return interval
