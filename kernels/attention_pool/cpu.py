"""Attention pooling on a CPU, in plain PyTorch: the same functions as in ``launches``.

Products are in float32 or wider, as in the kernels. The backward pass computes the weights again from the scores, so
zeros stand in for the log-sum-exp here. Packed sequences of the same length that lie side by side are computed as one
batch, without a copy.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from ..packing import runs_of

# This calls PyTorch's op without its Python wrapper, which would take the host longer.
_softmax_backward: Any = torch.ops.aten._softmax_backward_data.default._op


def forward(
    query: Tensor, tokens: Tensor, seqlens: Tensor | None, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the pooled tokens [B, H, C], and zeros [B, H] in place of the log-sum-exp."""
    dtype = accumulate_dtype(query.dtype)

    def compute(query: Tensor, tokens: Tensor, seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Compute attention pooling on the CPU."""
        q, x, hidden = _operands(query, tokens, seqlens, dtype)
        out = torch.bmm(_weights(q, x.mT, hidden), x)
        return out if out.dtype is query.dtype else out.to(query.dtype), query.new_zeros(query.shape[:2], dtype=dtype)

    def compute_packed(query: Tensor, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        """Compute attention pooling of packed tokens on the CPU."""
        q, x = query.to(dtype), tokens.to(dtype)
        out = q.new_zeros(q.shape)
        for run in runs_of("attention_pool", cu_seqlens, tokens.shape[1], max_seqlen):
            of_run = x[0, run.tokens].view(*run.shape, -1)
            p = torch.softmax(torch.bmm(q[run.sequences], of_run.mT), -1)
            torch.bmm(p, of_run, out=out[run.sequences])
        return out.to(query.dtype), out.new_zeros(out.shape[:2])

    return compute if max_seqlen is None else compute_packed


def backward(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the gradients of the queries [B, H, C] and of the tokens."""
    dtype = accumulate_dtype(query.dtype)

    def compute(
        grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of attention pooling on the CPU."""
        q, x, hidden = _operands(query, tokens, seqlens, dtype)
        do, x_t = grad_out if grad_out.dtype is dtype else grad_out.to(dtype), x.mT
        p = _weights(q, x_t, hidden)
        ds = _softmax_backward(torch.bmm(do, x_t), p, -1, dtype)
        dq, dx = torch.bmm(ds, x), torch.bmm(p.mT, do).baddbmm_(ds.mT, q)
        return (dq, dx) if query.dtype is dtype else (dq.to(query.dtype), dx.to(query.dtype))

    def compute_packed(
        grad_out: Tensor, query: Tensor, tokens: Tensor, cu_seqlens: Tensor, lse: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of attention pooling of packed tokens on the CPU."""
        do, q, x = grad_out.to(dtype), query.to(dtype), tokens.to(dtype)
        dq, dx = q.new_zeros(q.shape), x.new_zeros(x.shape)
        for run in runs_of("attention_pool", cu_seqlens, tokens.shape[1], max_seqlen):
            at, shape = run.sequences, (*run.shape, -1)
            of_do, of_q, of_x, of_dx = do[at], q[at], x[0, run.tokens].view(shape), dx[0, run.tokens].view(shape)
            p = torch.softmax(torch.bmm(of_q, of_x.mT), -1)
            ds = _softmax_backward(torch.bmm(of_do, of_x.mT), p, -1, dtype)
            torch.bmm(ds, of_x, out=dq[at])
            torch.bmm(p.mT, of_do, out=of_dx).baddbmm_(ds.mT, of_q)
        return dq.to(query.dtype), dx.to(query.dtype)

    return compute if max_seqlen is None else compute_packed


def _operands(
    query: Tensor, tokens: Tensor, seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return queries and tokens in ``dtype``, with zeros at the hidden tokens, and the mask [B, 1, N] that is True for
    a hidden token.

    A hidden token may hold NaN, and NaN times a weight of zero is NaN.
    """
    if query.dtype is not dtype:
        query, tokens = query.to(dtype), tokens.to(dtype)
    if seqlens is None:
        return query, tokens, None
    hidden = torch.arange(tokens.shape[1], device=tokens.device) >= seqlens[:, None]
    return query, tokens.masked_fill(hidden[..., None], 0), hidden[:, None]


def _weights(q: Tensor, x_t: Tensor, hidden: Tensor | None) -> Tensor:
    """Return the weights [B, H, N] of the tokens; zeros where all tokens are hidden."""
    scores = torch.bmm(q, x_t)
    if hidden is None:
        return torch.softmax(scores, -1)
    # The softmax over no tokens is NaN, and weights of zero take its place.
    return torch.softmax(scores.masked_fill_(hidden, float("-inf")), -1).masked_fill_(hidden, 0)
