"""The records of a run, and the text that ``clipfast status`` prints about them."""

import contextlib
import dataclasses
import itertools
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.progress import duration
from ..io.text import align, printable
from .folder import RunFolder, read_lines
from .lock import holder
from .metrics import validation

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| (\w+) \| (.*)$", re.MULTILINE)
TAIL = 1 << 20  # warnings are looked for in this many bytes at the end of a log


@dataclasses.dataclass
class History:
    """The records of a training run, as ``clipfast status`` reads them from its folder.

    Attributes:
        folder: folder of the run.
        lines: lines on training, each with step, epoch, time (seconds since 1970; None if unknown), loss, lr and more.
        evaluations: lines on evaluations, each with step, epoch and ``metrics`` by OpenCLIP's names.
        total_steps: number of steps of the whole run; None if unknown.
        epochs: number of epochs of the whole run; None if unknown.
        log: level and message of each line at the end of ``out.log``.
    """

    folder: RunFolder
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    total_steps: int | None
    epochs: int | None
    log: list[tuple[str, str]]


def is_run(path: Path) -> bool:
    """Return True if a folder has a file that only clipfast's trainer writes, and not OpenCLIP's."""
    return any((path / name).exists() for name in ("metrics.jsonl", "config.json"))


def find_runs(paths: list[Path]) -> list[Path]:
    """Return the folders of runs for paths that are folders of runs, or folders with several runs in them.

    Raises:
        ValueError: there is no run in one of the paths.
    """
    found: list[Path] = []
    for path in paths:
        runs = [path] if is_run(path) else sorted(filter(is_run, path.iterdir())) if path.is_dir() else []
        if not runs:
            raise ValueError(f"there is no run in {path}: give the folder of a run, or one that holds such folders")
        found += runs
    return found


def read_history(path: Path) -> History:
    """Read the records of a run from its folder; incomplete lines are left out."""
    folder = RunFolder(path)
    log = _last_lines(path / "out.log")
    records = [line for line in folder.metrics() if isinstance(line.get("step"), int)]
    lines = [line for line in records if "lr" in line]  # every line on training has "lr", but it may lack "loss"
    evaluated = ((line, validation(line)) for line in [*records, *read_lines(path / "evaluations.jsonl")])
    evaluations = [line | {"metrics": figures} for line, figures in evaluated if figures is not None]
    last = lines[-1] if lines else {}
    evaluations.sort(key=lambda line: line["step"])
    return History(folder, lines, evaluations, last.get("total_steps"), last.get("epochs"), log)


def _last_lines(path: Path) -> list[tuple[str, str]]:
    """Return level and message of each line in the last ``TAIL`` bytes of a run's log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        return LOG_LINE.findall(file.read().decode("utf-8", "replace"))


RUNNING, FINISHED, INTERRUPTED, FAILED, DEAD = "running", "finished", "interrupted", "failed", "dead"
ENDED = (FINISHED, INTERRUPTED, FAILED, DEAD)
RECENT = 20  # number of lines of metrics from which the usual time between two lines is computed
SILENCE = 10.0  # a warning appears if no line of metrics has come for this many times the usual time
LEAST_SILENCE = 60.0  # no warning appears before this many seconds without a line of metrics
SHOWN_WARNINGS = 3
FIGURES = (
    "epoch", "loss", "lr", "logit_scale", "pairs_per_second", "patches_per_second", "data_wait", "communication", "mfu",
    "memory",
)  # fmt: skip


def read_status(path: Path, now: float | None = None) -> dict[str, Any]:
    """Return the status of the run in a folder as a dict; unknown values are None or left out.

    Args:
        path: the folder of a run.
        now: seconds since 1970; by default, the current time.
    """
    now = time.time() if now is None else now
    history = read_history(path)
    lines, last = history.lines, history.lines[-1] if history.lines else {}
    process = holder(path)
    step = last.get("step", 0)
    state = _state(history, process, step)
    checkpoints = [(file.name, _changed(file)) for file in history.folder.kept()]
    return {
        "run": path.name, "path": str(path), "state": state, "process": process, "step": step,
        "total_steps": history.total_steps, "epochs": history.epochs,
        **{name: last[name] for name in FIGURES if name in last},
        "eta": max(last["eta"] - (now - last["time"]), 0.0) if "eta" in last and state not in ENDED else None,
        "updated": last.get("time"), "evaluation": _evaluation(history),
        "checkpoint": next(({"name": name, "time": found} for name, found in checkpoints if found), None),
        "skipped": len(history.folder.skipped()),
        "skipped_steps": sum(line.get("skipped_steps", 0) for line in lines),
        "warnings": [message for level, message in history.log if level in ("WARNING", "ERROR", "CRITICAL")]
        + ([] if state in ENDED else _silence(lines, now)),
    }  # fmt: skip


def _changed(path: Path) -> float | None:
    """Return the modification time of a file of a run; None if it was removed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return None


def _state(history: History, process: str | None, step: int) -> str:
    """Return the state of a run: "running", "finished", "interrupted", "failed" or "dead"."""
    if process is not None:
        return RUNNING
    results = history.folder.path / "results.json"
    # A finished run that was resumed for more epochs still has the results of its first end, after fewer steps.
    if results.exists() and json.loads(results.read_text("utf-8")).get("steps", 0) >= step:
        return FINISHED
    messages = [message for _, message in history.log[-3:]]
    if any(message.startswith("Interrupted.") for message in messages):
        return INTERRUPTED
    return FAILED if any("; go on with: " in message for message in messages) else DEAD


