"""Replacements of attention and blocks of OpenCLIP, which call our kernels, and the recognition of causal masks.

A block adds the output of its attention to the residual stream in the same kernel as its second norm, and passes its
attention a hint that a mask is causal. Child modules of unknown classes are called. A call with padding, dropout, or a
mask that is not causal runs the class's own ``forward``.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..kernels.packing import Packing
from ..models.layers import has_hooks, is_plain, project_qkv, single_query_attention
from .parts import (
    ADDS,
    Mask,
    add_norm,
    drops,
    heads_attention,
    multihead_attention,
    project_apart,
    propose_heads,
    self_attention,
    split_heads,
)
from .places import SEEN, Proposal, class_name, computes, runs_ours

RESIDUAL = "open_clip.transformer.ResidualAttentionBlock"
_CUSTOM = "open_clip.transformer.CustomResidualAttentionBlock"
_DECODER = "open_clip.transformer.MultimodalTransformer"
_TEXT = "open_clip.transformer.TextTransformer"
_MAMMUT = "open_clip.transformer.MultimodalDecoder"  # OpenCLIP has the class MultimodalDecoder from version 4 on
_PADDING = "its mask hides padding"


def _propose_pool(module: Any) -> Proposal:
    """Propose attention_pool for the attention pooling of a ResNet, or say why it does not fit."""
    tokens, heads = len(module.positional_embedding), module.num_heads
    if tokens > MAX_TOKENS or heads > MAX_HEADS:
        text = f"{tokens} tokens and {heads} heads; at most {MAX_TOKENS} and {MAX_HEADS} can be pooled"
        return Proposal("attention", text)
    if not _has_plain_projections(module):
        return Proposal("attention", "a projection has a hook, or is not a linear layer")
    return Proposal("attention", "clipfast.attention_pool", attention_pool_2d)


def _propose_own(module: Any) -> Proposal:
    """Propose a replacement for attention of OpenCLIP's own class, or say why there is none."""
    if module.logit_scale is not None:
        return Proposal("attention", "its scores are cosines")
    is_packed = module.in_proj_weight is not None
    is_packed = is_packed and isinstance(module.ln_q, nn.Identity) and isinstance(module.ln_k, nn.Identity)
    return propose_heads(module.head_dim, "attention" if is_packed else "attention_qkv", open_clip_attention)


ATTENTIONS = {
    "open_clip.transformer.Attention": _propose_own,
    "open_clip.modified_resnet.AttentionPool2d": _propose_pool,
    "open_clip.transformer.ModernTextAttention": lambda module: propose_heads(
        module.head_dim, "attention_qkv", modern_text_attention
    ),
    "open_clip.audio.whisper.MultiHeadAttention": lambda module: propose_heads(
        module.query.out_features // module.n_head, "attention_qkv", whisper_attention
    ),
    "open_clip.naflex_genlip_model.GenLipAttention": lambda _: Proposal(
        "attention", "each sample has a mask of its own"
    ),
}


def propose_block(block: Any, mask: Mask | None, attention: bool, norms: bool) -> Iterator[Proposal]:
    """Propose a replacement for a block of OpenCLIP, if the replacements of its norms or attention need it."""
    functions: dict[str, Callable[..., Tensor]] = {RESIDUAL: residual_block, _CUSTOM: custom_block}
    function = functions.get(class_name(block))
    if function is None:
        return
    owner = mask.owner if mask is not None and attention else None
    does = {
        ADDS: norms,
        "checks whether its mask is causal": owner is not None,
        "normalises its context once": attention and hasattr(block, "ln_1_kv"),
    }
    if any(does.values()):
        text = "; ".join(text for text, is_done in does.items() if is_done)
        yield Proposal("norms" if norms else "attention", text, function, owner=owner)


def find_masks(model: nn.Module) -> dict[int, Mask]:
    """Return the masks of an adopted model's blocks and of their attention, by the ``id`` of each of these modules.

    They are the masks of OpenCLIP's text towers, of cross-attention, and of timm's ``NaFlexVit``, which pads images.
    """
    masks: dict[int, Mask] = {}
    for module in model.modules():
        tower: Any = module
        name = class_name(module)
        if name == "open_clip.transformer.AttentionalPooler":
            masks[id(tower.attn)] = Mask(is_cross=True)
        elif name == "timm.models.naflexvit.NaFlexVit":
            attentions = [*(block.attn for block in tower.blocks), getattr(tower, "attn_pool", None)]
            masks |= {id(attn): Mask(is_padding=True) for attn in attentions}
        elif name == "open_clip.transformer.ModernTextTransformer" and tower.cfg.attention_mode != "causal":
            masks |= {id(block.attn): Mask(refusal=_PADDING) for block in tower.blocks}
        elif name in ("open_clip.model.CLIP", _TEXT, _DECODER, _MAMMUT):
            refusal = why_not_causal(tower)
            stack = tower if name in (_DECODER, _MAMMUT) else tower.transformer
            mask = Mask(refusal=refusal) if refusal else Mask(tower)
            for block in getattr(stack, "resblocks", ()) if refusal is not None else ():
                masks[id(block)] = masks[id(block.attn)] = mask
            masks |= {id(block.attn): Mask(is_cross=True) for block in getattr(stack, "cross_attn", ())}
    return masks


