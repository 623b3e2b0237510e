"""Where figures of a run go beside the log: TensorBoard, Weights & Biases, and OpenCLIP's file ``results.jsonl``.

All of them follow from the lines of ``metrics.jsonl``, and have OpenCLIP's names.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import replace_text
from .config import TrainConfig
from .logs import log
from .run import RunFolder, append

BACKENDS = ("tensorboard", "wandb", "all")  # values of --report-to, which commas join
NO_TENSORBOARD = "No TensorBoard files: they need the package tensorboard, pip install 'clipfast[train]'"
# OpenCLIP's name of a figure, and ours in a line of metrics.
TRAIN_NAMES = {
    "data_time": "data_time", "batch_time": "batch_time", "samples_per_second": "pairs_per_second",
    "samples_per_second_per_gpu": "pairs_per_second_per_gpu", "logit_scale": "logit_scale",
    "logit_bias": "logit_bias", "lr": "lr", "contrastive_loss": "loss", "loss": "loss",
    # from here on our own
    "grad_norm": "grad_norm", "data_wait": "data_wait", "communication": "communication", "mfu": "mfu",
}  # fmt: skip


def train_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a line of metrics on training."""
    found = {f"train/{name}": line[key] for name, key in TRAIN_NAMES.items() if key in line}
    found |= {f"memory/{kind}_gb": size / 1e9 for kind, size in line.get("memory", {}).items()}
    gpu = line.get("gpu", {})
    return found | {f"gpu/{name}": gpu[name] for name in ("power_w", "sm_mhz", "temperature_c") if name in gpu}


def evaluation_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of an evaluation on ``--val-data``, by OpenCLIP's names or similar ones."""
    zero_shot = {f"zeroshot-val-{key}": results["zero_shot"][key] for key in ("top1", "top5")}
    ways = ("image_to_text", "text_to_image")
    recall = {f"{way}_{name}": value for way in ways for name, value in results["retrieval"][way].items()}
    groups = {f"{group}-top1": found["top1"] for group, found in results.get("by_group", {}).items()}
    loss = {"clip_val_loss": results["clip_val_loss"]} if "clip_val_loss" in results else {}
    return zero_shot | recall | loss | groups | {"num_samples": results["images"]}


def validation(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the figures of a line of metrics on an evaluation, by name; None for a line on training."""
    if "eval" in line:
        return evaluation_metrics(line["eval"])
    return dict(line["imagenet"]) if "imagenet" in line else None


def points(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return where a line of metrics is on OpenCLIP's axis, and its scalars.

    OpenCLIP counts steps from 0, so its number of a step is one less than the steps that are finished then. Evaluations
    are at the epoch that they come after.
    """
    figures = validation(line)
    if figures is None:
        return line["step"] - 1, train_scalars(line)
    return line["epoch"], {f"val/{name}": value for name, value in figures.items()}


class TensorBoard:
    """TensorBoard's files in a folder.

    They are written anew from the lines that there are, so that a run that goes on has no point twice, and none is lost
    by a kill. Whatever TensorBoard shows already of the folder, it forgets.

    Args:
        folder: of the files; what TensorBoard wrote there is removed.
        lines: those that there are.

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
        """Add the scalars of a step, which were known at some time in ``seconds`` since 1970."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        if flush:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Reports:
    """All places for the figures of a run, for rank 0; a context that closes them at its end.

    Raises:
        ValueError: Weights & Biases cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        lines = [line for line in folder.metrics() if "epoch" in line]  # the others are warnings
        self._folder, self._results = folder, folder.checkpoints / "results.jsonl"
        results = "".join(map(_result, lines))
        if results or self._results.exists():
            replace_text(self._results, results)
        self._tensorboard: TensorBoard | None = None
        try:
            self._tensorboard = TensorBoard(
                folder.path / "tensorboard", ((*points(line), line.get("time")) for line in lines)
            )
        except ImportError:
            log.warning(NO_TENSORBOARD)
        except OSError as error:
            self._give_up(error)
        self._wandb = _started_wandb(config, folder) if "wandb" in backends(config.report_to) else None

    def add(self, line: Mapping[str, Any]) -> None:
        """Pass on a line of metrics."""
        step, scalars = points(line)
        is_held = self._folder.is_held()
        if validation(line) is not None and is_held:
            append(self._results, _result(line))
        if self._tensorboard is not None and is_held:
            try:
                (self._folder.path / "tensorboard").mkdir(exist_ok=True)  # TensorBoard opens its file each time
                self._tensorboard.add(step, scalars, line["time"])
            except OSError as error:
                self._give_up(error)
        if self._wandb is not None:
            # Its axis is the step for evaluations too.
            self._wandb.log({**scalars, "step": line["step"] - 1, "epoch": line["epoch"]}, step=line["step"] - 1)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _give_up(self, error: OSError) -> None:
        log.error(
            f"TensorBoard's files cannot be written: {error}. Training goes on, and a resumed run writes them anew."
        )
        self._tensorboard = None


def backends(report_to: str) -> set[str]:
    """Return the backends that the value of ``--report-to`` names.

    Raises:
        ValueError: one of them is unknown.
    """
    names = {name.strip() for name in report_to.split(",")} - {""}
    unknown = sorted(names - set(BACKENDS))
    if unknown:
        hint = "trackio has no backend here: use wandb, or read metrics.jsonl" if unknown == ["trackio"] else ""
        raise ValueError(
            f"--report-to must be of {', '.join(BACKENDS)}, joined by commas, got {report_to!r}"
            f"{f'; {hint}' if hint else ''}"
        )
    return {"tensorboard", "wandb"} if "all" in names else names


def check_wandb(report_to: str) -> None:
    """Refuse Weights & Biases if it is asked for and would fail, or ask for a key in the terminal.

    Raises:
        ValueError: it is not installed, or has no key.
    """
    if "wandb" not in backends(report_to):
        return
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"--report-to {report_to} needs the package wandb: pip install 'clipfast[wandb]', or leave wandb out; "
            "TensorBoard's files and metrics.jsonl are always written"
        ) from None
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
        raise ValueError(
            f"--report-to {report_to}: wandb has no key: run wandb login, set WANDB_API_KEY, or write to the disk only "
            "by WANDB_MODE=offline"
        )


def _started_wandb(config: TrainConfig, folder: RunFolder) -> Any:
    import wandb

    return wandb.init(
        project=config.wandb_project_name, name=folder.path.name, id=folder.path.name, notes=config.wandb_notes,
        resume="allow", config=dataclasses.asdict(config), dir=str(folder.path),
    )  # fmt: skip


def _result(line: Mapping[str, Any]) -> str:
    """Return the line for ``results.jsonl``; nothing for a line on training."""
    figures = validation(line)
    return "" if figures is None else json.dumps(figures | {"epoch": line["epoch"], "step": line["step"]}) + "\n"
