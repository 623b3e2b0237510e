"""The launches of the patch embedding for patches that are laid out as a matrix; ``matrix_kernels.py`` explains why."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common import cdiv, matrix_tiles, new_rows
from ..configs import gemm_config, row_config
from ..hardware import architecture
from ..launch import RECORDED_MULTIPROCESSORS, arch_of, launch, multiprocessors
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
    images: Tensor, weight: Tensor, factors: tuple[Sequence[float], Sequence[float]], class_embedding: Tensor,
    positional_embedding: Tensor, keep: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the tokens [B, T, E] in ``dtype``. ``factors`` are the gains and shifts of each channel."""
    (embed_dim, _, _, patch_size), k = weight.shape, weight[0].numel()
    folded, bias = new_rows(weight, embed_dim, k, dtype), weight.new_empty(embed_dim, dtype=torch.float32)
    launch(
        _fold_kernel, (embed_dim,), weight.contiguous(), folded, bias, k, folded.stride(0),
        config=row_config("patch_embed_rows", arch_of(images.device), dtype), device=images.device,
        **_channels(factors, patch_size),
    )  # fmt: skip
    num_patches = len(positional_embedding) - 1
    tokens = 1 + (num_patches if keep is None else keep.shape[1])
    out = weight.new_empty(len(images), tokens, embed_dim, dtype=dtype)
    cfg = gemm_config("patch_embed_tokens", arch_of(images.device), dtype)
    parts = max(1, cfg.block_n // PART_COLS)
    for group, patches in _groups(images, keep, tokens, patch_size, dtype):
        rows, own_keep = len(patches), None if keep is None else keep[group].contiguous()
        launch(
            _tokens_kernel, (cdiv(rows, cfg.block_m) * cdiv(embed_dim, cfg.block_n),),
            matrix_tiles(patches, cfg.block_m, cfg.block_k), matrix_tiles(folded, cfg.block_n, cfg.block_k),
            matrix_tiles(out[group].flatten(0, 1), cfg.block_m, cfg.block_n // parts),
            bias, class_embedding.contiguous(), positional_embedding.contiguous(), own_keep,
            rows, tokens, num_patches, embed_dim, k,
            config=cfg, device=images.device, HAS_KEEP=keep is not None,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=parts,
        )  # fmt: skip
    return out


def backward_weight(
    grad: Tensor, images: Tensor, weight: Tensor, factors: tuple[Sequence[float], Sequence[float]],
    bias_grad: Tensor, keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the projection in float32; ``bias_grad`` is the gradient of the folded bias."""
    (_, tokens, embed_dim), patch_size, k = grad.shape, weight.shape[-1], weight[0].numel()
    cfg = gemm_config("patch_embed_weight_sums", arch_of(images.device), grad.dtype)
    tiles = cdiv(embed_dim, cfg.block_m) * cdiv(k, cfg.block_n)
    # With this number of splits, the programs of all tiles fill the GPU once.
    splits = max(1, multiprocessors(images.device, RECORDED_MULTIPROCESSORS) // tiles)
    grad, partials = _aligned(grad.contiguous()), []
    for group, patches in _groups(images, keep, tokens, patch_size, grad.dtype):
        rows = len(patches)
        per_split = cdiv(cdiv(rows, splits), cfg.block_k) * cfg.block_k
        partials.append(torch.empty(splits, embed_dim, k, dtype=torch.float32, device=grad.device))
        launch(
            _weight_sums_kernel, (tiles, splits),
            matrix_tiles(grad[group].flatten(0, 1), cfg.block_k, cfg.block_m),
            matrix_tiles(patches, cfg.block_k, cfg.block_n),
            partials[-1], rows, embed_dim, k, per_split,
            config=cfg, device=images.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        )  # fmt: skip
    partial = partials[0] if len(partials) == 1 else torch.cat(partials)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _unfold_grad_kernel, (embed_dim,), partial, bias_grad, out, len(partial), embed_dim, k,
        config=row_config("patch_embed_rows", arch_of(images.device), grad.dtype), device=images.device,
        **_channels(factors, patch_size),
    )  # fmt: skip
    return out


def _groups(
    images: Tensor, keep: Tensor | None, tokens: int, patch_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield groups of images, and their patches as a matrix with a row for each token; all groups use the same
    memory.
    """
    batch, k = len(images), images.shape[1] * patch_size**2
    group = min(batch, max(1, GROUP_BYTES // (tokens * k * dtype.itemsize)))
    group = cdiv(batch, cdiv(batch, group))  # makes all groups about equally large
    patches = new_rows(images, group * tokens, k, dtype)
    cfg = row_config("patch_embed_rows", arch_of(images.device), dtype)
    height, width = images.shape[2] // patch_size, images.shape[3] // patch_size
    for start in range(0, batch, group):
        own = slice(start, min(batch, start + group))
        rows = (own.stop - own.start) * tokens
        launch(
            _lay_out_kernel, (cdiv(rows, cfg.block_m),),
            images[own], None if keep is None else keep[own].contiguous(), patches,
            rows, tokens, height * width, k, width, patches.stride(0), *images.stride(),
            config=cfg, device=images.device, PATCH_SIZE=patch_size,
            IS_UINT8=images.dtype == torch.uint8, HAS_KEEP=keep is not None,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
        )  # fmt: skip
        yield own, patches[:rows]


def _channels(factors: tuple[Sequence[float], Sequence[float]], patch_size: int) -> dict[str, object]:
    """Return the constants of the kernels that fold the normalisation into the weight."""
    gains, shifts = factors
    return {"GAINS": tuple(gains), "SHIFTS": tuple(shifts), "PIXELS": patch_size**2, "BLOCK": BLOCK}


def _aligned(x: Tensor) -> Tensor:
    """Return a tensor that starts at a multiple of 16 bytes, as descriptors need: itself, or a copy."""
    return x.clone() if x.data_ptr() % 16 else x
