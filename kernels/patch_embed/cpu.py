"""The patch embedding on a CPU: the same functions as in ``launches``, in PyTorch.

Products are taken in float32 or more. Dropped patches are not gathered, so that memory stays as small as on a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype
from .fold import operands


def forward(
    images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the tokens [B, T, E] of images, in ``dtype``."""
    weight, bias = operands(images, weight, mean, std, dtype)
    dtype = accumulate_dtype(weight.dtype)
    patches = _patches(images, weight.shape[-1], dtype, keep)
    pos = positional_embedding.to(dtype)
    out = pos.new_empty(len(images), 1 + patches.shape[1], len(weight))
    out[:, 0] = class_embedding
    out[:, 1:] = F.linear(patches, weight.flatten(1).to(dtype), bias)
    return out.add_(pos if keep is None else pos[_positions(keep)]).to(weight.dtype)


def backward_weight(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Return the gradient of the weight with which ``forward`` embeds patches (for bytes, the folded weight), summed
    over these patches.
    """
    dtype = accumulate_dtype(weight.dtype)
    patches = _patches(images, weight.shape[-1], dtype, keep)
    return (grad[:, 1:].to(dtype).flatten(0, 1).T @ patches.flatten(0, 1)).view_as(weight)


def backward_positions(grad: Tensor, keep: Tensor | None, num_patches: int) -> Tensor:
    """Return the gradient of the patch embedding's positions, [1 + num_patches, E], in float32 or more."""
    dtype = accumulate_dtype(grad.dtype)
    if keep is None:
        return grad.sum(0, dtype=dtype)
    out = grad.new_zeros(1 + num_patches, grad.shape[2], dtype=dtype)
    # The order of the sum is fixed: it goes image by image, and each position occurs at most once in an image.
    for positions, gradient in zip(_positions(keep), grad, strict=True):
        out[positions] += gradient
    return out


def backward_images(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Return the gradient of floating images in the patch embedding, zero where a patch was dropped."""
    dtype = accumulate_dtype(weight.dtype)
    patches = (grad[:, 1:].to(dtype) @ weight.to(dtype).flatten(1)).unflatten(2, weight.shape[1:])
    out = torch.zeros_like(images, memory_format=torch.contiguous_format)
    grid = _grid(out, weight.shape[-1])
    if keep is None:
        grid.copy_(patches.unflatten(1, grid.shape[1:3]))
    else:
        grid[_at(keep, grid)] = patches.to(out.dtype)
    return out


def _grid(images: Tensor, patch_size: int) -> Tensor:
    """Return the view [B, H / P, W / P, C, P, P] of images [B, C, H, W]."""
    height, width = images.shape[2:]
    grid = images.unflatten(3, (width // patch_size, patch_size)).unflatten(2, (height // patch_size, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5)


def _at(keep: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, row and column of each kept patch, as indices into the view that :func:`_grid` returns."""
    keep = keep.long()
    return torch.arange(len(keep))[:, None], keep // grid.shape[2], keep % grid.shape[2]


def _positions(keep: Tensor) -> Tensor:
    """Return the position of each token of an image, [B, 1 + K], for kept patches; the class token has position 0."""
    return F.pad(keep.long() + 1, (1, 0))


def _patches(images: Tensor, patch_size: int, dtype: torch.dtype, keep: Tensor | None) -> Tensor:
    """Return the embedded patches of [B, C, H, W] as rows, [B, T - 1, C P P], with bytes mapped to [-1, 1)."""
    grid = _grid(images, patch_size)
    kept = grid.flatten(1, 2) if keep is None else grid[_at(keep, grid)]
    patches = kept.flatten(2).to(dtype)
    return patches.sub_(128).div_(128) if images.dtype == torch.uint8 else patches
