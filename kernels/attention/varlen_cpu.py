"""Attention of packed sequences on a CPU, with the arguments and results of ``varlen_launches``.

Sequences of the same length that lie side by side are a batch for PyTorch's flash kernel: views of the packed tokens,
of which nothing is copied. So texts that are packed in the order of their lengths take one call for each length.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from . import cpu


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output [1, T, H, D], contiguous, and the log-sum-exp [1, H, T] of the scaled scores."""
    out = q.new_zeros(q.shape)
    lse = q.new_full((1, *q.shape[2:0:-1]), float("inf"), dtype=accumulate_dtype(q.dtype))
    for tokens, count in _runs(bounds):
        of_q, of_k, of_v = (_run(x, tokens, count) for x in (q, k, v))
        results = cpu.forward(of_q, of_k, of_v, None, causal, scale)
        _run(out, tokens, count).copy_(results[0])
        _run(lse.transpose(1, 2), tokens, count).copy_(results[1].transpose(1, 2))
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``, and return the same gradient as ``cpu.backward``."""
    for grad in grads:
        grad.zero_()
    for tokens, count in _runs(bounds):
        of_grad, of_q, of_k, of_v, of_out = (_run(x, tokens, count) for x in (grad_out, q, k, v, out))
        dq, dk, dv = (_run(x, tokens, count) for x in grads)
        of_lse = _run(lse.transpose(1, 2), tokens, count).transpose(1, 2).contiguous()
        cpu.backward(of_grad, of_q, of_k, of_v, of_out, of_lse, None, causal, scale, (dq, dk, dv))
    if not with_sums:
        return None
    of_q, of_v = (grad.flatten(2).sum((0, 1), dtype=accumulate_dtype(grad.dtype)) for grad in grads[::2])
    return torch.stack([of_q, torch.zeros_like(of_q), of_v])


def _run(x: Tensor, tokens: slice, count: int) -> Tensor:
    """Return ``count`` sequences of the same length as a view [count, length, ...] of packed tokens [1, T, ...]."""
    return x[0, tokens].unflatten(0, (count, -1))


def _runs(bounds: Tensor) -> Iterator[tuple[slice, int]]:
    """Return the tokens of each run of sequences of the same length, and the number of these sequences."""
    first = bounds[0]
    starts, lengths = torch.unique_consecutive(first, return_counts=True)
    if len(starts) and starts[-1] == len(first):  # the tokens that belong to no sequence
        starts, lengths = starts[:-1], lengths[:-1]
    token = 0
    for length, count in zip(*(x.tolist() for x in torch.unique_consecutive(lengths, return_counts=True)), strict=True):
        yield slice(token, token + length * count), count
        token += length * count
