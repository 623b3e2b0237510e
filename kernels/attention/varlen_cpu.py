"""Attention of packed sequences on a CPU, with the arguments and results of ``varlen_launches``.

Sequences of the same length that lie side by side are a batch for PyTorch's flash kernel: views of the packed tokens,
of which nothing is copied. So texts that are packed in the order of their lengths take one call for each length.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..packing import Run, runs
from . import cpu


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [1, T, H, D], contiguous, and the log-sum-exp [1, H, T] of the scaled scores."""
    out = q.new_zeros(q.shape)
    lse = q.new_full((1, *q.shape[2:0:-1]), float("inf"), dtype=accumulate_dtype(q.dtype))
    for run in _runs(bounds):
        of_q, of_k, of_v = map(run.of, (q, k, v))
        results = cpu.forward(of_q, of_k, of_v, None, causal, scale)
        run.of(out).copy_(results[0])
        run.of(lse.transpose(1, 2)).copy_(results[1].transpose(1, 2))
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``, and return the same gradient as ``cpu.backward``."""
    for grad in grads:
        grad.zero_()
    for run in _runs(bounds):
        of_grad, of_q, of_k, of_v, of_out = map(run.of, (grad_out, q, k, v, out))
        dq, dk, dv = map(run.of, grads)
        of_lse = run.of(lse.transpose(1, 2)).transpose(1, 2).contiguous()
        cpu.backward(of_grad, of_q, of_k, of_v, of_out, of_lse, None, causal, scale, (dq, dk, dv))
    if not with_sums:
        return None
    of_q, of_v = (grad.flatten(2).sum((0, 1), dtype=accumulate_dtype(grad.dtype)) for grad in grads[::2])
    return torch.stack([of_q, torch.zeros_like(of_q), of_v])


def _runs(bounds: Tensor) -> Iterator[Run]:
    """Return the runs of sequences of the same length, from the bounds of tokens."""
    first = bounds[0]
    starts, lengths = torch.unique_consecutive(first, return_counts=True)
    if len(starts) and starts[-1] == len(first):  # the tokens that belong to no sequence
        lengths = lengths[:-1]
    return runs(lengths)
