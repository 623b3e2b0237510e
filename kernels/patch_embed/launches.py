"""The launches of the patch embedding's Triton kernels that gather the pixels of patches within the product."""

import torch
import triton.language as tl
from torch import Tensor

from ..common import cdiv
from ..configs import gemm_config, row_config
from ..launch import arch_of, launch
from .kernels import (
    _patch_embed_bwd_images_kernel,
    _patch_embed_bwd_pos_kernel,
    _patch_embed_bwd_weight_kernel,
    _patch_embed_fwd_kernel,
    _token_of_position_kernel,
)

# The gradient of the weight is a sum over patches. It is split into at most MAX_SPLITS partial sums, each over at least
# PATCHES_PER_SPLIT patches.
MAX_SPLITS = 32
PATCHES_PER_SPLIT = 1024
TOKENS_PER_PROGRAM = 512  # in the kernel that finds the token of each position; a thread takes a few of them
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def forward(
    images: Tensor, weight: Tensor, bias: Tensor, class_embedding: Tensor, positional_embedding: Tensor,
    keep: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the tokens [B, T, E] of images. For bytes, ``weight`` and ``bias`` hold the folded normalisation."""
    batch, embed_dim, patch_size = len(images), len(weight), weight.shape[-1]
    num_patches = len(positional_embedding) - 1
    tokens = 1 + (num_patches if keep is None else keep.shape[1])
    out = weight.new_empty(batch, tokens, embed_dim)
    cfg = gemm_config("patch_embed_fwd", arch_of(images.device), weight.dtype)
    launch(
        _patch_embed_fwd_kernel, (cdiv(batch * tokens, cfg.block_m) * cdiv(embed_dim, cfg.block_n),),
        images, weight.contiguous(), bias, class_embedding.contiguous(), positional_embedding.contiguous(),
        _contiguous(keep), out, batch * tokens, tokens, num_patches, embed_dim, weight[0].numel(),
        images.shape[3] // patch_size, *images.stride(),
        config=cfg, device=images.device,
        PATCH_SIZE=patch_size, IS_UINT8=images.dtype == torch.uint8, HAS_KEEP=keep is not None,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
    )  # fmt: skip
    return out


def backward_weight(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Return the gradient of the weight with which ``forward`` embeds patches (for bytes, the folded weight), in
    float32, summed over these patches.
    """
    embed_dim, patch_size, kept = len(weight), weight.shape[-1], grad.shape[1] - 1
    rows, k = len(images) * kept, weight[0].numel()
    cfg = gemm_config("patch_embed_bwd_weight", arch_of(images.device), grad.dtype)
    splits = max(1, min(MAX_SPLITS, rows // PATCHES_PER_SPLIT))
    per_split = cdiv(cdiv(rows, splits), cfg.block_k) * cfg.block_k
    partial = torch.empty(splits, *weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _patch_embed_bwd_weight_kernel, (cdiv(embed_dim, cfg.block_m) * cdiv(k, cfg.block_n), splits),
        images, grad, _contiguous(keep), partial, rows, kept, num_patches_of(images, patch_size), embed_dim, k,
        images.shape[3] // patch_size, per_split, *images.stride(), *grad.stride(),
        config=cfg, device=images.device,
        PATCH_SIZE=patch_size, IS_UINT8=images.dtype == torch.uint8, HAS_KEEP=keep is not None,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, DTYPE=TL_DTYPES[grad.dtype],
    )  # fmt: skip
    return partial.sum(0)


def backward_positions(grad: Tensor, keep: Tensor | None, num_patches: int) -> Tensor:
    """Return the gradient of the patch embedding's positions, [1 + num_patches, E], in float32."""
    if keep is None:
        # Each position belongs to one token of every image, so PyTorch's sum reads each gradient once as well.
        return grad.sum(0, dtype=torch.float32)
    batch, tokens, embed_dim = grad.shape
    cfg = row_config("patch_embed_bwd_pos", arch_of(grad.device), grad.dtype)
    token = torch.full((1 + num_patches, batch), -1, dtype=torch.int32, device=grad.device)
    out = torch.empty(1 + num_patches, embed_dim, dtype=torch.float32, device=grad.device)
    launch(
        _token_of_position_kernel, (cdiv(batch * tokens, TOKENS_PER_PROGRAM),),
        keep.contiguous(), token, batch, tokens - 1, num_patches,
        config=cfg, device=grad.device, BLOCK=TOKENS_PER_PROGRAM,
    )  # fmt: skip
    launch(
        _patch_embed_bwd_pos_kernel, ((1 + num_patches) * cdiv(embed_dim, cfg.block_n),),
        grad, token, out, batch, embed_dim, *grad.stride(),
        config=cfg, device=grad.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    return out


def backward_images(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Return the gradient of floating images in the patch embedding, zero where a patch was dropped."""
    patch_size, kept, k = weight.shape[-1], grad.shape[1] - 1, weight[0].numel()
    rows = len(images) * kept
    empty = torch.empty_like if keep is None else torch.zeros_like
    out = empty(images, memory_format=torch.contiguous_format)
    cfg = gemm_config("patch_embed_bwd_images", arch_of(images.device), weight.dtype)
    launch(
        _patch_embed_bwd_images_kernel, (cdiv(rows, cfg.block_m) * cdiv(k, cfg.block_n),),
        grad, weight.contiguous(), _contiguous(keep), out,
        rows, kept, num_patches_of(images, patch_size), len(weight), k, images.shape[3] // patch_size,
        *grad.stride(), *out.stride()[:3],
        config=cfg, device=images.device, PATCH_SIZE=patch_size, HAS_KEEP=keep is not None,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
    )  # fmt: skip
    return out


def num_patches_of(images: Tensor, patch_size: int) -> int:
    """Return the number of patches of each of ``images`` [B, C, H, W]."""
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _contiguous(keep: Tensor | None) -> Tensor | None:
    """Return the indices of kept patches as a contiguous tensor."""
    return None if keep is None else keep.contiguous()
