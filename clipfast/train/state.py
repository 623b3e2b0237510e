"""The content of a training run's checkpoints, and how a run resumes from one."""

import dataclasses
import json
import math
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import CheckpointError, load_weights
from ..checkpoints.preprocessing import preprocessing_of
from ..distributed.dtensors import distribute_like, gather_full, to_local
from ..distributed.ending import NotFiniteError
from ..models import CLIP
from .batches import PROCESSES, epochs_in, stream_of
from .data import SkipBudget, TrainingData
from .ema import WeightAverage
from .option_checks import AUTO, flag_name
from .step import TrainingStep
from .train_config import TrainConfig

CHECKPOINT_VERSION = 1
MOMENTS = ("exp_avg", "momentum_buffer")  # entries of an optimizer's state that must have the parameter's shape


@dataclasses.dataclass
class Progress:
    """The progress of a training run, which its checkpoints hold."""

    step: int = 0  # number of finished steps
    seconds: float = 0.0  # time spent training, over all sessions
    skipped_steps: int = 0  # steps that changed no weight, since their loss or gradient was not finite
    skipped_in_a_row: int = 0  # skipped steps since the last step that changed the weights
    good_step: int | None = None  # the last step after which the model was better than guessing, if known


@dataclasses.dataclass
class RunState:
    """The state of a run, which checkpoints hold in OpenCLIP's layout with an additional key, ``clipfast``.

    Weights, optimizer state and progress are restored to the last bit. The options stay those of this run, which may
    differ from the checkpoint's; only options that change the training data cannot change within an epoch.
    """

    config: TrainConfig
    name: str
    model: CLIP
    optimizer: torch.optim.Optimizer
    step: TrainingStep
    data: TrainingData
    budget: SkipBudget
    progress: Progress
    average: WeightAverage | None = None

    def check(self, content: dict[str, Any]) -> float:
        """Check that the weights in the content of a checkpoint are finite, and return their largest absolute value.

        Raises:
            NotFiniteError: the weights are not finite.
        """
        weights = [to_local(content["state_dict"][name]) for name, _ in self.model.named_parameters()]
        largest = torch.stack([weight.abs().max().float().cpu() for weight in weights if weight.numel()]).max().item()
        if not math.isfinite(largest):
            raise NotFiniteError("the weights are", self.progress.step)
        return largest

    def state_dict(self, *, is_main: bool = True) -> dict[str, Any]:
        """Return the content of a checkpoint with full tensors if ``is_main``, without them otherwise.

        All ranks must call it, since FSDP2's shards are gathered.
        """
        complete: dict[str, Any] = gather_full(self.parts(), keep=is_main)
        return complete

    def parts(self) -> dict[str, Any]:
        """Return the content of a checkpoint with FSDP2's DTensors as they are, for a sharded checkpoint."""
        optimizer, counts = self.optimizer.state_dict(), {"seen": self.budget.seen, "kinds": dict(self.budget.kinds)}
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        average = {} if self.average is None else {"state_dict_ema": self.average.state_dict()}
        return {
            "epoch": self.data.epochs.finished_after(self.progress.step),
            "name": self.name,
            "state_dict": self.model.state_dict(),
            "optimizer": optimizer,
            **average,
            "clipfast": {
                "version": CHECKPOINT_VERSION,
                "model_config": self.model.config.to_dict(),
                "preprocess_cfg": preprocessing_of(self.model),
                "progress": dataclasses.asdict(self.progress) | counts,
                "stream": self.data.state_dict(),
                "micro_batch_size": self.step.micro_batch_size,  # a resumed run must keep it for the sake of BatchNorm
                "groups": self._groups(),
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            },
        }

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Continue a training run from the content of a checkpoint of clipfast or of OpenCLIP.

        Raises:
            CheckpointError: the checkpoint has no optimizer state, or does not fit the model.
            ValueError: the checkpoint was written in the middle of an epoch, and this run has other data.
        """
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            raise CheckpointError(
                "the checkpoint has no optimizer state, so training cannot go on from it: "
                "use --pretrained to start from its weights"
            )
        own: dict[str, Any] = checkpoint.get("clipfast", {})
        # Checkpoints of OpenCLIP and of old versions of clipfast do not name their optimizer: AdamW is assumed.
        was = own.get("config", {}).get("opt", "adamw")
        if was.lower() != self.config.opt.lower():
            raise CheckpointError(
                f"the checkpoint holds the optimizer state of --opt {was}, and this run has --opt {self.config.opt}: "
                "leave --opt as it was, or start from the weights with --pretrained"
            )
        load_weights(self.model, checkpoint, "the checkpoint")
        if self.average is not None:
            self.average.load_state_dict(checkpoint.get("state_dict_ema"))
        self._load_optimizer(checkpoint["optimizer"], own.get("groups"))
        try:
            self._load_progress(checkpoint["epoch"], own)
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no {error}: start from its weights with --pretrained") from error

    def _load_progress(self, epoch: int, own: dict[str, Any]) -> None:
        """Restore the number of steps and the counts of pairs from a checkpoint.

        ``epoch`` is its number of finished epochs, and ``own`` its entry ``clipfast``, {} in a checkpoint of OpenCLIP.
        """
        progress, stream = own.get("progress"), own.get("stream", {})
        if progress is None:  # the checkpoint is OpenCLIP's
            self.progress.step = self.data.epochs.steps_before(epoch)
        else:
            for field in dataclasses.fields(Progress):
                setattr(self.progress, field.name, progress.get(field.name, field.default))
            self.budget.seen = progress["seen"]
            self.budget.kinds.update(progress["kinds"])
        data = self.data.state_dict()
        changed = {key: stream.get(key) for key, now in data.items() if stream.get(key) != now} if stream else {}
        if changed:
            before = epochs_in(stream)
            if self.progress.step != before.steps_before(epoch):
                self._refuse_within_epoch(changed)
            self.progress.step = self.data.epochs.steps_before(epoch)
        is_same_option = own.get("config", {}).get("micro_batch_size") == self.config.micro_batch_size
        is_same_batch = not changed.keys() & stream_of(self.data.plan).keys()
        if self.config.micro_batch_size == AUTO and is_same_option and is_same_batch:
            self.step.micro_batch_size = own["micro_batch_size"]

    def _refuse_within_epoch(self, changed: dict[str, Any]) -> None:
        """Raise ValueError: the checkpoint is from within an epoch, and options or shards that determine data differ.

        ``changed`` holds the differing entries of the checkpoint's "stream", with their values there.
        """
        if "order" in changed:
            raise ValueError(
                "the checkpoint is from within an epoch of another version of clipfast, which has another order of the "
                "data: start from its weights with --pretrained"
            )
        names = {"batch_size": "batch_size" if self.data.batch_size == self.config.batch_size else "global_batch_size"}
        if changed.keys() == {"num_samples"}:  # if other entries differ too, they may be why the number has changed
            names["num_samples"] = "train_num_samples"
        flags = [
            f"{flag_name(name)} (was {was})"
            for key, was in changed.items()
            if hasattr(self.config, name := names.get(key, key))
        ]
        if any(key in changed and changed[key] is None for key in ("batch_size", PROCESSES)):
            flags = ["--use-naflex"]
        what = f"leave {', '.join(flags)} as it was" if flags else "the shards have other samples than they had"
        raise ValueError(f"the checkpoint is from within an epoch, whose data cannot change: {what}")

    def _groups(self) -> list[list[str]]:
        """Return the parameter names of each optimizer group, since the optimizer's state dict only has indices."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]

    def _load_optimizer(self, state: dict[str, Any], groups: list[list[str]] | None) -> None:
        """Load the optimizer's moments from a checkpoint; the learning rate and other options stay those of this run.

        ``groups`` holds the parameter names of each group in the checkpoint; None if the checkpoint has no names, as
        checkpoints of OpenCLIP and of earlier versions of clipfast.
        """
        for group, mine in zip(state["param_groups"], self.optimizer.param_groups, strict=False):
            group.update({key: value for key, value in mine.items() if key != "params"})
        try:
            self.optimizer.load_state_dict(self._distribute_moments(state))
            if groups not in (None, self._groups()):
                raise ValueError("its groups hold other parameters")
            # A fused optimizer does not check shapes, and would write beyond the end of moments that are too small.
            for parameter, moments in self.optimizer.state.items():
                # A tensor that stays on the CPU lies in the checkpoint's file, and would keep its space on the disk.
                moments.update({k: x.clone() for k, x in moments.items() if isinstance(x, Tensor) and x.is_cpu})
                if any(name in moments and moments[name].shape != parameter.shape for name in MOMENTS):
                    raise ValueError("its moments have other shapes than the parameters")
                if self.optimizer.defaults.get("amsgrad") and "max_exp_avg_sq" not in moments:
                    raise ValueError("it has no max_exp_avg_sq, which amsgrad reads (--opt-kwargs)")
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer state does not fit the model: {error}. Which parameters are trained, and "
                "in which groups, must stay: locked towers, --wd-exclude, --image-layer-decay and --text-layer-decay. "
                "In a checkpoint of OpenCLIP's main branch, positions have no weight decay: --wd-exclude "
                f"{' '.join(sorted(self.model.no_weight_decay()))}"
            ) from error

    def _distribute_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a full optimizer state with its moments as FSDP2's DTensors, sharded as the weights are."""
        parameters: dict[int, Tensor] = {}
        for saved, group in zip(state["param_groups"], self.optimizer.param_groups, strict=False):
            parameters |= zip(saved["params"], group["params"], strict=False)

        def own(index: int, value: Any) -> Any:
            """Return a tensor of the optimizer's state, sharded like the weight with this index if shapes are equal."""
            like = parameters.get(index)
            if like is None or not isinstance(value, Tensor) or value.shape != like.shape:
                return value
            return distribute_like(value, like)

        moments = {
            index: {name: own(index, value) for name, value in found.items()} for index, found in state["state"].items()
        }
        return state | {"state": moments}
