"""The ops on a CPU: the same blockwise algorithms in PyTorch, so that memory stays as small as on a GPU.

Products go through PyTorch, in float32 at least. Arguments and results are those of the launchers in the op's own file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import accumulate_dtype


def _patches(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """[B, C, H, W] -> [B, (H / P)(W / P), C P P], bytes brought to [-1, 1)."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    patches = grid.reshape(batch, (height // patch) * (width // patch), channels * patch * patch).to(dtype)
    return patches.sub_(128).div_(128) if images.dtype == torch.uint8 else patches


def patch_embed_fwd(
    images: Tensor, weight: Tensor, bias: Tensor, class_embedding: Tensor, positional_embedding: Tensor
) -> Tensor:
    """Tokens; ``weight`` and ``bias`` are folded for bytes."""
    dtype = accumulate_dtype(weight.dtype)
    patches = _patches(images, weight.shape[-1], dtype)
    pos = positional_embedding.to(dtype)
    out = pos.new_empty(len(images), *pos.shape)
    out[:, 0] = class_embedding
    out[:, 1:] = F.linear(patches, weight.flatten(1).to(dtype), bias)
    return out.add_(pos).to(weight.dtype)


def patch_embed_bwd_weight(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the (folded) weight, summed over all patches."""
    dtype = accumulate_dtype(weight.dtype)
    patches = _patches(images, weight.shape[-1], dtype)
    return (grad[:, 1:].to(dtype).flatten(0, 1).T @ patches.flatten(0, 1)).view_as(weight)


def patch_embed_bwd_images(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Gradient of floating images."""
    batch, channels, height, width = images.shape
    patch = weight.shape[-1]
    dtype = accumulate_dtype(weight.dtype)
    patches = grad[:, 1:].to(dtype) @ weight.to(dtype).flatten(1)
    grid = patches.view(batch, height // patch, width // patch, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(images.shape).to(images.dtype).contiguous()
