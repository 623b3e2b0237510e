"""How far a run is, and how it does: what ``clipfast status`` says."""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..columns import align, printable
from ..progress import duration
from .history import History, read_history
from .lock import holder
from .run import RunFolder

RUNNING, FINISHED, INTERRUPTED, FAILED, DEAD = "running", "finished", "interrupted", "failed", "dead"
UNKNOWN = "unknown"  # OpenCLIP's trainer does not say whether it lives
ENDED = (FINISHED, INTERRUPTED, FAILED, DEAD)
RECENT = 20  # log lines whose speed is compared with that of as many before them
SILENCE = 10.0  # a line that comes so many times later than usual is missed
LEAST_SILENCE = 60.0  # seconds
SHOWN_WARNINGS = 3
FIGURES = ("epoch", "loss", "lr", "logit_scale", "pairs_per_second", "data_wait", "communication", "mfu", "memory")


def read_status(path: Path, now: float | None = None) -> dict[str, Any]:
    """Return what there is to say of the run in a folder; what is not known is None, or left out.

    Args:
        path: the folder of a run of this package or of OpenCLIP's trainer.
        now: seconds since 1970; by default, the time it is.
    """
    now = time.time() if now is None else now
    history = read_history(path)
    lines, last = history.lines, history.lines[-1] if history.lines else {}
    process = holder(path) if history.is_ours else None
    step = last.get("step", 0)
    found: dict[str, Any] = {
        "run": path.name, "path": str(path), "state": _state(history, process, step), "process": process, "step": step,
        "total_steps": history.total_steps, "epochs": history.epochs,
    }  # fmt: skip
    found |= {name: last[name] for name in FIGURES if name in last}
    found["pairs_per_second_trend"] = _trend([line["pairs_per_second"] for line in lines if "pairs_per_second" in line])
    is_over = found["state"] in ENDED
    found["eta"] = None if is_over or not lines else _eta(last, history, now)
    found["updated"] = last.get("time")
    found["evaluation"] = _evaluation(history)
    found["checkpoint"] = _checkpoint(history.folder)
    found["skipped"] = history.folder.skipped_count()
    found["skipped_steps"] = sum(line.get("skipped_steps", 0) for line in lines)
    found["warnings"] = [message for level, message in history.log if level in ("WARNING", "ERROR", "CRITICAL")]
    silence = None if is_over else _silence(lines, now)
    if silence is not None:
        found["warnings"].append(silence)
    return found


def _state(history: History, process: str | None, step: int) -> str:
    """Return what became of the process of a run."""
    if not history.is_ours:
        whole = history.total_steps is not None and step >= history.total_steps
        return FINISHED if whole else UNKNOWN
    if process is not None:
        return RUNNING
    results = history.folder.path / "results.json"
    # Those of a run that went on for more epochs are older than its last steps.
    if results.exists() and json.loads(results.read_text("utf-8")).get("steps", 0) >= step:
        return FINISHED
    messages = [message for _, message in history.log[-3:]]
    if any(message.startswith("Interrupted.") for message in messages):
        return INTERRUPTED
    return FAILED if any("; go on with: " in message for message in messages) else DEAD


def _eta(last: dict[str, Any], history: History, now: float) -> float | None:
    """Return the seconds that are left: what the run said last, less what has passed since, or an estimate."""
    if "eta" in last:
        return max(float(last["eta"]) - (now - last["time"]), 0.0)
    if history.total_steps is None or "batch_time" not in last or history.is_ours:
        return None
    usual = statistics.median(line["batch_time"] for line in history.lines[-RECENT:] if "batch_time" in line)
    return (history.total_steps - int(last["step"])) * usual


def _evaluation(history: History) -> dict[str, Any] | None:
    """Return the last evaluation, with the metrics of all after the same step: one is on ImageNet, for example."""
    if not history.evaluations:
        return None
    last = history.evaluations[-1]
    metrics: dict[str, Any] = {}
    for line in history.evaluations:
        metrics.update(line["metrics"] if line["step"] == last["step"] else {})
    return last | {"metrics": metrics}


