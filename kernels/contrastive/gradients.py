"""What the backward passes of the losses share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .features import Features
from .logit_blocks import LogitBlocks


def new_gradient(features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised gradient, contiguous, with the shape of the features, in their dtype or in ``dtype``.

    What is not written before the last block of G should not be made before: it can then have the memory of G.
    """
    return torch.empty_like(features, dtype=dtype, memory_format=torch.contiguous_format)


def gradients_in_strips(
    blocks: LogitBlocks, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor,
    add: Callable[[slice, Tensor], list[Tensor | None]],
) -> list[Tensor | None]:  # fmt: skip
    """Accumulate and finish the gradient of features strip by strip, so that only a strip is held in float32.

    ``add(strip, acc)`` adds G times features to the accumulator ``acc`` of the rows ``strip``, and returns what each
    call of :meth:`LogitBlocks.add_gradients` has returned. The other arguments are those of :meth:`LogitBlocks.finish`.

    Returns:
        What :func:`scale_gradient` takes: what ``finish`` and ``add`` have returned.
    """
    parts = []
    for strip in blocks.strips(own.rows, other):
        acc = blocks.new_accumulator(strip.stop - strip.start, own.rows)
        parts += add(strip, acc)
        parts.append(
            blocks.finish(acc, own.part(strip), other, offset + strip.start, one_minus_p[strip], factor, out[strip])
        )
    return parts


def scale_gradient(parts: Sequence[Tensor | None], coefficient: Tensor) -> Tensor:
    """Return the gradient of the scale: ``coefficient`` times the sum of all numbers in ``parts``, added in float64.

    Args:
        parts: what :meth:`LogitBlocks.finish` returns for the rows, and what :meth:`LogitBlocks.add_gradients` returns
            for each block.
        coefficient: [], the gradient of the loss divided by the number of terms in its mean.
    """
    numbers = [part for part in parts if part is not None]
    if not numbers:
        return torch.zeros_like(coefficient)
    return torch.cat(numbers).sum(dtype=torch.float64).to(coefficient.dtype) * coefficient
