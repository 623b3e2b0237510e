"""The host side of the launches of attention pooling."""

from typing import Any

import torch
from torch import Tensor

from ..common import LOG2E, next_power_of_2
from ..configs import row_config
from ..launch import arch_of, launch
from .kernels import _pool_bwd_kernel, _pool_fwd_kernel

MAX_TILE = 16384  # the most elements of a tile of tokens


def forward(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the pooled tokens [B, H, C], contiguous, and the log-sum-exp [B, H] of the scores in base 2, float32."""
    (batch, heads, width), n = query.shape, tokens.shape[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    launch(
        _pool_fwd_kernel, (batch,), query, tokens, out, lse, seqlens, heads, n, width,
        *query.stride(), *tokens.stride(), LOG2E, **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries [B, H, C] and of the tokens [B, N, C], contiguous."""
    (batch, heads, width), n = query.shape, tokens.shape[1]
    dq, dx = query.new_empty(query.shape), tokens.new_empty(tokens.shape)
    launch(
        _pool_bwd_kernel, (batch,), grad_out, query, tokens, lse, dq, dx, seqlens, heads, n, width,
        *grad_out.stride(), *query.stride(), *tokens.stride(), LOG2E, **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    return dq, dx


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