def why_not_causal(tower: Any) -> str | None:
    """Return the reason why the mask of an OpenCLIP tower is not causal, "" if it is, and None without a mask."""
    mask = tower.attn_mask  # MaMMUT's decoder uses this mask for captions only; texts alone have another mask
    if hides_padding(tower) and class_name(tower) != _MAMMUT:
        return f"{_PADDING} too"
    if mask is None:
        return None
    if mask.is_meta:
        return "its mask is on the meta device, where it has no values"
    causal = torch.full_like(mask, float("-inf")).triu(1)
    is_causal = mask.ndim == 2 and mask.shape[0] == mask.shape[1] and torch.equal(mask, causal)
    return "" if is_causal else "its mask is not the causal one"


def hides_padding(tower: Any) -> bool:
    """Return True if OpenCLIP's text tower adds a class token, or hides the padding of texts."""
    return getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False)


def under_mask(proposal: Proposal, mask: Mask | None) -> Proposal:
    """Return a proposal for attention of OpenCLIP, adapted to the mask of its calls, or refused because of the mask."""
    if mask is None or proposal.function is None:
        return proposal
    text = proposal.text
    if mask.is_cross:
        if proposal.function not in (multihead_attention, open_clip_attention):
            return Proposal("attention", "its queries are not the tokens that it sees")
        return dataclasses.replace(proposal, text="clipfast.attention_qkv")
    if mask.is_padding:
        return dataclasses.replace(proposal, text=f"{text}, as before where patches are padding")
    if mask.owner is None:
        return Proposal("attention", mask.refusal)
    return dataclasses.replace(proposal, text=f"{text}, causal")


def is_causal(attn_mask: Tensor | Packing | None, owner: Any) -> bool:
    """Return True if ``attn_mask`` is the causal mask that ``owner`` holds, its upper left part, or a packing of texts.

    Compiled code assumes that the mask of ``owner`` is still causal, as it was when the replacements were made.
    """
    if isinstance(attn_mask, Packing):
        return True
    if attn_mask is None or owner is None:
        return False
    mask: Tensor = owner.attn_mask
    if torch.compiler.is_compiling():
        return attn_mask is mask
    return (attn_mask is mask or _is_corner(attn_mask, mask)) and _is_still_causal(owner, mask)


def _is_corner(part: Tensor, mask: Tensor) -> bool:
    """Return True if ``part`` is a view of the upper left square of ``mask``, the causal mask of an OpenCLIP tower."""
    is_square = part.ndim == 2 and part.shape[0] == part.shape[1] and part._base is mask
    return is_square and part.storage_offset() == mask.storage_offset() and part.stride() == mask.stride()


def _is_still_causal(owner: Any, mask: Tensor) -> bool:
    """Return True if an OpenCLIP mask is still causal.

    The mask's values are read again only if they were changed, because a GPU must send them to the host.
    """
    version = 0 if mask.is_inference() else mask._version
    known = owner.__dict__.get(SEEN)
    if known is None or known[0] is not mask or known[1] != version:
        known = owner.__dict__[SEEN] = (mask, version, why_not_causal(owner) == "")
    return known[2]


def residual_block(
    block: Any,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | Packing | None = None,
    *,
    owner: nn.Module | None = None,
) -> Tensor:
    """Compute ``open_clip.transformer.ResidualAttentionBlock``: [B, N, E] -> [B, N, E].

    ``attn_mask`` may be the packing of texts in place of the causal mask; then ``q_x`` [1, T, E] has their tokens.
    """
    if k_x is None and v_x is None:
        branch = _attend(block, block.ln_1(q_x), attn_mask, is_causal(attn_mask, owner))
    elif k_x is v_x and runs_ours(block.attn) and hasattr(block, "ln_1_kv") and not has_hooks(block.ln_1_kv):
        # Keys and values have the same norm. Since they are one tensor, they are projected together.
        branch = _attend_context(block, block.ln_1(q_x), block.ln_1_kv(k_x), attn_mask)
    else:
        return type(block).forward(block, q_x, k_x, v_x, attn_mask)
    x, normed = add_norm(q_x, block.ls_1(branch), block.ln_2)
    return x + block.ls_2(block.mlp(normed))


def _attend(block: Any, x: Tensor, attn_mask: Tensor | Packing | None, causal: bool) -> Tensor:
    """Call the attention of a ``ResidualAttentionBlock``, with a hint if the mask is causal and it accepts hints."""
    attn = block.attn
    inner = getattr(attn, "base_layer", attn)  # peft wraps the layer, and passes all arguments on
    attn_mask = attn_mask.to(x.dtype) if isinstance(attn_mask, Tensor) else attn_mask
    if isinstance(inner, nn.MultiheadAttention):
        hint = {"is_causal": True} if causal else {}
        return attn(x, x, x, need_weights=False, attn_mask=attn_mask, **hint)[0]
    if runs_ours(inner):
        return attn(x, attn_mask=attn_mask, is_causal=causal)
    return block.attention(q_x=x, attn_mask=attn_mask)


