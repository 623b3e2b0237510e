"""The host side of the launches of attention pooling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import LOG2E, new_tensors, next_power_of_2
from ..configs import row_config
from ..launch import arch_of, plan_start
from .kernels import _pool_bwd_kernel, _pool_fwd_kernel

MAX_TILE = 16384  # the most elements of a tile of tokens


def forward(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan attention pooling of a layout.

    Returns:
        The function that computes the pooled tokens [B, H, C], contiguous, and the log-sum-exp [B, H] of the scores in
        base 2, float32.
    """
    (batch, heads, width), n = query.shape, tokens.shape[1]
    start = plan_start(
        _pool_fwd_kernel, (batch,), heads, n, width, *query.stride(), *tokens.stride(), LOG2E,
        **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    new_out, new_lse = new_tensors(query), new_tensors(query, (batch, heads), torch.float32)

    def compute(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute attention pooling of tokens by a query, for tensors of a known layout."""
        out, lse = new_out(), new_lse()
        start(query, tokens, out, lse, seqlens)
        return out, lse

    return compute


def backward(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan the gradients of a layout.

    Returns:
        The function that computes the gradients of the queries [B, H, C] and of the tokens [B, N, C], contiguous.
    """
    (batch, heads, width), n = query.shape, tokens.shape[1]
    start = plan_start(
        _pool_bwd_kernel, (batch,), heads, n, width, *grad_out.stride(), *query.stride(), *tokens.stride(), LOG2E,
        **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    new_dq, new_dx = new_tensors(query), new_tensors(tokens)

    def compute(
        grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of attention pooling, for tensors of a known layout."""
        dq, dx = new_dq(), new_dx()
        start(grad_out, query, tokens, lse, dq, dx, seqlens)
        return dq, dx

    return compute


def _constexprs(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> dict[str, Any]:
    """Return the compile-time constants of both pooling kernels: a tile holds all queries, all tokens and some
    columns.
    """
    cfg = row_config("attention_pool", arch_of(query.device), query.dtype)
    block_h, block_n = (max(16, next_power_of_2(x.shape[1])) for x in (query, tokens))
    return {
        "config": cfg, "device": query.device, "HAS_SEQLENS": seqlens is not None,
        # The kernels loop over columns; a RowConfig has their number per step in block_n.
        "BLOCK_H": block_h, "BLOCK_N": block_n, "BLOCK_K": min(cfg.block_n, MAX_TILE // block_n),
    }  # fmt: skip
