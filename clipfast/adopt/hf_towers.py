"""The towers of transformers' CLIP, SigLIP and SigLIP 2, which read one row of their last block."""

from typing import Any

from torch import Tensor

from .hf_attention import seen_by_padding
from .hf_blocks import read_row, why_not_row
from .hf_parts import OTHER_VERSION, has_known_arguments, hf_part
from .places import computes, has_hooks, is_untouched


def why_not_pooled(tower: Any, num_tokens: int | None = None) -> str:
    """Return why the last block of ``tower`` cannot compute one row alone, or "" if it can.

    Args:
        tower: of the model, for images or for texts.
        num_tokens: tokens of a sequence; the most that the tower takes, by default.
    """
    family, part = hf_part(tower)
    if part not in ("VisionModel", "TextModel") or not is_untouched(tower):
        return "it is not transformers' own, or has a hook"
    if part == "VisionModel" and family != "CLIP":
        return "its attention pooling reads every row" if tower.use_head else "nothing is pooled"
    if not has_known_arguments(tower):
        return OTHER_VERSION
    if has_hooks(tower.post_layernorm if part == "VisionModel" else tower.final_layer_norm):
        return "the norm of its rows has a hook"
    if num_tokens is None:
        num_tokens = len(tower.embeddings.position_embedding.weight)
    return why_not_row(tower.encoder, num_tokens)


def pooled_image(tower: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor | None:
    """Compute the pooled output of a ``CLIPVisionModel``: [B, C, H, W] -> [B, E]; None if all rows must be computed."""
    if interpolate_pos_encoding or not _computes(tower) or _records(tower) or why_not_pooled(tower):
        return None
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))
    return tower.post_layernorm(read_row(tower.encoder, x, None, False, None))


def pooled_text(
    tower: Any, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor | None:
    """Compute the pooled output of a text tower: [B, L] -> [B, E]; None if all rows must be computed."""
    is_known = input_ids.ndim == 2 and (attention_mask is None or attention_mask.shape == input_ids.shape)
    if not is_known or not _computes(tower) or _records(tower) or why_not_pooled(tower, input_ids.shape[1]):
        return None
    is_padding, seqlens = seen_by_padding(attention_mask)
    if not is_padding:
        return None
    is_clip = hf_part(tower)[0] == "CLIP"
    x = tower.embeddings(input_ids=input_ids, position_ids=position_ids)
    rows = _ends(tower, input_ids) if is_clip else input_ids.new_full(input_ids.shape[:1], input_ids.shape[1] - 1)
    x = tower.final_layer_norm(read_row(tower.encoder, x, rows, is_clip, seqlens))
    return x if is_clip else tower.head(x)


def _ends(tower: Any, input_ids: Tensor) -> Tensor:
    """Return the position [B] of the end of each text."""
    if tower.eos_token_id == 2:  # that of early configurations, which is wrong: the end has the largest id
        return input_ids.argmax(-1)
    return (input_ids == tower.eos_token_id).int().argmax(-1)


def _computes(tower: Any) -> bool:
    """Return True if our ops take tokens of ``tower``, which have the device and the dtype of its weights."""
    return computes(tower.encoder.layers[-1].layer_norm1.weight) if len(tower.encoder.layers) else False


def _records(tower: Any) -> bool:
    """Return True if the configuration asks for the rows of all blocks, or for their weights."""
    return any(getattr(tower.config, name, False) for name in ("output_hidden_states", "output_attentions"))