def _trend(rates: Sequence[float]) -> float | None:
    """Return by which share the recent lines are faster than those before them; None for fewer than five lines."""
    rates = rates[1:]  # much is prepared in the first steps
    count = min(RECENT, len(rates) // 2)
    if count < 2:
        return None
    before = statistics.median(rates[-2 * count : -count])
    return statistics.median(rates[-count:]) / before - 1 if before else None


def _silence(lines: list[dict[str, Any]], now: float) -> str | None:
    """Return a warning if the next line is overdue."""
    times = [line["time"] for line in lines[-RECENT:] if line.get("time") is not None]
    if len(times) < 2:
        return None
    usual = statistics.median(after - before for before, after in itertools.pairwise(times))
    passed = now - times[-1]
    if passed < max(SILENCE * usual, LEAST_SILENCE):
        return None
    return f"the last line is {duration(passed)} old, and usually one comes every {duration(usual)}"


def _checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    """Return name and time of the last checkpoint."""
    for path in folder.kept():
        try:
            return {"name": path.name, "time": path.stat().st_mtime}
        except FileNotFoundError:  # removed meanwhile
            continue
    return None


def described(status: dict[str, Any], now: float | None = None) -> str:
    """Return the status of one run as lines of text."""
    now = time.time() if now is None else now
    process = f" by {status['process']}" if status["process"] else ""
    rows = [("run", f"{status['run']}: {status['state']}{process}"), ("step", _progress(status))]
    if "loss" in status:
        rows.append(("loss", f"{status['loss']:.4g}; learning rate {status['lr']:.3g}{_scale(status)}"))
    if "pairs_per_second" in status:
        rows.append(("speed", _speed(status)))
    if status.get("memory"):
        kinds = ", ".join(f"{size / 1e9:.1f} GB {kind}" for kind, size in status["memory"].items())
        rows.append(("memory", kinds))
    if status["eta"] is not None:
        rows.append(("ETA", duration(status["eta"])))
    if status["evaluation"]:
        rows.append(
            (
                "evaluation",
                f"after step {status['evaluation']['step']}: {metrics_text(status['evaluation']['metrics'])}",
            )
        )
    if status["checkpoint"]:
        age = duration(max(now - status["checkpoint"]["time"], 0))
        rows.append(("checkpoint", f"{status['checkpoint']['name']}, {age} old"))
    for name, count in (("samples", status["skipped"]), ("steps", status["skipped_steps"])):
        rows += [("skipped", f"{count:,} {name}")] if count else []
    if status["warnings"]:
        rows.append(("warnings", f"{len(status['warnings'])}; the last:"))
        rows += [("", warning) for warning in status["warnings"][-SHOWN_WARNINGS:]]
    return "\n".join(f"{name:<11} {printable(text)}" for name, text in rows)


def _progress(status: dict[str, Any]) -> str:
    step, total = status["step"], status["total_steps"]
    if total is None:
        return f"{step:,}" if step else "none is logged yet"
    epoch = f", epoch {status['epoch'] + 1} of {status['epochs']}" if status["epochs"] is not None else ""
    return f"{step:,} of {total:,} ({100 * step / total:.1f}%){epoch}"


def _scale(status: dict[str, Any]) -> str:
    return f"; logit scale {status['logit_scale']:.2f}" if "logit_scale" in status else ""


def _speed(status: dict[str, Any]) -> str:
    trend, parts = status["pairs_per_second_trend"], [f"{status['pairs_per_second']:,.4g} pairs/s"]
    if trend is not None:
        parts[0] += f" ({100 * trend:+.1f}% against earlier)"
    for name, key in (("waits for data", "data_wait"), ("for communication", "communication"), ("MFU", "mfu")):
        if key in status:
            parts.append(f"{name} {100 * status[key]:.1f}%")
    return "; ".join(parts)


WANTED = (
    ("zero-shot top-1", "zeroshot-val-top1"), ("top-5", "zeroshot-val-top5"),
    ("ImageNet top-1", "imagenet-zeroshot-val-top1"), ("ImageNet-V2 top-1", "imagenetv2-zeroshot-val-top1"),
    ("text to image R@1", "text_to_image_R@1"), ("image to text R@1", "image_to_text_R@1"),
)  # fmt: skip


def metrics_text(metrics: dict[str, float]) -> str:
    """Return the figures of an evaluation that matter most."""
    return ", ".join(f"{name} {100 * metrics[key]:.1f}%" for name, key in WANTED if key in metrics)


COLUMNS = (
    "run",
    "state",
    "step",
    "epoch",
    "loss",
    "pairs/s",
    "data wait",
    "ETA",
    "top-1",
    "saved",
    "skipped",
    "warnings",
)


def table(statuses: Sequence[dict[str, Any]], now: float | None = None) -> str:
    """Return the status of several runs as a table with a line for each."""
    now = time.time() if now is None else now
    rows = [COLUMNS, *(_row(status, now) for status in statuses)]
    return align(rows, right=range(2, len(COLUMNS)))  # columns of numbers


def _row(status: dict[str, Any], now: float) -> tuple[str, ...]:
    def figure(key: str, form: str, factor: float = 1.0, unit: str = "") -> str:
        return f"{factor * status[key]:{form}}{unit}" if status.get(key) is not None else ""

    total, checkpoint = status["total_steps"], status["checkpoint"]
    metrics = (status["evaluation"] or {}).get("metrics", {})
    top1 = metrics.get("zeroshot-val-top1", metrics.get("imagenet-zeroshot-val-top1"))
    return (
        status["run"],
        status["state"],
        f"{status['step']:,}" + (f"/{total:,}" if total else ""),
        f"{status['epoch'] + 1}/{status['epochs']}" if status["epochs"] and "epoch" in status else "",
        figure("loss", ".4g"),
        figure("pairs_per_second", ",.4g"),
        figure("data_wait", ".1f", 100, "%"),
        duration(status["eta"]) if status["eta"] is not None else "",
        f"{100 * top1:.1f}%" if top1 is not None else "",
        f"{duration(max(now - checkpoint['time'], 0))} ago" if checkpoint else "",
        f"{status['skipped']:,}" if status["skipped"] else "",
        f"{len(status['warnings'])}" if status["warnings"] else "",
    )
