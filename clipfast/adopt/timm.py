"""Replacements of attention, blocks and MLPs of timm, which call our kernels.

Each function computes the ``forward`` of its class, and has the same arguments. A call with a mask, or with attention
dropout, runs the class's own ``forward``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..kernels.packing import Packing
from ..models.layers import PackedTokens, is_plain, project_qkv, single_query_attention
from .parts import (
    ADDS,
    add_norm,
    drops,
    heads_attention,
    linear_gelu,
    propose_gelu,
    propose_heads,
    self_attention,
    split_heads,
)
from .places import Proposal, class_name, computes


def _propose_plain(module: Any) -> Proposal:
    """Propose a replacement for timm's attention."""
    return propose_heads(module.head_dim, "attention", timm_attention)


def _propose_rope(module: Any) -> Proposal:
    """Propose a replacement for timm's attention with rotary embeddings."""
    return propose_heads(module.head_dim, "attention_qkv", rope_attention)


def _propose_latent(module: Any) -> Proposal:
    """Propose a replacement for timm's attention pooling with a learned query, or say why there is none."""
    if module.latent_len != 1 or module.num_heads > MAX_HEADS:
        return Proposal("attention", f"it pools with {module.latent_len} queries and {module.num_heads} heads")
    if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
        return Proposal("attention", "it normalises its keys, so that all tokens must be projected")
    return Proposal("attention", "clipfast.attention_pool", latent_pool)


ATTENTIONS = {
    "timm.layers.attention.Attention": _propose_plain,
    # until 1.0.16, timm's attention was in timm.models.vision_transformer
    "timm.models.vision_transformer.Attention": _propose_plain,
    "timm.layers.attention.AttentionRope": _propose_rope,
    "timm.models.eva.EvaAttention": _propose_rope,
    "timm.layers.attention_pool.AttentionPoolLatent": _propose_latent,
    "timm.models.vision_transformer.ParallelScalingBlock": lambda _: Proposal(
        "attention", "its block projects for attention and perceptron at once"
    ),
}


def propose(module: Any, norms: bool) -> Iterator[Proposal]:
    """Propose replacements for a block of timm's vision transformer or for an MLP of timm."""
    name = class_name(module)
    if norms and name == "timm.models.vision_transformer.Block":
        yield Proposal("norms", ADDS, timm_block)
    elif name == "timm.layers.mlp.Mlp":
        yield propose_gelu(module.fc1, module.act, timm_mlp)
    elif name.startswith("timm.layers.mlp."):
        yield Proposal("activations", f"{type(module).__name__} is not one of the perceptrons that are known")


def timm_block(block: Any, x: Tensor, attn_mask: Tensor | Packing | None = None, is_causal: bool = False) -> Tensor:
    """Compute ``timm.models.vision_transformer.Block``: [B, N, C] -> [B, N, C].

    ``attn_mask`` may be the packing of images in place of a mask; then ``x`` [1, T, C] has their tokens.
    """
    branch = block.attn(block.norm1(x), attn_mask=attn_mask, **_hint(is_causal))
    x, normed = add_norm(x, block.drop_path1(block.ls1(branch)), block.norm2)
    return x + block.drop_path2(block.ls2(block.mlp(normed)))


def _hint(is_causal: bool) -> dict[str, bool]:
    """Return the argument that tells timm's attention that the mask is causal; older versions do not have it."""
    return {"is_causal": True} if is_causal else {}


