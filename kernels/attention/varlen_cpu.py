"""Attention of packed sequences on a CPU, by functions with the arguments of those in ``varlen_launches``.

Neighbouring sequences of the same length are one batch for PyTorch's flash kernel: a view of the packed tokens, without
a copy. So texts that are packed in the order of their lengths take one call for each length.
"""

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..packing import Run, runs_of_bounds
from .cpu import flash, flash_backward, heads_first


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention's output [1, T, H, D], contiguous, and the log-sum-exp [1, H, T] of the scaled scores."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((1, *q.shape[2:0:-1]), dtype=accumulate_dtype(q.dtype))
    runs = runs_of_bounds(bounds)
    used = runs[-1].tokens.stop if runs else 0
    out[:, used:], lse[:, :, used:] = 0, float("inf")
    for *inputs, of_out, of_lse in _views(runs, *heads_first(q, k, v), out.transpose(1, 2), lse):
        results = flash(*inputs, 0.0, causal, scale=scale)
        of_out.copy_(results[0])
        of_lse.copy_(results[1])
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``; if ``with_sums``, return the gradient [3 * H * D] of a bias on
    the projection.
    """
    runs = runs_of_bounds(bounds)
    used = runs[-1].tokens.stop if runs else 0
    for grad in grads:
        grad[:, used:] = 0
    inputs = *heads_first(grad_out, q, k, v, out), lse
    targets = [grad.transpose(1, 2) for grad in grads]
    for *of_inputs, of_lse, dq, dk, dv in _views(runs, *inputs, *targets):
        results = flash_backward(*of_inputs, of_lse.contiguous(), 0.0, causal, scale=scale)
        dq.copy_(results[0])
        dk.copy_(results[1])
        dv.copy_(results[2])
    if not with_sums:
        return None
    of_q, of_v = [grad.flatten(2).sum((0, 1), dtype=accumulate_dtype(q.dtype)) for grad in grads[::2]]
    return torch.cat([of_q, torch.zeros_like(of_q), of_v])


def _views(runs: list[Run], *tensors: Tensor) -> list[list[Tensor]]:
    """Return views [count, H, length, ...] of ``tensors`` [1, H, T, ...] for each run of sequences of one length."""
    sizes = [run.tokens.stop - run.tokens.start for run in runs]
    used = sum(sizes)
    found: list[list[Tensor]] = [[] for _ in runs]
    for x in tensors:
        parts, heads, rest = x[0, :, :used].split_with_sizes(sizes, 1), x.shape[1], x.shape[3:]
        for views, part, run in zip(found, parts, runs, strict=True):
            views.append(part.view(heads, *run.shape, *rest).transpose(0, 1))
    return found
