"""PyTorch's attention class, and the attention pooling of OpenCLIP's ResNets, on our attention.

Each function computes what the ``forward`` of its class does, and has its arguments. A call that asks for something
else (weights, padding, dropout, any mask but a causal one) runs the class's own ``forward``.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from .attention_parts import KIND, drops, heads_attention, project_apart, project_qkv, too_wide
from .blocks import Mask
from .hf_attention import PROPOSALS_OF_HF
from .open_clip_attention import PROPOSALS_OF_OPEN_CLIP, open_clip_attention
from .places import Proposal, class_name, computes, is_plain
from .timm_attention import PROPOSALS_OF_TIMM


def propose_attention(module: nn.Module, mask: Mask | None = None) -> Proposal | None:
    """Say what to do with ``module``, which is given ``mask``; None if it computes no attention."""
    propose = _PROPOSALS.get(class_name(module))
    if propose is not None:
        proposal = propose(module)
        if mask is None or proposal.function is None:
            return proposal
        if mask.is_cross and proposal.function in (multihead_attention, open_clip_attention):
            return dataclasses.replace(proposal, text="clipfast.attention_qkv")
        if mask.is_cross:
            return Proposal(KIND, "its queries are not the tokens that it sees")
        if mask.is_padding:
            return dataclasses.replace(proposal, text=f"{proposal.text}, as before where patches are padding")
        if mask.owner is None:
            return Proposal(KIND, mask.refusal)
        return dataclasses.replace(proposal, text=f"{proposal.text}, causal")
    if class_name(module) in _REFUSALS:
        return Proposal(KIND, _REFUSALS[class_name(module)])
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


def _propose_pool(module: Any) -> Proposal:
    tokens, heads = len(module.positional_embedding), module.num_heads
    if tokens > MAX_TOKENS or heads > MAX_HEADS:
        return Proposal(KIND, f"{tokens} tokens and {heads} heads; at most {MAX_TOKENS} and {MAX_HEADS} can be pooled")
    if not _has_plain_projections(module):
        return Proposal(KIND, "a projection has a hook, or is not a linear layer")
    return Proposal(KIND, "clipfast.attention_pool", attention_pool_2d)


def _has_plain_projections(pool: Any) -> bool:
    """Return True if an ``AttentionPool2d`` loses nothing if its linear layers are not called."""
    return all(is_plain(layer, nn.Linear) for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))


_PROPOSALS = {
    "torch.nn.modules.activation.MultiheadAttention": _propose_multihead,
    "open_clip.modified_resnet.AttentionPool2d": _propose_pool,
    **PROPOSALS_OF_OPEN_CLIP,
    **PROPOSALS_OF_TIMM,
    **PROPOSALS_OF_HF,
}
_REFUSALS = {
    "open_clip.naflex_genlip_model.GenLipAttention": "each sample has a mask of its own",
    "timm.models.vision_transformer.ParallelScalingBlock": "its block projects for attention and perceptron at once",
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
        return project_out(module, heads_attention(*project_apart(module, query, key), None, is_causal)), None
    qkv, bias = project_qkv(query, module.in_proj_weight, module.in_proj_bias)
    return project_out(module, attention(qkv, module.num_heads, causal=is_causal, bias=bias)), None


def attention_pool_2d(module: Any, x: Tensor) -> Tensor:
    """Compute ``open_clip.modified_resnet.AttentionPool2d``: [B, C, H, W] -> [B, output_dim].

    Only the mean of all positions is a query, so that the keys' and the values' projections act on it alone.
    """
    if not _has_plain_projections(module) or not computes(x):
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
