"""The blocks of OpenCLIP's and timm's transformers, and the masks that their attention is given.

A block adds the branch of its attention in the same pass as its second norm, and tells its attention that a mask is
causal. Everything in it is called as a module where it is not what we know.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .norms import ADDS, add_norm
from .places import SEEN, Proposal, class_name, has_hooks, runs_ours

RESIDUAL = "open_clip.transformer.ResidualAttentionBlock"
_CUSTOM = "open_clip.transformer.CustomResidualAttentionBlock"
_TIMM = "timm.models.vision_transformer.Block"
_DECODER = "open_clip.transformer.MultimodalTransformer"
_POOLER = "open_clip.transformer.AttentionalPooler"
_PADDING = "its mask hides padding"
_TEXT = "open_clip.transformer.TextTransformer"
_MAMMUT = "open_clip.transformer.MultimodalDecoder"  # of OpenCLIP 4
_MASKED = ("open_clip.model.CLIP", _TEXT, _DECODER, _MAMMUT)
_NAFLEX = "timm.models.naflexvit.NaFlexVit"
_MODERN = "open_clip.transformer.ModernTextTransformer"


@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask or the context that a block is given besides its tokens.

    Attributes:
        owner: the module that holds a causal mask for it as ``attn_mask``.
        refusal: why its mask is not plainly causal.
        is_cross: True if its queries are not the tokens that they see.
        is_padding: True if there is a mask where images have patches that are padding, and none elsewhere.
    """

    owner: nn.Module | None = None
    refusal: str = ""
    is_cross: bool = False
    is_padding: bool = False


def find_masks(model: nn.Module) -> dict[int, Mask]:
    """Return the mask of each block of OpenCLIP's text towers, by the identity of the block and of its attention.

    Blocks that see their own tokens, all of them, are not in it. timm's ``NaFlexVit`` pads images to one length.
    """
    masks: dict[int, Mask] = {}
    for module in model.modules():
        tower: Any = module
        if class_name(module) == _POOLER:
            masks[id(tower.attn)] = Mask(is_cross=True)
        if class_name(module) == _NAFLEX:
            attentions = [*(block.attn for block in tower.blocks), getattr(tower, "attn_pool", None)]
            masks |= {id(attn): Mask(is_padding=True) for attn in attentions}
        if class_name(module) == _MODERN and tower.cfg.attention_mode != "causal":
            masks |= {id(block.attn): Mask(refusal=_PADDING) for block in tower.blocks}
        if class_name(module) not in _MASKED:
            continue
        refusal = why_not_causal(tower)
        stack = tower if class_name(tower) in (_DECODER, _MAMMUT) else tower.transformer
        if refusal is not None:
            mask = Mask(refusal=refusal) if refusal else Mask(tower)
            for block in getattr(stack, "resblocks", ()):
                masks[id(block)] = masks[id(block.attn)] = mask
        for block in getattr(stack, "cross_attn", ()):
            masks[id(block.attn)] = Mask(is_cross=True)
    return masks


def why_not_causal(tower: Any) -> str | None:
    """Return why the mask of ``tower`` is not plainly causal, "" if it is, and None if there is no mask."""
    mask = tower.attn_mask  # that of MaMMUT's decoder is for captions, and a text alone has another one
    hides = getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False)
    if hides and class_name(tower) != _MAMMUT:
        return f"{_PADDING} too"
    if mask is None:
        return None
    if mask.is_meta:
        return "its mask is on the meta device, where it has no values"
    causal = torch.full_like(mask, float("-inf")).triu(1)
    is_causal = mask.ndim == 2 and mask.shape[0] == mask.shape[1] and torch.equal(mask, causal)
    return "" if is_causal else "its mask is not the causal one"


def propose_block(module: nn.Module, mask: Mask | None, attention: bool, norms: bool) -> Proposal | None:
    """Say what to do with a block; None if it is none that we know, or if its parts need nothing from it."""
    name = class_name(module)
    owner = mask.owner if mask is not None and attention else None
    is_cross = hasattr(module, "ln_1_kv") and attention
    if name in (RESIDUAL, _CUSTOM) and (owner is not None or is_cross or norms):
        function = residual_block if name == RESIDUAL else custom_block
        return Proposal("norms" if norms else "attention", _text(owner, norms, is_cross), function, owner=owner)
    if name == _TIMM and norms:
        return Proposal("norms", _text(None, norms), timm_block)
    return None


