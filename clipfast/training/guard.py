"""What keeps a gradient that is not finite away from the weights, on all ranks or on none.

The verdict needs no message of its own between the ranks. A loss that is not finite makes its rank's gradients NaN, the
mean of the ranks' gradients carries that to all, and so all find the same norm and decide the same. The verdict stays
on the device, where fused Adam and AdamW take it. Other optimizers cannot, and for them the host waits for it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models import CLIP
from ..shards import is_cut, local, whole
from .optim import takes_verdict


class Figures(NamedTuple):
    """What a step found, as numbers of the host.

    Attributes:
        loss: of this rank's pairs.
        grad_norm: of the gradient of all ranks, before it is clipped.
        skipped: 1 if the step changed no weight, else 0.
        logit_scale: the factor of the cosines that the step began with.
    """

    loss: float
    grad_norm: float
    skipped: float
    logit_scale: float


class Guard:
    """Takes the step of an optimizer if the gradient is finite, and otherwise leaves everything as it was.

    That is the weights, the state of the optimizer, and the running statistics of BatchNorm.

    Args:
        model, optimizer: the optimizer's parameters are the model's.
        grad_clip_norm: largest norm of the gradient; None does not clip it.

    Attributes:
        waits: whether the host waits for each verdict.
        figures: those of the last step, as float32 on the device, in the order of :class:`Figures`. Each step writes to
            the same tensor, as a CUDA graph must.
        norms: the norm of the gradient of each of ``names``, likewise.
        names: of the parameters that are trained.
    """

    def __init__(self, model: CLIP, optimizer: torch.optim.Optimizer, grad_clip_norm: float | None) -> None:
        self.model, self.optimizer, self.grad_clip_norm = model, optimizer, grad_clip_norm
        # An optimizer on the host would not wait for a verdict that the GPU still has to copy.
        devices = {local(parameter).device for group in optimizer.param_groups for parameter in group["params"]}
        self.waits = not takes_verdict(optimizer) or devices != {model.logit_scale.device}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names, self._parameters = list(trained), list(trained.values())
        device = model.logit_scale.device
        self.figures = torch.zeros(len(Figures._fields), device=device)
        self.norms = torch.zeros(len(trained), device=device)
        normalisations = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for module in normalisations for buffer in module.buffers()]
        self._before = [buffer.clone() for buffer in self._statistics]

    @property
    def skipped(self) -> Tensor:
        """The verdict on the last step: 1 if it changed no weight, else 0; a scalar on the device."""
        return self.figures[Figures._fields.index("skipped")]

    def begin(self) -> None:
        """Remember what the forward pass changes."""
        for before, buffer in zip(self._before, self._statistics, strict=True):
            before.copy_(buffer)

    @torch.no_grad()
    def judge(self, loss: Tensor) -> None:
        """Compute the figures of a step from its loss and the gradients in ``.grad``, and clip these."""
        gradients = [parameter.grad for parameter in self._parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        norms = iter(gradient_norms(present))
        zero = self.norms.new_zeros(())
        torch.stack([zero if gradient is None else next(norms) for gradient in gradients], out=self.norms)
        norm = torch.linalg.vector_norm(self.norms)
        scale = self.model.logit_scale.detach().exp()
        found = (loss, norm, ~norm.isfinite(), whole(scale))
        torch.stack([value.float().reshape(()) for value in found], out=self.figures)
        if self.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip_norm, norm)

    @torch.no_grad()
    def step(self) -> None:
        """Take the step that was judged, or undo what its forward pass changed."""
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
    """A loss whose gradients are NaN if it is not finite itself, so that every rank finds out; else it is the same."""

    loss: Callable[..., Tensor]

    def __call__(self, *outputs: Any) -> Tensor:
        """Return the loss of a model's outputs."""
        value = self.loss(*outputs)
        if value.requires_grad:
            poison = 0 * value.detach()
            value.register_hook(lambda gradient: gradient + poison)
        return value


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient in float32; of one that is sharded over ranks, that of all its shards."""
    if not gradients:
        return []
    norms = list(torch._foreach_norm(list(map(local, gradients)), dtype=torch.float32))
    sharded = [place for place, gradient in enumerate(gradients) if is_cut(gradient)]
    if sharded:
        mesh: Any = gradients[sharded[0]].device_mesh  # type: ignore[attr-defined]
        # The shards may lie on the host, and the square of a large number is beyond float32.
        squares = torch.stack([norms[place] for place in sharded]).to(mesh.device_type, torch.float64).square_()
        for dimension in _sharding(gradients[sharded[0]]):
            dist.all_reduce(squares, group=mesh.get_group(dimension))
        for place, norm in zip(sharded, squares.sqrt_().float().unbind(), strict=True):
            norms[place] = norm
    return norms


def _sharding(gradient: Any) -> list[int]:
    """Return over which dimensions of its mesh a gradient is sharded; FSDP shards all gradients alike."""
    return [dimension for dimension, placement in enumerate(gradient.placements) if placement.is_shard()]
