"""The work on blocks of logits, as the losses call it, and the choice of what does it on a device.

Two modules answer to the protocol, each with functions of these names: ``triton_blocks`` launches the Triton kernels,
``cpu_blocks`` does the same in PyTorch. A block is the logits of features x [M, D] against features y [N, D]; a pair is
(i, i + offset), where both exist.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..launch import triton_runs_on
from . import cpu_blocks, triton_blocks
from .features import Features
from .softmax_stats import Normalizers, SoftmaxStats


class LogitBlocks(Protocol):
    """What the losses need of an implementation."""

    def prepare(self, x: Tensor, dtype: torch.dtype, *, normalize: bool) -> Features:
        """Return ``x`` [M, D] as the products take it, rounded to ``dtype``; with ``normalize``, as unit rows."""

    def new_accumulator(self, rows: int, like: Tensor) -> Tensor:
        """Return zeros [rows, D] that gradients are added to, for prepared features ``like`` [any, D]."""

    def strips(self, x: Tensor, y: Tensor) -> list[slice]:
        """Return the strips of the rows of x, whose logits are those with y, to accumulate and finish one after the
        other, so that accumulators stay small.
        """

    def statistics(self, x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
        """Return the statistics of the logits of x against y."""

    def pair_losses(self, stats: SoftmaxStats, offset: int, *, both: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of the pairs and what the gradient needs; see :func:`softmax_stats.pair_losses`."""

    def add_gradients(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, offset: int,
        acc_x: Tensor | None, acc_y: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Add G y to acc_x [M, D] and G^T x to acc_y [N, D], from one computation of G; one of the two may be None.

        Both are multiplied by a constant that :meth:`finish` takes out again.

        Returns:
            [any], numbers whose sum is that of G_ij x_i . y_j, if G is rounded to 16 bits for the products; they are
            taken before the rounding. None if G is not rounded, since :meth:`finish` then gives the sum as exactly.
        """

    def sigmoid_pairs(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Return what the sigmoid loss needs of the pairs, whose logits are l = logit_scale * x . y + logit_bias.

        Returns:
            one_minus_p = 1 / (1 + exp l) [M], 0 in a row without a pair; and [3, any], numbers whose sums are those of
            log(1 + exp -l), -one_minus_p and -one_minus_p x . y.
        """

    def sigmoid_losses(self, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
        """Return [any], numbers whose sum is that of log(1 + exp l) over all but the pairs."""

    def add_sigmoid_gradients(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, acc_x: Tensor, acc_y: Tensor
    ) -> Tensor:
        """Do as :meth:`add_gradients` does, with G of the sigmoid loss.

        Returns:
            [3, any], numbers whose sums are those of log(1 + exp l), G_ij and G_ij x_i . y_j over all but the pairs.
            They are taken before G is rounded.
        """

    def finish(
        self, acc: Tensor, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor
    ) -> Tensor:
        """Write the gradient of features: factor * (acc - one_minus_p * positive), through the normalisation if any.

        Args:
            acc: [R, D], G times the features of the other side, of :meth:`new_accumulator`; its values are lost.
            own: the R rows whose gradient it is.
            other, offset: [C, D], features of the other side; the positive of row i is row i + offset, if there is one.
            one_minus_p: [R], one minus the probability of the positive, summed over the directions of the loss; not
                used in a row without a positive.
            factor: [], gradient of the loss times scale.
            out: [R, D], contiguous, in any dtype; the gradient is written here.

        Returns:
            [R], the product of each row's gradient and features, before factor and normalisation; if G is rounded, only
            what the positives contribute to that: -one_minus_p * positive . features. Either way, these numbers and
            those that :meth:`add_gradients` returns add up to the gradient of the scale, before its coefficient.
        """


def logit_blocks(device: torch.device) -> LogitBlocks:
    """Return the implementation that works on tensors of ``device``."""
    if triton_runs_on(device):
        return triton_blocks
    return cpu_blocks
