"""OpenCLIP's names for the metrics of a run, and the event files of a run that TensorBoard shows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NO_TENSORBOARD = "No TensorBoard files: they need the package tensorboard, pip install 'clipfast[train]'"
# Maps OpenCLIP's name of a training metric to its key in a line of clipfast's ``metrics.jsonl``.
TRAIN_NAMES = {
    "data_time": "data_time", "batch_time": "batch_time", "samples_per_second": "pairs_per_second",
    "samples_per_second_per_gpu": "pairs_per_second_per_gpu", "logit_scale": "logit_scale",
    "logit_bias": "logit_bias", "lr": "lr", "contrastive_loss": "loss", "loss": "loss",
    # OpenCLIP does not report the following metrics.
    "grad_norm": "grad_norm", "patches_per_second": "patches_per_second", "data_wait": "data_wait",
    "communication": "communication", "mfu": "mfu",
}  # fmt: skip


def train_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars in a line of a run's training metrics, by OpenCLIP's names."""
    found = {f"train/{name}": line[key] for name, key in TRAIN_NAMES.items() if key in line}
    found |= {f"memory/{kind}_gb": size / 1e9 for kind, size in line.get("memory", {}).items()}
    for share in ("saturated", "zero"):
        found |= {f"fp8/{share}_{kind}": value for kind, value in line.get("fp8", {}).get(share, {}).items()}
    gpu = line.get("gpu", {})
    return found | {f"gpu/{name}": gpu[name] for name in ("power_w", "sm_mhz", "temperature_c") if name in gpu}


def evaluation_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a run's evaluation on ``--val-data``, by OpenCLIP's names or names in its style."""
    zero_shot = {f"zeroshot-val-{key}": results["zero_shot"][key] for key in ("top1", "top5")}
    ways = ("image_to_text", "text_to_image")
    recall = {f"{way}_{name}": value for way in ways for name, value in results["retrieval"][way].items()}
    groups = {f"{group}-top1": found["top1"] for group, found in results.get("by_group", {}).items()}
    loss = {"clip_val_loss": results["clip_val_loss"]} if "clip_val_loss" in results else {}
    return zero_shot | recall | loss | groups | {"num_samples": results["images"]}


def validation(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the metrics in a line of ``metrics.jsonl`` if it is on an evaluation; None if it is on training."""
    if "eval" in line:
        return evaluation_metrics(line["eval"])
    return dict(line["imagenet"]) if "imagenet" in line else None


def points(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return the x value at which OpenCLIP plots a line of ``metrics.jsonl`` in TensorBoard, and its scalars by name.

    For training this is the step counted from 0, the number of finished steps minus one; for an evaluation it is the
    number of finished epochs.
    """
    figures = validation(line)
    if figures is None:
        return line["step"] - 1, train_scalars(line)
    return line["epoch"], {f"val/{name}": value for name, value in figures.items()}


class TensorBoard:
    """Writes a run's metrics to TensorBoard's event files in a folder.

    The files are first written anew from all existing lines of ``metrics.jsonl``. Therefore a resumed run has no point
    twice, and a killed run loses no point. A TensorBoard that is running drops the points that it has read before.

    Args:
        folder: folder of the files; earlier files of TensorBoard in it are removed.
        lines: step, scalars by name, and time (seconds since 1970) of all existing lines of metrics.

    Raises:
        ImportError: tensorboard is missing.
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, lines: Iterable[tuple[int, Mapping[str, float], float | None]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        self._writer = SummaryWriter(str(folder), purge_step=0)
        for step, scalars, seconds in lines:
            self.add(step, scalars, seconds, flush=False)
        self._writer.flush()

    def add(self, step: int, scalars: Mapping[str, float], seconds: float | None = None, *, flush: bool = True) -> None:
        """Add the scalars of a run's step to TensorBoard's files, with their time in ``seconds`` since 1970."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        if flush:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close a run's event files for TensorBoard."""
        self._writer.close()