def _text(owner: nn.Module | None, norms: bool, is_cross: bool = False) -> str:
    added = ADDS if norms else ""
    causal = "checks whether its mask is causal" if owner is not None else ""
    context = "normalises its context once" if is_cross else ""
    return "; ".join(filter(None, (added, causal, context)))


def residual_block(
    block: Any,
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    owner: nn.Module | None = None,
) -> Tensor:
    """Compute ``open_clip.transformer.ResidualAttentionBlock``: [B, N, E] -> [B, N, E]."""
    if k_x is not None or v_x is not None:
        if k_x is not v_x or not _takes_one_context(block):
            return type(block).forward(block, q_x, k_x, v_x, attn_mask)
        # One norm serves keys and values. As one tensor, they are projected together.
        branch = _attend_context(block, block.ln_1(q_x), block.ln_1_kv(k_x), attn_mask)
    else:
        branch = _attend(block, block.ln_1(q_x), attn_mask, is_causal(attn_mask, owner))
    x, normed = add_norm(q_x, block.ls_1(branch), block.ln_2)
    return x + block.ls_2(block.mlp(normed))


def _takes_one_context(block: Any) -> bool:
    """Return True if attention to a context is ours, and nothing watches the norm of the context."""
    return runs_ours(block.attn) and hasattr(block, "ln_1_kv") and not has_hooks(block.ln_1_kv)


def _attend_context(block: Any, x: Tensor, context: Tensor, attn_mask: Tensor | None) -> Tensor:
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


def timm_block(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute ``timm.models.vision_transformer.Block``: [B, N, C] -> [B, N, C]."""
    options: dict[str, Any] = {"is_causal": True} if is_causal else {}  # older versions do not have it
    branch = block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=attn_mask, **options)))
    x, normed = add_norm(x, branch, block.norm2)
    return x + block.drop_path2(block.ls2(block.mlp(normed)))


def _attend(block: Any, x: Tensor, attn_mask: Tensor | None, causal: bool) -> Tensor:
    """Call the attention of a ``ResidualAttentionBlock``, with a hint where the mask is causal and it takes one."""
    attn = block.attn
    inner = getattr(attn, "base_layer", attn)  # peft wraps the layer, and hands all arguments on
    attn_mask = None if attn_mask is None else attn_mask.to(x.dtype)
    if isinstance(inner, nn.MultiheadAttention):
        hint = {"is_causal": True} if causal else {}
        return attn(x, x, x, need_weights=False, attn_mask=attn_mask, **hint)[0]
    if runs_ours(inner):
        return attn(x, attn_mask=attn_mask, is_causal=causal)
    return block.attention(q_x=x, attn_mask=attn_mask)


def is_causal(attn_mask: Tensor | None, owner: Any) -> bool:
    """Return True if ``attn_mask`` is the causal mask that ``owner`` holds, or its upper left part.

    Compiled code takes the mask that ``owner`` holds for causal, which it was when the model was given our kernels.
    """
    if attn_mask is None or owner is None:
        return False
    mask: Tensor = owner.attn_mask
    if torch.compiler.is_compiling():
        return attn_mask is mask
    return (attn_mask is mask or _is_corner(attn_mask, mask)) and _is_still_causal(owner, mask)


def _is_corner(part: Tensor, mask: Tensor) -> bool:
    """Return True if ``part`` is a view of the upper left square of ``mask``."""
    is_square = part.ndim == 2 and part.shape[0] == part.shape[1] and part._base is mask
    return is_square and part.storage_offset() == mask.storage_offset() and part.stride() == mask.stride()


def _is_still_causal(owner: Any, mask: Tensor) -> bool:
    """Look at the values of the mask, once for each tensor and each change of it, since a look waits for the GPU."""
    version = 0 if mask.is_inference() else mask._version
    known = owner.__dict__.get(SEEN)
    if known is None or known[0] is not mask or known[1] != version:
        known = owner.__dict__[SEEN] = (mask, version, why_not_causal(owner) == "")
    return known[2]
