"""Replacements in towers of transformers: their embeddings, and a last block that computes one row only."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import patch_embed, text_embed
from ..models.layers import HOOKS, has_hooks
from ..models.packed_text import PackedText, has_values, pack_if_shorter
from .hf import part_of, read_packed, read_row, seen_by_padding, why_not_short
from .parts import NO_PROJECTION, is_projection, is_table, only_looks_up
from .places import ON_GPUS, Proposal, computes, is_left, is_untouched, on_cpus, propose_unless, runs_ours

_REQUIRES_GRADIENTS = "PreTrainedModel.enable_input_require_grads."
_IMAGES_OF_SIGLIP = {
    "Siglip": "its convolution has a bias, and there is no class token",
    "Siglip2": "images come as patches, and a linear layer projects them",
}


def propose_embeddings(module: Any) -> Iterator[Proposal]:
    """Propose replacements for the embeddings of a tower of transformers."""
    family, part = part_of(module)
    if part == "VisionEmbeddings":
        refusal = _IMAGES_OF_SIGLIP.get(family, "")
        if not refusal and not (is_projection(module.patch_embedding) and is_table(module.position_embedding)):
            refusal = NO_PROJECTION
        yield propose_unless(refusal, "patch_embed", "clipfast.patch_embed", image_tokens)
    elif part == "TextEmbeddings":
        refusal = "" if _are_tables(module) else "its tables have a hook, or do more than look up"
        yield propose_unless(refusal, "text_embed", f"clipfast.text_embed{ON_GPUS}", text_tokens)


def _are_tables(module: Any) -> bool:
    """Return True if our text embedding op can do both look-ups of a text tower of transformers."""
    return is_table(module.token_embedding) and is_table(module.position_embedding)


@on_cpus
def image_tokens(module: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    """Compute ``CLIPVisionEmbeddings``: [B, C, H, W] -> [B, 1 + patches, E]."""
    conv, positions = module.patch_embedding, module.position_embedding
    if interpolate_pos_encoding or not _is_whole(module, pixel_values):
        return type(module).forward(module, pixel_values, interpolate_pos_encoding)
    images = pixel_values.to(conv.weight.dtype)
    tokens = patch_embed(images, conv.weight, module.class_embedding, positions.weight)
    return tokens.to(positions.weight.dtype)  # transformers' result has the positions' dtype, even under autocast


def _is_whole(module: Any, images: Tensor) -> bool:
    """Return True if our patch embedding op can compute ``images`` with the weights of transformers' tower."""
    conv, positions, size = module.patch_embedding, module.position_embedding, module.image_size
    if not isinstance(images, Tensor) or not images.is_floating_point() or not computes(images):
        return False
    if not is_projection(conv) or not is_table(positions):
        return False
    is_same = conv.weight.dtype == module.class_embedding.dtype == positions.weight.dtype
    is_fitting = images.ndim == 4 and images.shape[1:] == (conv.in_channels, size, size)
    patch_size = conv.kernel_size[0]
    is_grid = size % patch_size == 0 and len(positions.weight) == 1 + (size // patch_size) ** 2
    return is_same and is_fitting and is_grid


@on_cpus
def text_tokens(
    module: Any,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """Compute ``CLIPTextEmbeddings``, ``SiglipTextEmbeddings`` or ``Siglip2TextEmbeddings``: [B, L] -> [B, L, E]."""
    if input_ids is None or position_ids is not None or inputs_embeds is not None or not _is_text(module, input_ids):
        return type(module).forward(module, input_ids, position_ids, inputs_embeds)
    # Under autocast, the embeddings keep the dtype of the table, as in transformers.
    with torch.autocast(input_ids.device.type, enabled=False):
        return text_embed(input_ids, module.token_embedding.weight, module.position_embedding.weight)


def _is_text(module: Any, text: Tensor) -> bool:
    """Return True if our text embedding op can compute ``text`` with the tables of transformers' tower."""
    is_text = text.ndim == 2 and text.shape[1] <= len(module.position_embedding.weight)
    return is_text and _are_tables(module) and _is_embedded(module, text)


def _is_embedded(module: Any, ids: Tensor) -> bool:
    """Return True if our text embedding op takes these ids and transformers' tables, and is faster on their device."""
    table, positions = module.token_embedding.weight, module.position_embedding.weight
    is_same = ids.dtype in (torch.int32, torch.int64) and table.dtype == positions.dtype
    return is_same and computes(table) and not is_left(table)


def why_not_pooled(tower: Any, num_tokens: int | None = None) -> str:
    """Return the reason why the last block of a tower of transformers cannot compute a single row, or "" if it can.

    Args:
        tower: the image or text tower.
        num_tokens: the number of tokens of a sequence; default: the most that the tower accepts.
    """
    family, part = part_of(tower)
    if part not in ("VisionModel", "TextModel") or not is_untouched(tower):
        return "it is not transformers' own, or has a hook"
    if part == "VisionModel" and family != "CLIP":
        return "its attention pooling reads every row" if tower.use_head else "nothing is pooled"
    if has_hooks(tower.post_layernorm if part == "VisionModel" else tower.final_layer_norm):
        return "the norm of its rows has a hook"
    if num_tokens is None:
        num_tokens = len(tower.embeddings.position_embedding.weight)
    return why_not_short(tower.encoder, num_tokens)


def pooled_image(tower: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor | None:
    """Compute the pooled output of a ``CLIPVisionModel``: [B, C, H, W] -> [B, E]; None if all rows must be computed."""
    if interpolate_pos_encoding or not _computes(tower) or _records(tower) or why_not_pooled(tower):
        return None
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))
    return tower.post_layernorm(read_row(tower.encoder, x, None, False, None))


def pooled_text(
    tower: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    packs: bool = False,
) -> Tensor | None:
    """Compute the pooled output of transformers' text tower: [B, L] -> [B, E]; None if all rows must be computed.

    ``packs`` lets the tower compute packed texts where it can.
    """
    is_known = input_ids.ndim == 2 and (attention_mask is None or attention_mask.shape == input_ids.shape)
    if not is_known or not _computes(tower) or _records(tower):
        return None
    is_padding, seqlens = seen_by_padding(attention_mask)
    if not is_padding:
        return None
    is_clip = part_of(tower)[0] == "CLIP"
    rows = _ends(tower, input_ids) if is_clip else input_ids.new_full(input_ids.shape[:1], input_ids.shape[1] - 1)
    packed = _packed(tower, input_ids, rows, seqlens) if packs and position_ids is None else None
    if packed is not None:
        return tower.final_layer_norm(read_packed(tower.encoder, _packed_tokens(tower.embeddings, packed), packed))
    if why_not_pooled(tower, input_ids.shape[1]):
        return None
    x = tower.embeddings(input_ids=input_ids, position_ids=position_ids)
    x = tower.final_layer_norm(read_row(tower.encoder, x, rows, is_clip, seqlens))
    return x if is_clip else tower.head(x)


def why_not_packed(tower: Any) -> str:
    """Return the reason why transformers' text tower cannot compute packed texts, or "" if it can."""
    if part_of(tower) != ("CLIP", "TextModel") or not is_untouched(tower):
        return "it is not that of transformers' CLIP, or has a hook"
    if has_hooks(tower.final_layer_norm) or not _embeds_packed(tower.embeddings):
        return "its norm or its embedding has a hook, or its tables do more than look up"
    return why_not_short(tower.encoder, None)


def _embeds_packed(module: Any) -> bool:
    """Return True if the embedding of transformers' text tower takes the tokens of packed texts."""
    table = module.token_embedding
    hooks = [hook for name in HOOKS for hook in table.__dict__[name].values()]
    # For gradient checkpointing, a hook of transformers makes the tokens require gradients; any shape suits it.
    is_known = all(getattr(hook, "__qualname__", "").startswith(_REQUIRES_GRADIENTS) for hook in hooks)
    is_look_up = type(table) is nn.Embedding and "forward" not in table.__dict__ and only_looks_up(table)
    return is_untouched(module) and is_known and is_look_up and is_table(module.position_embedding)


def _packed(tower: Any, text: Tensor, rows: Tensor, seqlens: Tensor | None) -> PackedText | None:
    """Return texts packed, if transformers' text tower computes packed texts and enough of them is padding, or None.

    Args:
        tower: the text tower.
        text: [B, L] token ids.
        rows: [B], the row of each text that is read.
        seqlens: [B], the number of visible tokens of each text; None for all.
    """
    too_long = text.shape[1] > len(tower.embeddings.position_embedding.weight)
    if too_long or not has_values(text) or why_not_packed(tower):
        return None
    if seqlens is not None and bool((seqlens <= rows).any()):
        return None  # the row that is read is hidden by the mask, and packed texts have no mask
    packed = pack_if_shorter(text, rows)
    return packed if isinstance(packed, PackedText) else None


def _packed_tokens(module: Any, text: PackedText) -> Tensor:
    """Compute ``CLIPTextEmbeddings`` of packed texts, as one sequence [1, T, E]."""
    table, positions = module.token_embedding.weight, module.position_embedding.weight
    if runs_ours(module) and _are_tables(module) and _is_embedded(module, text.ids):
        with torch.autocast(text.device.type, enabled=False):
            return text_embed(text.ids, table, positions, cu_seqlens=text.packing)[None]
    # Each token is passed as a text of its own, because a text may have only as many tokens as there are positions.
    return module(input_ids=text.ids[:, None], position_ids=text.positions[:, None]).transpose(0, 1)


def _ends(tower: Any, input_ids: Tensor) -> Tensor:
    """Return the position [B] of the end-of-text token of each text, by transformers' rule."""
    if tower.eos_token_id == 2:  # early configurations have this wrong value: the end token has the largest id
        return input_ids.argmax(-1)
    return (input_ids == tower.eos_token_id).int().argmax(-1)


def _computes(tower: Any) -> bool:
    """Return True if our ops support the device and the dtype of the weights of transformers' tower."""
    return computes(tower.encoder.layers[-1].layer_norm1.weight) if len(tower.encoder.layers) else False


def _records(tower: Any) -> bool:
    """Return True if a tower of transformers must return the hidden states or attention weights of all blocks."""
    return any(getattr(tower.config, name, False) for name in ("output_hidden_states", "output_attentions"))
