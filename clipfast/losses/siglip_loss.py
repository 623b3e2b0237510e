"""OpenCLIP's ``SigLipLoss`` on :func:`clipfast.kernels.sigmoid_loss`, which never holds the N x N logits."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ..kernels import sigmoid_loss
from ..kernels.contrastive.exchange import Ranks
from .clip_loss import RankLoss, logits_of

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(RankLoss):
    """The sigmoid loss (Zhai et al. 2023), in one process or in several, each with a part of the batch.

    Each process computes the loss of its images with all texts, divided by the number of its images. As in OpenCLIP,
    the gradients of the texts are summed over processes; data parallelism then averages the gradients of parameters.
    All processes must hold the same number of pairs.

    Args:
        cache_labels: accepted because OpenCLIP has it; it changes nothing.
        rank, world_size: as for :class:`RankLoss`.
        dist_impl: how texts reach the other processes. "bidir" (the default) and "shift" pass them around a ring, in
            both directions or in one, and compute the loss with the texts of one process at a time. "gather" and
            "reduce" gather all texts first and compute the loss in one call; the result equals OpenCLIP's.
        chunk_size: accepted because OpenCLIP's main branch has it, for the number of rows of logits in memory at once.
            It changes nothing, since the blocks of the kernels are smaller.

    Raises:
        ValueError: if ``dist_impl`` is unknown or ``rank`` is not below a ``world_size`` of several.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__(rank, world_size, cache_labels=cache_labels)
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {', '.join(DIST_IMPLS)}, got {dist_impl!r}")
        if world_size > 1 and not 0 <= rank < world_size:
            raise ValueError(f"SigLipLoss: rank must be in [0, world_size), got {rank} of {world_size}")
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Return the labels of the sigmoid loss [num_logits, num_logits]: -1, and 1 for pairs unless negative_only."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Return the logits [N, M] of the sigmoid loss."""
        return logits_of(image_features, text_features, logit_scale, logit_bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Compute the sigmoid loss of images and one rank's texts, [N, D] each; ``negative_only``: no row is a pair.

        Its name and arguments are those of OpenCLIP, since subclasses of OpenCLIP's loss and tests call it.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        # Image i and text i + offset are a pair, so with an offset past the last text there are no pairs. The offset is
        # at least 1, since an offset of 0 means that all rows are pairs.
        offset = max(len(text_features), 1) if negative_only else 0
        return sigmoid_loss(image_features, text_features, logit_scale, bias, offset=offset)

    def _of_rank(self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
        """Return the sigmoid loss of this rank's images and the texts of all ranks."""
        if self.world_size > 1 and self.dist_impl in ("reduce", "gather"):
            texts = all_gather(text.contiguous())
            ordered = torch.cat([*texts[: self.rank], *texts[self.rank + 1 :], texts[self.rank]])
            bias = 0.0 if bias is None else bias
            return sigmoid_loss(image, ordered, scale, bias, offset=len(ordered) - len(text))
        loss = self._loss(image, text, scale, bias)
        if self.world_size > 1:
            for others in self._texts_of_others(text):
                loss = loss + self._loss(image, others, scale, bias, negative_only=True)
        return loss

    def _texts_of_others(self, text: Tensor) -> Iterator[Tensor]:
        """Yield the text features of each other rank for the sigmoid loss once, as they arrive through the ring."""
        ranks = Ranks(None, self.rank, (len(text),) * self.world_size)
        others = self.world_size - 1
        steps = (1, -1) if self.dist_impl == "bidir" else (1,)
        passed: tuple[Tensor, ...] = (text,) * len(steps)
        for _ in range(others // len(steps)):
            passed = _exchange(ranks, steps, *passed)
            yield from passed
        if others % len(steps):  # With an odd number of others, the last texts would arrive from both directions.
            yield from _exchange(ranks, steps[:1], passed[0])


def _exchange(ranks: Ranks, steps: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchange features between ranks for the sigmoid loss."""
    received: tuple[Tensor, ...] = _Exchange.apply(ranks, steps, *tensors)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    """Send each tensor around the ring of ranks by a number of ``steps``; its gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, steps: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send features to other ranks, and receive theirs, for the sigmoid loss."""
        ctx.ranks, ctx.steps = ranks, steps
        received = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
        # Both directions transfer at the same time, since their operations are one batch.
        operations = [
            operation
            for step, sent, place in zip(steps, tensors, received, strict=True)
            for operation in ranks.operations(sent.contiguous(), place, step)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Send the gradients of exchanged features back to their ranks, for the sigmoid loss."""
        return None, None, *_exchange(ctx.ranks, tuple(-step for step in ctx.steps), *gradients)
