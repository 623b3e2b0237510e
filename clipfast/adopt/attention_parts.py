"""Functions that the attention classes of all libraries share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_qkv
from ..kernels.attention.op import MAX_HEAD_DIM
from .places import Proposal

KIND = "attention"


def too_wide(head_dim: int) -> Proposal | None:
    """Return a refusal of heads that our attention cannot compute, or None."""
    if head_dim <= MAX_HEAD_DIM:
        return None
    return Proposal(KIND, f"heads have {head_dim} dimensions, and at most {MAX_HEAD_DIM} can be computed")


def drops(module: nn.Module, probability: float) -> bool:
    """Return True if attention drops weights now."""
    return module.training and probability > 0


def project_qkv(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the packed projection, and the bias of which attention is to compute the gradient."""
    return F.linear(x, weight, None if bias is None else bias.detach()), bias


def project_apart(module: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, H, M, D] of ``x``, and keys and values [B, H, N, D] of ``context``.

    The weights of ``module`` have the names of ``nn.MultiheadAttention``: one tensor, or one each where widths differ.
    """
    width, heads = x.shape[-1], (module.num_heads, -1)
    if module.in_proj_weight is not None:
        weight_q, weight_kv = module.in_proj_weight.split([width, 2 * width])
    else:
        weight_q, weight_kv = module.q_proj_weight, torch.cat([module.k_proj_weight, module.v_proj_weight])
    bias_q, bias_kv = (None, None) if module.in_proj_bias is None else module.in_proj_bias.split([width, 2 * width])
    q = F.linear(x, weight_q, bias_q).unflatten(-1, heads).transpose(1, 2)
    k, v = F.linear(context, weight_kv, bias_kv).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def normed_attention(
    qkv: Tensor, num_heads: int, q_norm: nn.Module, k_norm: nn.Module, scale: float | None, is_causal: bool
) -> Tensor:
    """Compute attention whose queries and keys are normalised in each head: [B, N, 3 H D] -> [B, N, H D]."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
    return heads_attention(q_norm(q), k_norm(k), v, scale, is_causal)


def heads_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> Tensor:
    """Compute attention of [B, H, M, D] on [B, H, N, D]: [B, M, H D]."""
    # Under autocast, norms of queries and keys may have float32 where the values have 16 bits.
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    return attention_qkv(q, k, v, causal=is_causal, scale=scale).flatten(2)
