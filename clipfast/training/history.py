"""What a run has recorded so far, by this package or by OpenCLIP's trainer, read from its folder while it may go on."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .reports import validation
from .run import RunFolder, read_lines

LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d) \| (\w+) \| (.*)$")
TAIL = 1 << 20  # bytes of a log in which warnings are looked for
PROGRESS = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/(\d+) ")
# What stands in a line of OpenCLIP's log before each figure.
BEFORE = {
    "data_time": r"Data \(t\): ", "batch_time": r"Batch \(t\): ", "pairs_per_second": r"Batch \(t\): \S+ ",
    "lr": "LR: ", "logit_scale": "Logit Scale: ", "loss": r"\bLoss: ",
}  # fmt: skip
FIGURES = {name: re.compile(rf"{before}([-+.\deE]*\d)") for name, before in BEFORE.items()}


@dataclasses.dataclass
class History:
    """The records of a run.

    Attributes:
        folder: of the run.
        is_ours: whether this package wrote it, and not OpenCLIP's trainer.
        lines: on training, each with step, epoch, time (seconds since 1970; None if unknown), loss, lr and more.
        evaluations: each with step, epoch and ``metrics``, by OpenCLIP's names.
        total_steps: of the whole run; None if that is not known.
        epochs: of the whole run; None if that is not known.
        log: the last lines of its log: level and message of each.
    """

    folder: RunFolder
    is_ours: bool
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    total_steps: int | None
    epochs: int | None
    log: list[tuple[str, str]]


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return any((path / name).exists() for name in ("metrics.jsonl", "config.json", "out.log", "params.txt"))


def find_runs(paths: list[Path]) -> list[Path]:
    """Return the folders of runs that are meant by folders of runs, or of several runs each.

    Raises:
        ValueError: there is no run in one of them.
    """
    found: list[Path] = []
    for path in paths:
        runs = [path] if is_run(path) else sorted(filter(is_run, path.iterdir())) if path.is_dir() else []
        if not runs:
            raise ValueError(f"there is no run in {path}: give the folder of a run, or one that holds such folders")
        found += runs
    return found


def read_history(path: Path) -> History:
    """Read what is there of a run; lines that are not complete yet are left out."""
    folder = RunFolder(path)
    log = list(_tail(path / "out.log"))
    if not folder.metrics_path.exists() and any(PROGRESS.search(message) for _, message in log):
        return _openclip(folder, log)
    records = [line for line in folder.metrics() if isinstance(line.get("step"), int)]
    lines = [line for line in records if "lr" in line]  # a loss is missing where all steps were skipped
    evaluated = ((line, validation(line)) for line in [*records, *read_lines(path / "evaluations.jsonl")])
    evaluations = [line | {"metrics": figures} for line, figures in evaluated if figures is not None]
    last = lines[-1] if lines else {}
    evaluations.sort(key=lambda line: line["step"])
    return History(folder, True, lines, evaluations, last.get("total_steps"), last.get("epochs"), log)


def _tail(path: Path) -> Iterator[tuple[str, str]]:
    """Yield level and message of the last lines of a log."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        for line in file.read().decode("utf-8", "replace").splitlines():
            found = LOG_LINE.match(line)
            if found:
                yield found[2], found[3]


def _openclip(folder: RunFolder, log: list[tuple[str, str]]) -> History:
    """Read the log of OpenCLIP's trainer, which has no numbers of steps: they follow from the pairs and the batch."""
    options = _options(folder.path / "params.txt")
    batch = int(options.get("batch_size", 1)) * int(options.get("world_size", 1)) * int(options.get("accum_freq", 1))
    lines, per_epoch = [], 0
    for stamp, message in _stamped(folder.path / "out.log"):
        found = PROGRESS.search(message)
        if found is None:
            continue
        epoch, pairs, whole = map(int, found.groups())
        per_epoch = max(whole // batch, 1)
        values = {name: pattern.search(message) for name, pattern in FIGURES.items()}
        line = {name: float(value[1]) for name, value in values.items() if value}
        if {"loss", "lr"} <= line.keys():
            wait = line.get("data_time", 0.0) / line["batch_time"] if line.get("batch_time") else 0.0
            place = {"step": epoch * per_epoch + min(pairs // batch, per_epoch), "epoch": epoch, "time": stamp}
            lines.append(place | line | {"data_wait": min(wait, 1.0)})
    evaluations = [
        {"step": line["epoch"] * per_epoch, "epoch": line["epoch"], "metrics": line}
        for line in read_lines(folder.checkpoints / "results.jsonl")
        if "epoch" in line
    ]
    epochs = int(options["epochs"]) if "epochs" in options else None
    total = epochs * per_epoch if epochs is not None else None
    return History(folder, False, lines, evaluations, total, epochs, log)


def _stamped(path: Path) -> Iterator[tuple[float, str]]:
    """Yield time and message of each line of a log."""
    for line in path.read_text("utf-8", "replace").splitlines():
        found = LOG_LINE.match(line)
        if found:
            yield time.mktime(time.strptime(found[1], "%Y-%m-%d,%H:%M:%S")), found[3]


def _options(path: Path) -> dict[str, str]:
    """Return the options in OpenCLIP's ``params.txt``, of which those that are numbers have only digits."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    return {name: value for name, _, value in (line.partition(": ") for line in text.splitlines()) if value.isdecimal()}
