"""The attention classes of timm on our attention.

Each function computes what the ``forward`` of its class does, and has its arguments. A call with a mask, or with
dropout of weights, runs the class's own ``forward``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from .attention_parts import KIND, drops, heads_attention, normed_attention, project_qkv, too_wide
from .places import Proposal, computes, is_plain


def _propose_plain(module: Any) -> Proposal:
    return too_wide(module.head_dim) or Proposal(KIND, "clipfast.attention", timm_attention)


def _propose_rope(module: Any) -> Proposal:
    return too_wide(module.head_dim) or Proposal(KIND, "clipfast.attention_qkv", rope_attention)


def _propose_latent(module: Any) -> Proposal:
    if module.latent_len != 1 or module.num_heads > MAX_HEADS:
        return Proposal(KIND, f"it pools with {module.latent_len} queries and {module.num_heads} heads")
    if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
        return Proposal(KIND, "it normalises its keys, so that all tokens must be projected")
    return Proposal(KIND, "clipfast.attention_pool", latent_pool)


PROPOSALS_OF_TIMM = {
    "timm.layers.attention.Attention": _propose_plain,
    "timm.models.vision_transformer.Attention": _propose_plain,  # where it was until timm 1.0.16
    "timm.layers.attention.AttentionRope": _propose_rope,
    "timm.models.eva.EvaAttention": _propose_rope,
    "timm.layers.attention_pool.AttentionPoolLatent": _propose_latent,
}


def timm_attention(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute ``timm.layers.Attention``: [B, N, C] -> [B, N, dim_out]."""
    if attn_mask is not None or drops(module, module.attn_drop.p) or x.ndim != 3 or not computes(x):
        options: dict[str, Any] = {"is_causal": True} if is_causal else {}  # older versions do not have it
        return type(module).forward(module, x, attn_mask=attn_mask, **options)
    scale = None if module.fused_attn else float(module.scale)
    gate = getattr(module, "gate", None)
    is_normed = not (is_plain(module.q_norm, nn.Identity) and is_plain(module.k_norm, nn.Identity))
    if is_normed:
        out = normed_attention(module.qkv(x), module.num_heads, module.q_norm, module.k_norm, scale, is_causal)
    else:
        if is_plain(module.qkv, nn.Linear):
            qkv, bias = project_qkv(x, module.qkv.weight, module.qkv.bias)
        else:
            qkv, bias = module.qkv(x), None
        out = attention(qkv, module.num_heads, causal=is_causal, scale=scale, bias=bias)
    out = module.norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def rope_attention(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Compute ``timm.layers.AttentionRope`` or timm's ``EvaAttention``: [B, N, C] -> [B, N, C]."""
    if attn_mask is not None or drops(module, module.attn_drop.p) or x.ndim != 3 or not computes(x):
        options: dict[str, Any] = {"is_causal": True} if is_causal else {}  # older versions do not have it
        return type(module).forward(module, x, rope=rope, attn_mask=attn_mask, **options)
    q, k, v = _projected_heads(module, x)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        q, k = (_rotated(module, t, rope).to(v.dtype) for t in (q, k))
    groups = getattr(module, "num_kv_groups", 1)
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    out = module.norm(heads_attention(q, k, v, None if module.fused_attn else float(module.scale), is_causal))
    gate = getattr(module, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def _projected_heads(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, heads, N, head_dim], of one linear layer or of three."""
    if module.qkv is None:
        q, k, v = (
            layer(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        return q, k, v
    q_bias = getattr(module, "q_bias", None)
    if q_bias is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat([q_bias, module.k_bias, module.v_bias])
        # Without qkv_bias_separate, timm reads the weight of this layer and never calls it, whatever hook it has.
        qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotated(module: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Rotate every token by its position but those in front, such as the class token: [B, heads, N, head_dim]."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    options = {"half": True} if getattr(module, "rotate_half", False) else {}
    prefix = module.num_prefix_tokens
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def latent_pool(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Compute ``timm.layers.AttentionPoolLatent`` with one query: [B, N, C] -> [B, out_features].

    The projections of keys and values act on the query and on what it pools, and no token is projected.
    """
    norms = (module.q_norm, module.k_norm)
    is_known = is_plain(module.kv, nn.Linear) and all(is_plain(norm, nn.Identity) for norm in norms)
    if attn_mask is not None or not is_known or x.shape[1] > MAX_TOKENS or not computes(x):
        options = {} if attn_mask is None else {"attn_mask": attn_mask}  # older versions do not have it
        return type(module).forward(module, x, **options)
    if module.pos_embed is not None:
        x = x + module.pos_embed.unsqueeze(0).to(x.dtype)
    heads = (module.num_heads, -1)
    q = module.q(module.latent.expand(len(x), -1, -1))[:, 0].unflatten(-1, heads)
    weight_k, weight_v = module.kv.weight.unflatten(0, (2, *heads)).unbind(0)
    bias_k, bias_v = (None, None) if module.kv.bias is None else module.kv.bias.chunk(2)
    out = single_query_attention(q, x, weight_k, weight_v, None, "auto", bias_k, bias_v)
    out = module.proj_drop(module.proj(out[:, None]))
    if module.mlp is not None:
        out = out + module.mlp(module.norm(out))
    return out[:, 0] if module.pool in ("token", "avg") else out
