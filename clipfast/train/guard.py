"""The guard against gradients that are not finite: it skips a step on all ranks or on none, and records skipped steps.

The verdict on a step, whether it is skipped, needs no communication of its own. A loss that is not finite makes its
rank's gradients NaN. The mean of the ranks' gradients then is NaN on all ranks, so all ranks find the same norm and
decide the same. The verdict stays on the device, where fused Adam and AdamW read it. Other optimizers cannot read it
there, so the host waits for it.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch
from ..distributed.dtensors import is_dtensor, to_local
from ..distributed.ending import TrainingError
from ..distributed.world import World
from ..models import CLIP
from .optim import takes_verdict

if TYPE_CHECKING:
    from ..runs.folder import RunFolder
    from .data import TrainingData
    from .state import Progress

log = logging.getLogger("clipfast")
NAMED = 5  # a message names at most this many of the parameters whose gradients are not finite


class Figures(NamedTuple):
    """The metrics of one training step, as Python numbers on the host.

    Attributes:
        loss: the loss of this rank's pairs.
        grad_norm: the norm of the gradient of all ranks, before it is clipped.
        skipped: 1 if the step changed no weight, else 0.
        logit_scale: the factor of the cosine similarities at the beginning of the step.
    """

    loss: float
    grad_norm: float
    skipped: float
    logit_scale: float


class Guard:
    """Takes the step of an optimizer if the gradient is finite, and skips it otherwise.

    A skipped step leaves the weights, the state of the optimizer and the running statistics of BatchNorm as they were.

    Args:
        model, optimizer: the optimizer's parameters are the model's. With FSDP2, they are sharded already.
        grad_clip_norm: largest norm of the gradient; None does not clip it.

    Attributes:
        waits: whether the host waits for the verdict on each step.
        figures: the metrics of the last step, [4] float32 on the device, in the order of :class:`Figures`. Each step
            writes to the same tensor, as a CUDA graph must.
        norms: the gradient norm of each parameter in ``names``; each step writes to the same tensor here too.
        names: the names of the trained parameters.
    """

    def __init__(self, model: CLIP, optimizer: torch.optim.Optimizer, grad_clip_norm: float | None) -> None:
        self.model, self.optimizer, self.grad_clip_norm = model, optimizer, grad_clip_norm
        device = model.logit_scale.device
        # If weights are in the host's memory, their optimizer runs there, and must wait until the GPU has decided.
        devices = {to_local(parameter).device for group in optimizer.param_groups for parameter in group["params"]}
        self.waits = not takes_verdict(optimizer) or devices != {device}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names, self._parameters = list(trained), list(trained.values())
        self._norms_of = norms_of_parts if any(map(is_dtensor, self._parameters)) else norms_of
        self.figures = torch.zeros(len(Figures._fields), device=device)
        self.norms = torch.zeros(len(trained), device=device)
        normalisations = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for module in normalisations for buffer in module.buffers()]
        self._before = [buffer.clone() for buffer in self._statistics]

    @property
    def skipped(self) -> Tensor:
        """The verdict on the last training step: 1 if it changed no weight, else 0; a scalar on the device."""
        return self.figures[Figures._fields.index("skipped")]

    def begin(self) -> None:
        """Save the running statistics of BatchNorm before a training step, whose forward pass changes them."""
        for before, buffer in zip(self._before, self._statistics, strict=True):
            before.copy_(buffer)

    @torch.no_grad()
    def judge(self, loss: Tensor) -> None:
        """Compute the metrics of a training step from its loss and the gradients in ``.grad``; clip the gradients."""
        gradients = [parameter.grad for parameter in self._parameters]
        norms = iter(self._norms_of([gradient for gradient in gradients if gradient is not None]))
        zero = self.norms.new_zeros(())
        torch.stack([zero if gradient is None else next(norms) for gradient in gradients], out=self.norms)
        norm = torch.linalg.vector_norm(self.norms)
        found = (loss, norm, ~norm.isfinite(), self.model.logit_scale.detach().exp())
        torch.stack([value.float().reshape(()) for value in found], out=self.figures)
        if self.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip_norm, norm)

    @torch.no_grad()
    def step(self) -> None:
        """Run the optimizer step if the gradient is finite, or restore BatchNorm's statistics from before the step."""
        if not self.waits:
            self.optimizer.found_inf = self.skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not self.skipped.item():
            self.optimizer.step()
        is_skipped = self.skipped > 0
        for before, buffer in zip(self._before, self._statistics, strict=True):
            torch.where(is_skipped, before, buffer, out=buffer)


