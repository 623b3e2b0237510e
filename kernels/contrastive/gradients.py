"""What the backward passes of the losses share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .features import Features, pair_products
from .logit_blocks import LogitBlocks


def new_gradients(*features: Tensor) -> list[Tensor]:
    """Return uninitialised gradients, contiguous, with shape and dtype of the features."""
    return [torch.empty_like(side, memory_format=torch.contiguous_format) for side in features]


def gradients_in_strips(
    blocks: LogitBlocks, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor,
    add: Callable[[slice, Tensor], list[Tensor | None]],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Accumulate and finish the gradient of features strip by strip, so that only a strip is held in float32.

    ``add(strip, acc)`` adds G times features to the accumulator ``acc`` of the rows ``strip``, and returns what each
    call of :meth:`LogitBlocks.add_gradients` has returned. The other arguments are those of :meth:`LogitBlocks.finish`.

    Returns:
        The products [M] of gradients and features that ``finish`` returns, and everything that ``add`` has returned.
    """
    dot = one_minus_p.new_empty(len(one_minus_p))
    scale_sums = []
    for strip in blocks.strips(own.rows):
        acc = blocks.new_accumulator(strip.stop - strip.start, own.rows)
        scale_sums += add(strip, acc)
        dot[strip] = blocks.finish(
            acc, own.part(strip), other, offset + strip.start, one_minus_p[strip], factor, out[strip]
        )
    return dot, scale_sums


def scale_gradient(
    dot: Tensor, scale_sums: Sequence[Tensor | None], one_minus_p: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Return the sum of G_ij x_i . y_j over all but the pairs, minus that of one_minus_p_i x_i . y_i over the pairs.

    Args:
        dot: products of the finished rows and their gradients, any shape. Their sum is the result, but it contains the
            rounding error of G where G is rounded.
        scale_sums: what ``add_gradients`` has returned for each block: its part of the first sum, from G before it was
            rounded, or None where G is not rounded.
        one_minus_p: [P], of the pairs, whose features are x [P, D] and y [P, D].

    Returns:
        [], in the dtype of ``dot``.
    """
    before_rounding = [part for part in scale_sums if part is not None]
    if len(before_rounding) < len(scale_sums):
        return dot.sum()
    of_pairs = (one_minus_p * pair_products(x, y)).sum(dtype=torch.float64)
    return sum(before_rounding, -of_pairs).to(dot.dtype)