def _evaluation(history: History) -> dict[str, Any] | None:
    """Return a run's last evaluation, with the metrics of all evaluations after its step, such as one on ImageNet."""
    if not history.evaluations:
        return None
    last, metrics = history.evaluations[-1], dict[str, Any]()
    for line in history.evaluations:
        metrics |= line["metrics"] if line["step"] == last["step"] else {}
    return last | {"metrics": metrics}


def _silence(lines: list[dict[str, Any]], now: float) -> list[str]:
    """Return a warning in a list if the next line of a run's metrics is overdue, otherwise []."""
    times = [line["time"] for line in lines[-RECENT:] if line.get("time") is not None]
    if len(times) < 2:
        return []
    usual = statistics.median(after - before for before, after in itertools.pairwise(times))
    passed = now - times[-1]
    if passed < max(SILENCE * usual, LEAST_SILENCE):
        return []
    return [f"the last line is {duration(passed)} old, and usually one comes every {duration(usual)}"]


def described(status: dict[str, Any]) -> str:
    """Return the status of one run as lines of text for ``clipfast status``."""
    process = f" by {status['process']}" if status["process"] else ""
    rows = [("run", f"{status['run']}: {status['state']}{process}"), ("step", _progress(status))]
    if "loss" in status:
        scale = f"; logit scale {status['logit_scale']:.2f}" if "logit_scale" in status else ""
        rows.append(("loss", f"{status['loss']:.4g}; learning rate {status['lr']:.3g}{scale}"))
    if "pairs_per_second" in status:
        speed = [f"{status['pairs_per_second']:,.4g} pairs/s"]
        speed += [f"{status['patches_per_second']:,.4g} patches/s"] if "patches_per_second" in status else []
        for name, key in (("waits for data", "data_wait"), ("for communication", "communication"), ("MFU", "mfu")):
            speed += [f"{name} {100 * status[key]:.1f}%"] if key in status else []
        rows.append(("speed", "; ".join(speed)))
    if status.get("memory"):
        rows.append(("memory", ", ".join(f"{size / 1e9:.1f} GB {kind}" for kind, size in status["memory"].items())))
    if status["eta"] is not None:
        rows.append(("ETA", duration(status["eta"])))
    if status["evaluation"]:
        found = status["evaluation"]
        rows.append(("evaluation", f"after step {found['step']}: {metrics_text(found['metrics'])}"))
    if status["checkpoint"]:
        rows.append(("checkpoint", f"{status['checkpoint']['name']}, {_age(status['checkpoint'])} old"))
    for name, count in (("samples", status["skipped"]), ("steps", status["skipped_steps"])):
        rows += [("skipped", f"{count:,} {name}")] if count else []
    if status["warnings"]:
        rows.append(("warnings", f"{len(status['warnings'])}; the last:"))
        rows += [("", warning) for warning in status["warnings"][-SHOWN_WARNINGS:]]
    return "\n".join(f"{name:<11} {printable(text)}" for name, text in rows)


def _age(checkpoint: dict[str, Any]) -> str:
    """Return how long ago a run's checkpoint was written."""
    return duration(max(time.time() - checkpoint["time"], 0))


def _progress(status: dict[str, Any]) -> str:
    """Return a text with a run's step and epoch, such as "500 of 1,000 (50.0%), epoch 1 of 2"."""
    step, total = status["step"], status["total_steps"]
    if total is None:
        return f"{step:,}" if step else "none is logged yet"
    epoch = f", epoch {status['epoch'] + 1} of {status['epochs']}" if status["epochs"] is not None else ""
    return f"{step:,} of {total:,} ({100 * step / total:.1f}%){epoch}"


WANTED = (
    ("zero-shot top-1", "zeroshot-val-top1"), ("top-5", "zeroshot-val-top5"),
    ("ImageNet top-1", "imagenet-zeroshot-val-top1"), ("ImageNet-V2 top-1", "imagenetv2-zeroshot-val-top1"),
    ("text to image R@1", "text_to_image_R@1"), ("image to text R@1", "image_to_text_R@1"),
)  # fmt: skip


def metrics_text(metrics: dict[str, float]) -> str:
    """Return a text with the most important accuracies and recalls of a run's evaluation."""
    return ", ".join(f"{name} {100 * metrics[key]:.1f}%" for name, key in WANTED if key in metrics)


def table(statuses: Sequence[dict[str, Any]]) -> str:
    """Return the status of several runs as a table with a line for each run; cells of unknown values are empty."""
    rows = list(map(_row, statuses))
    return align([tuple(rows[0]), *(tuple(row.values()) for row in rows)], right=range(2, len(rows[0])))


def _row(status: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a run's line in the table of ``clipfast status``, by column title."""
    total, checkpoint = status["total_steps"], status["checkpoint"]
    metrics = (status["evaluation"] or {}).get("metrics", {})
    top1 = metrics.get("zeroshot-val-top1", metrics.get("imagenet-zeroshot-val-top1"))
    return {
        "run": status["run"],
        "state": status["state"],
        "step": f"{status['step']:,}" + (f"/{total:,}" if total else ""),
        "epoch": f"{status['epoch'] + 1}/{status['epochs']}" if status["epochs"] and "epoch" in status else "",
        "loss": f"{status['loss']:.4g}" if "loss" in status else "",
        "pairs/s": f"{status['pairs_per_second']:,.4g}" if "pairs_per_second" in status else "",
        "data wait": f"{100 * status['data_wait']:.1f}%" if "data_wait" in status else "",
        "ETA": duration(status["eta"]) if status["eta"] is not None else "",
        "top-1": f"{100 * top1:.1f}%" if top1 is not None else "",
        "saved": f"{_age(checkpoint)} ago" if checkpoint else "",
        "skipped": f"{status['skipped']:,}" if status["skipped"] else "",
        "warnings": f"{len(status['warnings'])}" if status["warnings"] else "",
    }
