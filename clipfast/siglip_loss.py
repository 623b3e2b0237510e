"""OpenCLIP's ``SigLipLoss`` on :func:`clipfast.kernels.sigmoid_loss`: the same names, the same values, no N x N."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from .kernels import sigmoid_loss
from .kernels.contrastive.exchange import Ranks, check_ranks

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """The sigmoid loss of Zhai et al. 2023, of one process or of several that each hold a part of the batch.

    Each process computes the loss of its images with all texts, divided by the number of its images. Gradients of the
    texts are sums over processes, as OpenCLIP's are; parameters are averaged by the data parallelism around the loss.
    All processes must hold equally many pairs.

    Args:
        cache_labels: accepted for OpenCLIP's sake; there are no labels to keep.
        rank: number of this process in the default group.
        world_size: how many processes there are.
        dist_impl: how texts get to the other processes. "bidir" (for None) and "shift" pass them on to the neighbours,
            in both directions or one, and meet them one process at a time. "gather" collects all texts first and takes
            the loss in one call. "reduce" has OpenCLIP's result, and does as "gather".

    Raises:
        ValueError: an unknown ``dist_impl``, or a rank that is not among the processes.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {', '.join(DIST_IMPLS)}, got {dist_impl!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"SigLipLoss: rank must be in [0, world_size), got {rank} of {world_size}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Labels [num_logits, num_logits]: 1 for pairs, -1 for all others."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The logits [N, M] that the loss itself never makes."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this process, a scalar, or with ``output_dict`` that under the name "contrastive_loss".

        Args:
            image_features: [N, D], normalised.
            text_features: [N, D], normalised; see :func:`clipfast.kernels.sigmoid_loss` for dtypes, which errors come
                from as well.
            logit_scale: factor on the cosine similarities, already exponentiated.
            logit_bias: what is added to every logit; None adds nothing.
            output_dict: see above.

        Raises:
            ValueError: another rank, or another number of processes, than this process's.
            RuntimeError: several processes, but ``torch.distributed`` is not initialised.
        """
        if self.world_size > 1:
            check_ranks("SigLipLoss", self.rank, self.world_size)
        parameters = logit_scale, 0.0 if logit_bias is None else logit_bias
        num_pairs = len(text_features)
        if self.world_size > 1 and self.dist_impl in ("reduce", "gather"):
            texts = all_gather(text_features.contiguous())
            ordered = torch.cat([*texts[: self.rank], *texts[self.rank + 1 :], texts[self.rank]])
            loss = sigmoid_loss(image_features, ordered, *parameters, offset=len(ordered) - num_pairs)
        else:
            loss = sigmoid_loss(image_features, text_features, *parameters)
            if self.world_size > 1:
                for texts in self._of_others(text_features):
                    loss = loss + sigmoid_loss(image_features, texts, *parameters, offset=num_pairs)
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_others(self, text_features: Tensor) -> Iterator[Tensor]:
        """Texts of each other process, once."""
        ranks = Ranks(None, self.rank, (len(text_features),) * self.world_size)
        others = self.world_size - 1
        steps = (1, -1) if self.dist_impl == "bidir" else (1,)
        passed: tuple[Tensor, ...] = (text_features,) * len(steps)
        for _ in range(others // len(steps)):
            passed = _exchange(ranks, steps, *passed)
            yield from passed
        if others % len(steps):  # in both directions, the last would come twice
            yield from _exchange(ranks, steps[:1], passed[0])


def _exchange(ranks: Ranks, steps: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    received: tuple[Tensor, ...] = _Exchange.apply(ranks, steps, *tensors)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    """Tensors go ``steps`` processes on, each its own way round the ring; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, steps: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.steps = ranks, steps
        received = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
        # both ways at once
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
        return None, None, *_exchange(ctx.ranks, tuple(-step for step in ctx.steps), *gradients)