@dataclasses.dataclass
class GuardedLoss:
    """Wraps a loss: if its value is not finite, its gradients become NaN, which every rank then sees in their mean.

    Attributes:
        loss: the loss.
        scale: maps the number of pairs of this process to a factor on the gradients; the returned loss lacks it.
    """

    loss: Callable[..., Tensor]
    scale: Callable[[int], float] | None = None

    def __call__(self, *outputs: Any) -> Tensor:
        """Return the loss of a model's outputs; its gradients become NaN if it is not finite."""
        value = self.loss(*outputs)
        if value.requires_grad:
            poison, factor = 0 * value.detach(), 1.0 if self.scale is None else self.scale(len(outputs[0]))
            value.register_hook(lambda gradient: torch.add(poison, gradient, alpha=factor))
        return value


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient of a training step, computed in float32."""
    return list(torch._foreach_norm(list(gradients), dtype=torch.float32)) if gradients else []


def norms_of_parts(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient of a training step; for FSDP2's DTensors, over the shards of all ranks."""
    norms = norms_of(list(map(to_local, gradients)))
    cut = [place for place, gradient in enumerate(gradients) if is_dtensor(gradient)]
    if cut:
        like: Any = gradients[cut[0]]  # FSDP2 shards all gradients over the same mesh
        mesh = like.device_mesh
        # The norms may be in the host's memory, and are moved to the device that can communicate. They are squared in
        # float64, since squares of large norms overflow in float32.
        squares = torch.stack([norms[place] for place in cut]).to(mesh.device_type, torch.float64).square_()
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=mesh.get_group(dimension))
        for place, norm in zip(cut, squares.sqrt_().float().unbind(), strict=True):
            norms[place] = norm
    return norms


class _Step(NamedTuple):
    """A finished training step whose metrics may still be on their way from the GPU to the host."""

    number: int  # the number of finished steps, including this one
    figures: Tensor
    ready: torch.cuda.Event | None
    norms: Tensor
    batch: Batch


class SkippedSteps:
    """Counts the training steps that the guard skipped, records their batches, and stops the run if there are too many.

    On a GPU it reads the verdict on a step one step later, so that the host does not wait for the step itself. All
    ranks call the same methods in the same order, and get the same verdicts.

    Args:
        guard: the guard that judges the steps.
        data: the training data of the run, which can name the pairs of a batch.
        progress: the counts of steps, which are kept in checkpoints.
        most: the number of skipped steps in a row that ends the run.
        folder: folder of the run.
        world: the processes.
    """

    def __init__(
        self, guard: Guard, data: "TrainingData", progress: "Progress", most: int, folder: "RunFolder", world: World
    ) -> None:
        self.guard, self.data, self.progress, self.most = guard, data, progress, most
        self.folder, self.world = folder, world
        self._pending: collections.deque[_Step] = collections.deque()

    def __call__(self, batch: Batch) -> None:
        """Take note of the training step that was just finished on ``batch``, and count known skipped steps.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        figures, norms, ready = self.guard.figures, self.guard.norms, None
        if figures.is_cuda:
            figures, norms = figures.to("cpu", non_blocking=True), norms.clone()
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Step(self.progress.step, figures, ready, norms, batch))
        self.settle(late=0 if ready is None else 1)

    def settle(self, late: int = 0) -> None:
        """Count the skipped steps among all finished training steps except the last ``late``, waiting for the GPU.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        while len(self._pending) > late:
            step = self._pending.popleft()
            if step.ready is not None:
                step.ready.synchronize()
            figures = Figures(*step.figures.tolist())
            if not figures.skipped:
                self.progress.skipped_in_a_row = 0
                continue
            self.progress.skipped_steps += 1
            self.progress.skipped_in_a_row += 1
            self._record(step, figures)
            # The limit is checked only after a newly skipped step, so that a run that was stopped here can resume with
            # the same count.
            if self.progress.skipped_in_a_row >= self.most:
                self.world.on_main(self._stop)

    def _record(self, step: _Step, figures: Figures) -> None:
        """Collect the pairs of a skipped training step from all ranks, and let rank 0 record them."""
        with self.world.phase("names of a batch"):
            skipped = [sample.name for sample in step.batch.skipped]
            mine = {"loss": figures.loss, "keys": self.data.names(step.number - 1), "unusable": skipped}
        self.world.meet()  # waits longer than ``gather`` would, since some ranks may take long to look up the names
        ranks = self.world.gather(mine)
        self.world.on_main(lambda: self._write(step, figures, ranks))

    def _write(self, step: _Step, figures: Figures, ranks: Sequence[dict[str, Any]]) -> None:
        """Write why a training step was skipped, and its pairs, to ``nonfinite.jsonl`` and to the log."""
        finite = step.norms.isfinite().tolist()
        named = [name for name, is_finite in zip(self.guard.names, finite, strict=True) if not is_finite]
        lost = [str(rank) for rank, found in enumerate(ranks) if not math.isfinite(found["loss"])]
        line = {
            "step": step.number, "grad_norm": figures.grad_norm, "logit_scale": figures.logit_scale,
            "parameters": named[:NAMED], "more_parameters": len(named[NAMED:]), "ranks": ranks,
        }  # fmt: skip
        self.folder.record_nonfinite(_jsonable(line))
        what = f"the gradient's norm is {figures.grad_norm}, with {len(named)} parameter(s) not finite"
        what += f": {named[0]}" if named else ""
        if lost:
            what = f"the loss of rank(s) {', '.join(lost)} is not finite"
        path = self.folder.nonfinite_path
        log.warning(f"Step {step.number} changed nothing, since {what}; {path} says what is known of its batch")

    def _stop(self) -> None:
        """Stop training, as too many steps in a row were skipped."""
        raise TrainingError(
            f"the last {self.progress.skipped_in_a_row} steps changed nothing, since loss or gradient were not finite, "
            f"and --max-nonfinite-steps is {self.most}: {self.folder.nonfinite_path} lists their pairs; lower --lr, or "
            "set --grad-clip-norm"
        )


def _jsonable(value: Any) -> Any:
    """Return the record of a skipped step with strings in place of infinity and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _jsonable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
