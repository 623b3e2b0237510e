"""The launches of the patch embedding for patches that are laid out as a matrix; ``matrix_kernels.py`` explains why.

As in ``launches``, they are planned for tensors of the arguments' layout.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import aligned_stride, cdiv, matrix_tiles, new_rows, new_tensors, slices
from ..configs import gemm_config, row_config
from ..hardware import architecture
from ..launch import RECORDED_MULTIPROCESSORS, Start, arch_of, multiprocessors, plan_start
from .fold import factors_of
from .matrix_kernels import _fold_kernel, _lay_out_kernel, _tokens_kernel, _unfold_grad_kernel, _weight_sums_kernel

# Images are taken in groups whose patches take at most this many bytes. This is little enough for free GPU memory, and
# enough for the idle time at the end of each launch not to matter.
GROUP_BYTES = 256 * 2**20
# Columns of tokens that a program stores at a time: those of a whole tile would take too many registers.
PART_COLS = 64
BLOCK = 256  # weights of a channel that the kernels which fold the normalisation into the weight take at a time


def is_laid_out(images: Tensor, dtype: torch.dtype, embed_dim: int) -> bool:
    """Return whether patches are laid out as a matrix for products of ``dtype``, which load it by tensor
    descriptors.
    """
    arch = architecture(arch_of(images.device))
    return arch.multiplies_from_shared and dtype.itemsize == 2 and embed_dim % 8 == 0 and images.numel() > 0


def forward(
    images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Callable[..., Tensor]:  # fmt: skip
    """Plan the tokens [B, T, E] of images, in ``dtype``."""
    (embed_dim, _, _, patch_size), k = weight.shape, weight[0].numel()
    new_bias = new_tensors(weight, (embed_dim,), torch.float32)
    fold = plan_start(
        _fold_kernel, (embed_dim,), k, aligned_stride(k, dtype),
        config=row_config("patch_embed_rows", arch_of(images.device), dtype), device=images.device,
        **_channels(factors_of(images, mean, std), patch_size),
    )  # fmt: skip
    num_patches = len(positional_embedding) - 1
    tokens = 1 + (num_patches if keep is None else keep.shape[1])
    new_out = new_tensors(weight, (len(images), tokens, embed_dim), dtype)
    groups_of = _plan_groups(images, keep, tokens, patch_size, dtype)
    cfg = gemm_config("patch_embed_tokens", arch_of(images.device), dtype)
    parts = max(1, cfg.block_n // PART_COLS)
    device, has_keep = images.device, keep is not None

    @functools.cache
    def start_of(rows: int) -> Start:
        """Plan the kernel for the tokens of a group of images."""
        return plan_start(
            _tokens_kernel, (cdiv(rows, cfg.block_m) * cdiv(embed_dim, cfg.block_n),),
            rows, tokens, num_patches, embed_dim, k, config=cfg, device=device, HAS_KEEP=has_keep,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=parts,
        )  # fmt: skip

    def compute(
        images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
        *_: Any,
    ) -> Tensor:  # fmt: skip
        """Embed images by the kernels, for tensors of the planned layout."""
        folded, bias = new_rows(weight, embed_dim, k, dtype), new_bias()
        fold(weight.contiguous(), folded, bias)
        folded_tiles = matrix_tiles(folded, cfg.block_n, cfg.block_k)
        parameters = bias, class_embedding.contiguous(), positional_embedding.contiguous()
        out: Tensor = new_out()
        for group, own_keep, patches in groups_of(images, keep):
            out_tiles = matrix_tiles(out[group].flatten(0, 1), cfg.block_m, cfg.block_n // parts)
            patch_tiles = matrix_tiles(patches, cfg.block_m, cfg.block_k)
            start_of(patches.shape[0])(patch_tiles, folded_tiles, out_tiles, *parameters, own_keep)
        return out

    return compute


def backward_weight(
    grad: Tensor, images: Tensor, weight: Tensor, factors: tuple[Sequence[float], Sequence[float]], keep: Tensor | None
) -> Callable[..., Tensor]:
    """Plan the gradient of the projection in float32. ``factors`` are the gains and shifts of each channel. The
    function gets grad, images, weight, keep, and the gradient of the folded bias.
    """
    (_, tokens, embed_dim), patch_size, k = grad.shape, weight.shape[-1], weight[0].numel()
    cfg = gemm_config("patch_embed_weight_sums", arch_of(images.device), grad.dtype)
    tiles = cdiv(embed_dim, cfg.block_m) * cdiv(k, cfg.block_n)
    # With this number of splits, the programs of all tiles fill the GPU once.
    splits = max(1, multiprocessors(images.device, RECORDED_MULTIPROCESSORS) // tiles)
    groups_of = _plan_groups(images, keep, tokens, patch_size, grad.dtype)
    device, rows_config = images.device, row_config("patch_embed_rows", arch_of(images.device), grad.dtype)

    @functools.cache
    def start_of(rows: int) -> Start:
        """Plan the kernel that sums over the tokens of a group of images."""
        per_split = cdiv(cdiv(rows, splits), cfg.block_k) * cfg.block_k
        return plan_start(
            _weight_sums_kernel, (tiles, splits), rows, embed_dim, k, per_split,
            config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        )  # fmt: skip

    @functools.cache
    def unfold_of(partials: int) -> Start:
        """Plan the kernel that adds up the partial sums."""
        return plan_start(
            _unfold_grad_kernel, (embed_dim,), partials, embed_dim, k,
            config=rows_config, device=device, **_channels(factors, patch_size),
        )  # fmt: skip

    def compute(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, bias_grad: Tensor) -> Tensor:
        """Compute the gradient of the projection, for tensors of the planned layout."""
        grad, partials = _aligned(grad.contiguous()), []
        for group, _, patches in groups_of(images, keep):
            partials.append(torch.empty(splits, embed_dim, k, dtype=torch.float32, device=grad.device))
            grad_tiles = matrix_tiles(grad[group].flatten(0, 1), cfg.block_k, cfg.block_m)
            start_of(patches.shape[0])(grad_tiles, matrix_tiles(patches, cfg.block_k, cfg.block_n), partials[-1])
        partial = partials[0] if len(partials) == 1 else torch.cat(partials)
        out = torch.empty(weight.shape, dtype=torch.float32, device=grad.device)
        unfold_of(partial.shape[0])(partial, bias_grad, out)
        return out

    return compute


def _plan_groups(
    images: Tensor, keep: Tensor | None, tokens: int, patch_size: int, dtype: torch.dtype
) -> Callable[..., Iterator[tuple[slice, Tensor | None, Tensor]]]:
    """Return the function that yields groups of images, for images and keep: the group, its part of keep, and its
    patches as a matrix with a row for each token. All groups use the same memory.
    """
    batch, k = len(images), images.shape[1] * patch_size**2
    group = min(batch, max(1, GROUP_BYTES // (tokens * k * dtype.itemsize)))
    group = cdiv(batch, cdiv(batch, group))  # makes all groups about equally large
    row_stride = aligned_stride(k, dtype)
    cfg = row_config("patch_embed_rows", arch_of(images.device), dtype)
    height, width = images.shape[2] // patch_size, images.shape[3] // patch_size
    groups = slices(batch, group)
    device, strides, is_uint8, has_keep = images.device, images.stride(), images.dtype == torch.uint8, keep is not None

    @functools.cache
    def start_of(rows: int) -> Start:
        """Plan the kernel that lays out the patches of a group of images."""
        return plan_start(
            _lay_out_kernel, (cdiv(rows, cfg.block_m),),
            rows, tokens, height * width, k, width, row_stride, *strides,
            config=cfg, device=device, PATCH_SIZE=patch_size, IS_UINT8=is_uint8, HAS_KEEP=has_keep,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
        )  # fmt: skip

    def groups_of(images: Tensor, keep: Tensor | None) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """Yield the groups of images, and lay out their patches, for tensors of the planned layout."""
        patches = new_rows(images, group * tokens, k, dtype)
        for own in groups:
            rows, own_keep = (own.stop - own.start) * tokens, None if keep is None else keep[own].contiguous()
            start_of(rows)(images[own], own_keep, patches)
            yield own, own_keep, patches[:rows]

    return groups_of


def _channels(factors: tuple[Sequence[float], Sequence[float]], patch_size: int) -> dict[str, object]:
    """Return the constants of the kernels that fold the normalisation into the weight."""
    gains, shifts = factors
    return {"GAINS": tuple(gains), "SHIFTS": tuple(shifts), "PIXELS": patch_size**2, "BLOCK": BLOCK}


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor that starts at a multiple of 16 bytes, as descriptors need: itself, or a copy."""
    return x.clone() if x.data_ptr() % 16 else x