def timm_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute ``timm.layers.Mlp``: [..., C] -> [..., out_features]."""
    x = module.drop1(linear_gelu(module.fc1, module.act, x))
    return module.drop2(module.fc2(module.norm(x)))


def timm_attention(
    module: Any, x: Tensor, attn_mask: Tensor | Packing | None = None, is_causal: bool = False
) -> Tensor:
    """Compute ``timm.layers.Attention``: [B, N, C] -> [B, N, dim_out]; ``attn_mask`` is as for :func:`timm_block`."""
    packing = attn_mask if isinstance(attn_mask, Packing) else None
    if attn_mask is not packing or drops(module, module.attn_drop.p) or x.ndim != 3 or not computes(x):
        return type(module).forward(module, x, attn_mask=attn_mask, **_hint(is_causal))
    if not is_plain(module.q_norm, nn.Identity) or not is_plain(module.k_norm, nn.Identity):
        q, k, v = split_heads(module.qkv(x), module.num_heads)
        out = heads_attention(module.q_norm(q), module.k_norm(k), v, is_causal, _scale(module))
        return _project(module, x, out)
    if is_plain(module.qkv, nn.Linear):
        qkv, bias = project_qkv(x, module.qkv.weight, module.qkv.bias)
    else:
        qkv, bias = module.qkv(x), None
    out = self_attention(qkv, module.num_heads, packing, bias, is_causal, _scale(module))
    return _project(module, x, out)


def _scale(module: Any) -> float | None:
    """Return the scale of timm's attention; None means PyTorch's own."""
    return None if module.fused_attn else float(module.scale)


def _project(module: Any, x: Tensor, out: Tensor) -> Tensor:
    """Return the output of timm's attention: the projection of ``out``, times a gate of ``x`` if the module has one."""
    out = module.norm(out)
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def rope_attention(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Compute ``timm.layers.AttentionRope`` or timm's ``EvaAttention``: [B, N, C] -> [B, N, C]."""
    if attn_mask is not None or drops(module, module.attn_drop.p) or x.ndim != 3 or not computes(x):
        return type(module).forward(module, x, rope=rope, attn_mask=attn_mask, **_hint(is_causal))
    q, k, v = _projected_heads(module, x)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        q, k = (_rotated(module, t, rope).to(v.dtype) for t in (q, k))
    groups = getattr(module, "num_kv_groups", 1)
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return _project(module, x, heads_attention(q, k, v, is_causal, _scale(module)))


def _projected_heads(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values [B, heads, N, head_dim] of timm's attention, from one linear layer or three."""
    if module.qkv is None:
        layers = (module.q_proj, module.k_proj, module.v_proj)
        return tuple(layer(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for layer in layers)
    q_bias = getattr(module, "q_bias", None)
    if q_bias is None:
        return split_heads(module.qkv(x), module.num_heads)
    bias = torch.cat([q_bias, module.k_bias, module.v_bias])
    # Without qkv_bias_separate, timm reads the weight of this layer, but never calls the layer, even if it has hooks.
    qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    return split_heads(qkv, module.num_heads)


def _rotated(module: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Apply timm's rotary embeddings to all tokens but the first, such as the class token: [B, heads, N, head_dim]."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    options = {"half": True} if getattr(module, "rotate_half", False) else {}
    prefix = module.num_prefix_tokens
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def latent_pool(module: Any, x: Tensor, attn_mask: Tensor | PackedTokens | None = None) -> Tensor:
    """Compute ``timm.layers.AttentionPoolLatent`` with one query: [B, N, C] -> [B, out_features].

    Key and value projections are applied to the query and to the pooled token, instead of to all tokens. ``attn_mask``
    may be the bounds of packed images in place of a mask; then ``x`` [1, T, C] has their tokens.
    """
    is_known = is_plain(module.kv, nn.Linear) and all(is_plain(x, nn.Identity) for x in (module.q_norm, module.k_norm))
    packed = attn_mask if isinstance(attn_mask, PackedTokens) else None
    is_long = packed is None and x.shape[1] > MAX_TOKENS
    if attn_mask is not packed or not is_known or is_long or not computes(x):
        # older versions of timm lack the argument attn_mask
        options = {} if attn_mask is None else {"attn_mask": attn_mask}
        return type(module).forward(module, x, **options)
    if module.pos_embed is not None:
        x = x + module.pos_embed.unsqueeze(0).to(x.dtype)
    heads = (module.num_heads, -1)
    q = module.q(module.latent.expand(len(x), -1, -1))[:, 0].unflatten(-1, heads)  # packed images share one query
    weight_k, weight_v = module.kv.weight.unflatten(0, (2, *heads)).unbind(0)
    bias_k, bias_v = (None, None) if module.kv.bias is None else module.kv.bias.chunk(2)
    out = single_query_attention(q, x, weight_k, weight_v, None, "auto", bias_k, bias_v, packed=packed)
    out = module.proj_drop(module.proj(out[:, None]))
    if module.mlp is not None:
        out = out + module.mlp(module.norm(out))
    return out[:, 0] if module.pool in ("token", "avg") else out
