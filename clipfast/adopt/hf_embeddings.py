"""The embeddings of transformers' CLIP, SigLIP and SigLIP 2: patches and texts become tokens in one pass."""

from typing import Any

import torch
from torch import Tensor

from ..kernels import patch_embed, text_embed
from .embeddings import is_projection, is_table
from .hf_parts import OTHER_VERSION, has_known_arguments, hf_part
from .places import ON_GPUS, Proposal, computes, is_left, on_cpus


def propose_hf_embeddings(module: Any) -> Proposal | None:
    """Say what to do with the embeddings of a tower; None if ``module`` is none."""
    family, part = hf_part(module)
    if part not in ("VisionEmbeddings", "TextEmbeddings"):
        return None
    kind = "text_embed" if part == "TextEmbeddings" else "patch_embed"
    if (family, part) == ("Siglip", "VisionEmbeddings"):
        return Proposal(kind, "its convolution has a bias, and there is no class token")
    if (family, part) == ("Siglip2", "VisionEmbeddings"):
        return Proposal(kind, "images come as patches, and a linear layer projects them")
    if not has_known_arguments(module):
        return Proposal(kind, OTHER_VERSION)
    if part == "TextEmbeddings":
        refusal = "" if _are_tables(module) else "its tables have a hook, or do more than look up"
        return Proposal(kind, refusal) if refusal else Proposal(kind, f"clipfast.text_embed{ON_GPUS}", text_tokens)
    if not is_projection(module.patch_embedding) or not is_table(module.position_embedding):
        return Proposal(kind, "its convolution has a hook, or is not a projection of square patches without a bias")
    return Proposal(kind, "clipfast.patch_embed", image_tokens)


def _are_tables(module: Any) -> bool:
    return is_table(module.token_embedding) and is_table(module.position_embedding)


@on_cpus
def image_tokens(module: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    """Compute ``CLIPVisionEmbeddings``: [B, C, H, W] -> [B, 1 + patches, E]."""
    conv, positions = module.patch_embedding, module.position_embedding
    if interpolate_pos_encoding or not _is_whole(module, pixel_values):
        return type(module).forward(module, pixel_values, interpolate_pos_encoding)
    images = pixel_values.to(conv.weight.dtype)
    tokens = patch_embed(images, conv.weight, module.class_embedding, positions.weight)
    return tokens.to(positions.weight.dtype)  # theirs has this dtype under autocast too


def _is_whole(module: Any, images: Tensor) -> bool:
    """Return True if our op takes ``images`` and the weights."""
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
    # Under autocast, these tokens keep the dtype of the table, as theirs do.
    with torch.autocast(input_ids.device.type, enabled=False):
        return text_embed(input_ids, module.token_embedding.weight, module.position_embedding.weight)


def _is_text(module: Any, text: Tensor) -> bool:
    """Return True if our op takes ``text`` and the tables."""
    if not _are_tables(module) or text.ndim != 2 or text.dtype not in (torch.int32, torch.int64):
        return False
    table, positions = module.token_embedding.weight, module.position_embedding.weight
    is_same = text.shape[1] <= len(positions) and table.dtype == positions.dtype
    return is_same and computes(table) and not is_left(table)
