"""Reports of a run's metrics beside the log: TensorBoard, Weights & Biases, and OpenCLIP's file ``results.jsonl``.

All of these metrics are computed from the lines of ``metrics.jsonl``, and have OpenCLIP's names.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from ..io.files import replace_text
from ..runs.folder import RunFolder, append
from ..runs.metrics import NO_TENSORBOARD, TensorBoard, points, validation
from .logs import log
from .train_config import TrainConfig

BACKENDS = ("tensorboard", "wandb", "all")  # values of --report-to, which takes several joined by commas


class Reports:
    """All reports of a run's metrics, on rank 0. It is a context manager that closes them at its end.

    Raises:
        ValueError: Weights & Biases cannot be used.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        lines = [line for line in folder.metrics() if "epoch" in line]  # lines without an epoch are warnings
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
        """Send a line of training metrics to TensorBoard, Weights & Biases and ``results.jsonl``."""
        step, scalars = points(line)
        is_held = self._folder.is_held()
        if validation(line) is not None and is_held:
            append(self._results, _result(line))
        if self._tensorboard is not None and is_held:
            try:
                # TensorBoard opens its file anew for each write, for which the folder must exist.
                (self._folder.path / "tensorboard").mkdir(exist_ok=True)
                self._tensorboard.add(step, scalars, line["time"])
            except OSError as error:
                self._give_up(error)
        if self._wandb is not None:
            # In W&B, the x-axis of evaluations is the training step too, and not the epoch as in TensorBoard.
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
        """Log that TensorBoard's files cannot be written, and train on without them."""
        log.error(
            f"TensorBoard's files cannot be written: {error}. Training goes on, and a resumed run writes them anew."
        )
        self._tensorboard = None


def backends(report_to: str) -> set[str]:
    """Return the backends of training reports that the value of ``--report-to`` names.

    Raises:
        ValueError: one of them is unknown.
    """
    names = {name.strip() for name in report_to.split(",")} - {""}
    unknown = sorted(names - set(BACKENDS))
    if unknown:
        hint = "clipfast does not report to trackio: use wandb, or read metrics.jsonl" if unknown == ["trackio"] else ""
        raise ValueError(
            f"--report-to must be of {', '.join(BACKENDS)}, joined by commas, got {report_to!r}"
            f"{f'; {hint}' if hint else ''}"
        )
    return {"tensorboard", "wandb"} if "all" in names else names


def check_wandb(report_to: str) -> None:
    """Check that Weights & Biases can be used if ``--report-to`` names it, without asking for a key in the terminal.

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
    """Start the report of a training run to Weights & Biases, or resume it; return the ``wandb`` run."""
    import wandb

    return wandb.init(
        project=config.wandb_project_name, name=folder.path.name, id=folder.path.name, notes=config.wandb_notes,
        resume="allow", config=dataclasses.asdict(config), dir=str(folder.path),
    )  # fmt: skip


def _result(line: Mapping[str, Any]) -> str:
    """Return the line of OpenCLIP's ``results.jsonl`` for a line of metrics; "" if that is on training."""
    figures = validation(line)
    return "" if figures is None else json.dumps(figures | {"epoch": line["epoch"], "step": line["step"]}) + "\n"
