"""OpenCLIP's own attention classes, also those of its new text and audio towers, on our attention.

Each function computes what the ``forward`` of its class does, and has its arguments. A call that asks for something
else (padding, dropout, any mask but a causal one) runs the class's own ``forward``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .attention_parts import KIND, drops, heads_attention, project_apart, project_qkv, too_wide
from .places import Proposal, computes, is_plain

ATTENTION = "open_clip.transformer.Attention"


def _propose_attention(module: Any) -> Proposal:
    is_packed = module.in_proj_weight is not None and module.logit_scale is None
    is_packed = is_packed and isinstance(module.ln_q, nn.Identity) and isinstance(module.ln_k, nn.Identity)
    op = "attention" if is_packed else "attention_qkv"
    return too_wide(module.head_dim) or Proposal(KIND, f"clipfast.{op}", open_clip_attention)


def _propose_modern(module: Any) -> Proposal:
    return too_wide(module.head_dim) or Proposal(KIND, "clipfast.attention_qkv", modern_text_attention)


def _propose_whisper(module: Any) -> Proposal:
    head_dim = module.query.out_features // module.n_head
    return too_wide(head_dim) or Proposal(KIND, "clipfast.attention_qkv", whisper_attention)


PROPOSALS_OF_OPEN_CLIP = {
    ATTENTION: _propose_attention,
    "open_clip.transformer.ModernTextAttention": _propose_modern,
    "open_clip.audio.whisper.MultiHeadAttention": _propose_whisper,
}


def open_clip_attention(
    module: Any,
    x: Tensor,
    *args: Tensor | None,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``open_clip.transformer.Attention`` on ``x``, or on a context ``k_x`` [B, N, C]: [B, M, E] -> [B, M, E].

    ``is_causal`` says that ``attn_mask`` is the causal mask. OpenCLIP's own class does not have this argument.
    """
    is_other = bool(args) or k_x is not v_x or drops(module, module.attn_drop.p)
    if is_other or (attn_mask is not None) != is_causal or not computes(x):
        given = {"k_x": k_x, "v_x": v_x, "attn_mask": attn_mask}
        others = {name: t for name, t in given.items() if t is not None}
        return type(module).forward(module, x, *args, **others)
    context = x if k_x is None else k_x
    is_normed = not (is_plain(module.ln_q, nn.Identity) and is_plain(module.ln_k, nn.Identity))
    if context is x and module.in_proj_weight is not None and module.logit_scale is None and not is_normed:
        qkv, bias = project_qkv(x, module.in_proj_weight, module.in_proj_bias)
        out = attention(qkv, module.num_heads, causal=is_causal, bias=bias)
    else:
        out = _attend_apart(module, x, context, is_causal)
    if module.head_scale is not None:
        out = (out.unflatten(-1, (module.num_heads, -1)) * module.head_scale.flatten(1)).flatten(2)
    return module.out_drop(module.out_proj(module.ln_inner(out)))


def _attend_apart(module: Any, x: Tensor, context: Tensor, is_causal: bool) -> Tensor:
    """Compute attention of [B, M, E] on [B, N, C], without the projection of the output: [B, M, E]."""
    q, k, v = project_apart(module, x, context)
    if module.logit_scale is None:
        return heads_attention(module.ln_q(q), module.ln_k(k), v, None, is_causal)
    # Scores are cosines times a learned scale of each head (Swin Transformer V2, arXiv:2111.09883).
    logit_scale = module.logit_scale.clamp(max=module.logit_scale_max).exp()  # [H, 1, 1]
    return heads_attention(F.normalize(q, dim=-1) * logit_scale, F.normalize(k, dim=-1), v, 1.0, is_causal)


def modern_text_attention(
    module: Any,
    x: Tensor,
    rope_embed: Tensor | None = None,
    key_bias: Tensor | None = None,
    is_causal: bool = False,
    v_first: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``open_clip.transformer.ModernTextAttention``: [B, N, C] -> [B, N, C], and the first layer's values."""
    if key_bias is not None or not computes(x):
        return type(module).forward(module, x, rope_embed, key_bias, is_causal, v_first)
    q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    first = v if v_first is None else v_first
    if module.vr_lambda is not None and v_first is not None:
        v = torch.lerp(v_first, v, module.vr_lambda.to(v.dtype))
    q, k = module.q_norm(q), module.k_norm(k)
    if rope_embed is not None:
        q, k = (_rotate_pairs(t, rope_embed) for t in (q, k))
    out = heads_attention(q, k, v, None, is_causal)
    if module.gate is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj(out), first if module.value_residual else None


def _rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of [B, H, N, D]. ``angles`` [N, D] are cosines, and then sines."""
    cos, sin = angles.chunk(2, dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def whisper_attention(
    module: Any, x: Tensor, xa: Tensor | None = None, mask: Tensor | None = None, kv_cache: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Compute ``open_clip.audio.whisper.MultiHeadAttention``: [B, N, C] -> [B, N, C], and None for the scores."""
    is_other = xa is not None or mask is not None or kv_cache is not None or not module.use_sdpa
    if is_other or not computes(x):
        return type(module).forward(module, x, xa, mask, kv_cache)
    layers = (module.query, module.key, module.value)
    q, k, v = (layer(x).unflatten(-1, (module.n_head, -1)).transpose(1, 2) for layer in layers)
    return module.out(heads_attention(q, k, v, None, False)), None
