"""The host side of the launches of attention pooling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import LOG2E, new_tensors, next_power_of_2
from ..configs import row_config
from ..launch import arch_of, plan_start
from .kernels import _pool_bwd_kernel, _pool_fwd_kernel

MAX_TILE = 16384  # the most elements of a tile [tokens, columns]


def forward(
    query: Tensor, tokens: Tensor, seqlens: Tensor | None, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan the launch of attention pooling for tensors with the memory layout of ``query`` and ``tokens``.

    The tokens are [B, N, C]. With ``max_seqlen`` they are those of packed sequences, [1, T, C], and ``seqlens`` are the
    cumulative lengths [B + 1].

    Returns:
        The function that computes the pooled tokens [B, H, C], contiguous, and the log-sum-exp [B, H] of the scores in
        base 2, float32.
    """
    batch, heads, width = query.shape
    total = tokens.shape[1]
    most = total if max_seqlen is None else max_seqlen
    start = plan_start(
        _pool_fwd_kernel, (batch,), heads, most, total, width, *query.stride(), *tokens.stride(), LOG2E,
        **_constexprs(query, most, seqlens, max_seqlen),
    )  # fmt: skip
    new_out, new_lse = new_tensors(query), new_tensors(query, (batch, heads), torch.float32)

    def compute(query: Tensor, tokens: Tensor, seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Compute attention pooling by the kernel, for tensors of the planned layout."""
        out, lse = new_out(), new_lse()
        start(query, tokens, out, lse, seqlens)
        return out, lse

    return compute


def backward(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan the launch that computes the gradients of attention pooling, for tensors as in :func:`forward`.

    Returns:
        The function that computes the gradients of the queries and of the tokens, contiguous.
    """
    batch, heads, width = query.shape
    total = tokens.shape[1]
    most = total if max_seqlen is None else max_seqlen
    start = plan_start(
        _pool_bwd_kernel, (batch,), heads, most, total, width,
        *grad_out.stride(), *query.stride(), *tokens.stride(), LOG2E,
        **_constexprs(query, most, seqlens, max_seqlen),
    )  # fmt: skip
    new_dq, new_dx = new_tensors(query), new_tensors(tokens)

    def compute(
        grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of attention pooling, for tensors of the planned layout."""
        dq, dx = new_dq(), new_dx()
        if batch == 0:  # without sequences no program runs, and none writes the zeros of packed tokens
            dx.zero_()
        start(grad_out, query, tokens, lse, dq, dx, seqlens)
        return dq, dx

    return compute


def _constexprs(query: Tensor, most: int, seqlens: Tensor | None, max_seqlen: int | None) -> dict[str, Any]:
    """Return configuration, device and compile-time constants of both pooling kernels.

    A tile holds all queries, ``most`` tokens and some columns.
    """
    cfg = row_config("attention_pool", arch_of(query.device), query.dtype)
    block_h, block_n = (max(16, next_power_of_2(n)) for n in (query.shape[1], most))
    is_packed = max_seqlen is not None
    return {
        "config": cfg, "device": query.device, "IS_PACKED": is_packed,
        "HAS_SEQLENS": seqlens is not None and not is_packed,
        # The kernels loop over columns, and ``block_n`` of the RowConfig is the number of columns in a step.
        "BLOCK_H": block_h, "BLOCK_N": block_n, "BLOCK_K": min(cfg.block_n, MAX_TILE // block_n),
    }  # fmt: skip
