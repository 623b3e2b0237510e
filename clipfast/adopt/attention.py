"""The attention classes of PyTorch and OpenCLIP on our attention.

Each function computes what the ``forward`` of its class does, and has its arguments. A call that asks for something
else (weights, padding, dropout, any mask but a causal one) runs the class's own ``forward``.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention, attention_qkv
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from .attention_parts import KIND, drops, normed_attention, project_qkv, too_wide
from .blocks import Mask
from .hf_attention import PROPOSALS_OF_HF
from .places import Proposal, class_name, computes, is_plain
from .timm_attention import PROPOSALS_OF_TIMM


def propose_attention(module: nn.Module, mask: Mask | None = None) -> Proposal | None:
    """Say what to do with ``module``, which is given ``mask``; None if it computes no attention."""
    propose = _PROPOSALS.get(class_name(module))
    if propose is not None:
        proposal = propose(module)
        if mask is None or proposal.function is None:
            return proposal
        if mask.is_cross and proposal.function is multihead_attention:
            return dataclasses.replace(proposal, text="clipfast.attention_qkv")
        if mask.is_cross:
            return Proposal(KIND, "its queries are not the tokens that it sees")
        if mask.owner is None:
            return Proposal(KIND, mask.refusal)
        return dataclasses.replace(proposal, text=f"{proposal.text}, causal")
    name = type(module).__name__
    is_attention = ("Attention" in name or name.endswith("Attn")) and not name.endswith("Block")
    if is_attention and not any(class_name(inner) in _PROPOSALS for inner in module.modules()):
        return Proposal(KIND, f"{name} is not one of the attention classes that are known")
    return None


def _propose_multihead(module: Any) -> Proposal:
    if not module.batch_first:
        return Proposal(KIND, "batch_first=False")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return Proposal(KIND, "it adds keys that are no tokens (bias_k, bias_v or add_zero_attn)")
    op = "attention" if module._qkv_same_embed_dim else "attention_qkv"
    return too_wide(module.head_dim) or Proposal(KIND, f"clipfast.{op}", multihead_attention)


def _propose_open_clip(module: Any) -> Proposal:
    if module.logit_scale is not None:
        return Proposal(KIND, "its scores are scaled cosines")
    if module.in_proj_weight is None:
        return Proposal(KIND, "keys and values have a width of their own")
    return too_wide(module.head_dim) or Proposal(KIND, "clipfast.attention", open_clip_attention)


def _propose_pool(module: Any) -> Proposal:
    tokens, heads = len(module.positional_embedding), module.num_heads
    if tokens > MAX_TOKENS or heads > MAX_HEADS:
        return Proposal(KIND, f"{tokens} tokens and {heads} heads; at most {MAX_TOKENS} and {MAX_HEADS} can be pooled")
    return Proposal(KIND, "clipfast.attention_pool", attention_pool_2d)


_PROPOSALS = {
    "torch.nn.modules.activation.MultiheadAttention": _propose_multihead,
    "open_clip.transformer.Attention": _propose_open_clip,
    "open_clip.modified_resnet.AttentionPool2d": _propose_pool,
    **PROPOSALS_OF_TIMM,
    **PROPOSALS_OF_HF,
}


def multihead_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``nn.MultiheadAttention``: [B, N, E] -> [B, N, E], and None for the weights.

    ``is_causal`` says that ``attn_mask`` is the causal mask, as in PyTorch.
    """
    is_other = key is not value or query.ndim != 3 or key_padding_mask is not None or need_weights
    if is_other or (attn_mask is not None) != is_causal or drops(module, module.dropout) or not computes(query):
        return type(module).forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    if query is not key or not module._qkv_same_embed_dim:
        return project_out(module, _cross_attention(module, query, key, is_causal)), None
    qkv, bias = project_qkv(query, module.in_proj_weight, module.in_proj_bias)
    return project_out(module, attention(qkv, module.num_heads, causal=is_causal, bias=bias)), None


def _cross_attention(module: Any, query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Compute attention of [B, M, E] on [B, N, kdim], without the projection of the output: [B, M, E]."""
    width, heads = module.embed_dim, (module.num_heads, -1)
    if module._qkv_same_embed_dim:
        weight_q, weight_kv = module.in_proj_weight.split([width, 2 * width])
    else:
        weight_q, weight_kv = module.q_proj_weight, torch.cat([module.k_proj_weight, module.v_proj_weight])
    bias_q, bias_kv = (None, None) if module.in_proj_bias is None else module.in_proj_bias.split([width, 2 * width])
    q = F.linear(query, weight_q, bias_q).unflatten(-1, heads)
    k, v = F.linear(key, weight_kv, bias_kv).unflatten(-1, (2, *heads)).unbind(2)
    return attention_qkv(q, k, v, causal=is_causal).flatten(2)


def open_clip_attention(
    module: Any,
    x: Tensor,
    *args: Tensor | None,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``open_clip.transformer.Attention``: [B, N, E] -> [B, N, E].

    ``is_causal`` says that ``attn_mask`` is the causal mask. OpenCLIP's own class does not have this argument.
    """
    is_self = k_x is v_x and (k_x is None or k_x is x) and not args
    if not is_self or (attn_mask is not None) != is_causal or not computes(x):
        others = {name: t for name, t in (("k_x", k_x), ("v_x", v_x)) if t is not None}
        return type(module).forward(module, x, *args, **others, attn_mask=attn_mask)
    if drops(module, module.attn_drop.p):
        return type(module).forward(module, x, attn_mask=attn_mask)
    qkv, bias = project_qkv(x, module.in_proj_weight, module.in_proj_bias)
    if is_plain(module.ln_q, nn.Identity) and is_plain(module.ln_k, nn.Identity):
        out = attention(qkv, module.num_heads, causal=is_causal, bias=bias)
    else:
        qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
        out = normed_attention(qkv, module.num_heads, module.ln_q, module.ln_k, None, is_causal)
    if module.head_scale is not None:
        out = (out.unflatten(-1, (module.num_heads, -1)) * module.head_scale.flatten(1)).flatten(2)
    return module.out_drop(module.out_proj(module.ln_inner(out)))


def attention_pool_2d(module: Any, x: Tensor) -> Tensor:
    """Compute ``open_clip.modified_resnet.AttentionPool2d``: [B, C, H, W] -> [B, output_dim].

    Only the mean of all positions is a query, so that the keys' and the values' projections act on it alone.
    """
    projections = (module.q_proj, module.k_proj, module.v_proj, module.c_proj)
    if not all(type(layer) is nn.Linear for layer in projections) or not computes(x):
        return type(module).forward(module, x)
    tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    tokens = tokens + module.positional_embedding.to(tokens.dtype)
    heads = (module.num_heads, -1)
    q = F.linear(tokens[:, 0], module.q_proj.weight, module.q_proj.bias).unflatten(1, heads)
    weight_k, weight_v = (layer.weight.unflatten(0, heads) for layer in (module.k_proj, module.v_proj))
    out = single_query_attention(q, tokens, weight_k, weight_v, None, "auto") + module.v_proj.bias
    # A bias of all keys cancels in the softmax. Its gradient is zero, and must not be None, for which
    # DistributedDataParallel would wait.
    return F.linear(out + 0 * module.k_proj.bias, module.c_proj.weight, module.c_proj.bias)


def project_out(module: Any, out: Tensor) -> Tensor:
    """Apply the output projection of an ``nn.MultiheadAttention``, which itself reads this layer and never calls it."""
    return F.linear(out, module.out_proj.weight, module.out_proj.bias)