def _attend_context(block: Any, x: Tensor, context: Tensor, attn_mask: Any) -> Tensor:
    """Call the attention of a ``ResidualAttentionBlock`` on a context."""
    attn_mask = None if attn_mask is None else attn_mask.to(x.dtype)
    if isinstance(block.attn, nn.MultiheadAttention):
        return block.attn(x, context, context, need_weights=False, attn_mask=attn_mask)[0]
    return block.attn(x, k_x=context, v_x=context, attn_mask=attn_mask)


def custom_block(block: Any, x: Tensor, attn_mask: Tensor | None = None, *, owner: nn.Module | None = None) -> Tensor:
    """Compute ``open_clip.transformer.CustomResidualAttentionBlock``: [B, N, E] -> [B, N, E]."""
    hint = {"is_causal": True} if runs_ours(block.attn) and is_causal(attn_mask, owner) else {}
    branch = block.ln_attn(block.attn(block.ln_1(x), attn_mask=attn_mask, **hint))
    x, normed = add_norm(x, block.ls_1(branch), block.ln_2)
    return x + block.ls_2(block.mlp(normed))


def attention_pool_2d(module: Any, x: Tensor) -> Tensor:
    """Compute ``open_clip.modified_resnet.AttentionPool2d``: [B, C, H, W] -> [B, output_dim].

    The mean of all positions is the only query, and so key and value projections are applied to one row instead of all.
    """
    if not _has_plain_projections(module) or not computes(x):
        return type(module).forward(module, x)
    tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    tokens = tokens + module.positional_embedding.to(tokens.dtype)
    heads = (module.num_heads, -1)
    q = F.linear(tokens[:, 0], module.q_proj.weight, module.q_proj.bias).unflatten(1, heads)
    weight_k, weight_v = (layer.weight.unflatten(0, heads) for layer in (module.k_proj, module.v_proj))
    out = single_query_attention(q, tokens, weight_k, weight_v, None, "auto", module.k_proj.bias, module.v_proj.bias)
    return F.linear(out, module.c_proj.weight, module.c_proj.bias)


def _has_plain_projections(pool: Any) -> bool:
    """Return True if the linear layers of an ``AttentionPool2d`` have no hooks or adapters, and need not be called."""
    return all(is_plain(layer, nn.Linear) for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))


def open_clip_attention(
    module: Any,
    x: Tensor,
    *args: Tensor | None,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | Packing | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``open_clip.transformer.Attention`` on ``x``, or on a context ``k_x`` [B, N, C]: [B, M, E] -> [B, M, E].

    ``is_causal`` says that ``attn_mask`` is the causal mask, or a packing in its place. OpenCLIP's own class does not
    have this argument.
    """
    is_other = bool(args) or k_x is not v_x or drops(module, module.attn_drop.p)
    if is_other or (attn_mask is not None) != is_causal or not computes(x):
        given = {"k_x": k_x, "v_x": v_x, "attn_mask": attn_mask}
        others = {name: t for name, t in given.items() if t is not None}
        return type(module).forward(module, x, *args, **others)
    context = x if k_x is None else k_x
    is_normed = not (is_plain(module.ln_q, nn.Identity) and is_plain(module.ln_k, nn.Identity))
    if context is x and module.in_proj_weight is not None and not is_normed:
        qkv, bias = project_qkv(x, module.in_proj_weight, module.in_proj_bias)
        out = self_attention(qkv, module.num_heads, attn_mask, bias, is_causal)
    else:
        q, k, v = project_apart(module, x, context)
        out = heads_attention(module.ln_q(q), module.ln_k(k), v, is_causal)
    if module.head_scale is not None:
        out = (out.unflatten(-1, (module.num_heads, -1)) * module.head_scale.flatten(1)).flatten(2)
    return module.out_drop(module.out_proj(module.ln_inner(out)))


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
    q, k, v = split_heads(module.qkv(x), module.heads)
    first = v if v_first is None else v_first
    if module.vr_lambda is not None and v_first is not None:
        v = torch.lerp(v_first, v, module.vr_lambda.to(v.dtype))
    q, k = module.q_norm(q), module.k_norm(k)
    if rope_embed is not None:
        q, k = (_rotate_pairs(t, rope_embed) for t in (q, k))
    out = heads_attention(q, k, v, is_causal)
    if module.gate is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj(out), first if module.value_residual else None


def _rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels of [B, H, N, D] as OpenCLIP does. ``angles`` [N, D] are cosines, and then sines."""
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
    return module.out(heads_attention(q, k, v, False)), None
