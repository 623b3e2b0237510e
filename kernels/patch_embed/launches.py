"""The launches of the patch embedding's Triton kernels that gather the pixels of patches within the product.

``forward``, ``backward_weight`` and ``backward_positions`` plan launches for tensors of the arguments' layout, and
return the function that starts them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..common import cdiv, new_tensors
from ..configs import gemm_config, row_config
from ..launch import arch_of, launch, plan_start
from .fold import operands
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
    images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Callable[..., Tensor]:  # fmt: skip
    """Plan the tokens [B, T, E] of images, in ``dtype``."""
    batch, embed_dim, patch_size = len(images), len(weight), weight.shape[-1]
    num_patches = len(positional_embedding) - 1
    tokens = 1 + (num_patches if keep is None else keep.shape[1])
    cfg = gemm_config("patch_embed_fwd", arch_of(images.device), dtype)
    start = plan_start(
        _patch_embed_fwd_kernel, (cdiv(batch * tokens, cfg.block_m) * cdiv(embed_dim, cfg.block_n),),
        batch * tokens, tokens, num_patches, embed_dim, weight[0].numel(),
        images.shape[3] // patch_size, *images.stride(),
        config=cfg, device=images.device,
        PATCH_SIZE=patch_size, IS_UINT8=images.dtype == torch.uint8, HAS_KEEP=keep is not None,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
    )  # fmt: skip
    new_out = new_tensors(weight, (batch, tokens, embed_dim), dtype)

    def compute(
        images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
        *_: Any,
    ) -> Tensor:  # fmt: skip
        """Embed images by the kernel, for tensors of the planned layout."""
        weight, bias = operands(images, weight, mean, std, dtype)
        out: Tensor = new_out()
        parameters = weight.contiguous(), bias, class_embedding.contiguous(), positional_embedding.contiguous()
        start(images, *parameters, _contiguous(keep), out)
        return out

    return compute


def backward_weight(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Callable[..., Tensor]:
    """Plan the gradient of the weight with which ``forward`` embeds patches (for bytes, the folded weight), in float32,
    summed over these patches. The function gets the same arguments.
    """
    embed_dim, patch_size, kept = len(weight), weight.shape[-1], grad.shape[1] - 1
    rows, k = len(images) * kept, weight[0].numel()
    cfg = gemm_config("patch_embed_bwd_weight", arch_of(images.device), grad.dtype)
    splits = max(1, min(MAX_SPLITS, rows // PATCHES_PER_SPLIT))
    per_split = cdiv(cdiv(rows, splits), cfg.block_k) * cfg.block_k
    new_partial = new_tensors(weight, (splits, *weight.shape), torch.float32)
    start = plan_start(
        _patch_embed_bwd_weight_kernel, (cdiv(embed_dim, cfg.block_m) * cdiv(k, cfg.block_n), splits),
        rows, kept, num_patches_of(images, patch_size), embed_dim, k,
        images.shape[3] // patch_size, per_split, *images.stride(), *grad.stride(),
        config=cfg, device=images.device,
        PATCH_SIZE=patch_size, IS_UINT8=images.dtype == torch.uint8, HAS_KEEP=keep is not None,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, DTYPE=TL_DTYPES[grad.dtype],
    )  # fmt: skip

    def compute(grad: Tensor, images: Tensor, _: Tensor, keep: Tensor | None) -> Tensor:
        """Compute the gradient of the patch embedding's weight, for tensors of the planned layout."""
        partial: Tensor = new_partial()
        start(images, grad, _contiguous(keep), partial)
        return partial.sum(0) if splits > 1 else partial[0]

    return compute


def backward_positions(grad: Tensor, keep: Tensor | None, num_patches: int) -> Callable[..., Tensor]:
    """Plan the gradient of the patch embedding's positions, [1 + num_patches, E], in float32. The function gets grad
    and keep.
    """
    if keep is None:
        # Each position belongs to one token of every image, so PyTorch's sum reads each gradient once as well.
        return lambda grad, _: grad.sum(0, dtype=torch.float32)
    batch, tokens, embed_dim = grad.shape
    cfg = row_config("patch_embed_bwd_pos", arch_of(grad.device), grad.dtype)
    new_out = new_tensors(grad, (1 + num_patches, embed_dim), torch.float32)
    find_tokens = plan_start(
        _token_of_position_kernel, (cdiv(batch * tokens, TOKENS_PER_PROGRAM),), batch, tokens - 1, num_patches,
        config=cfg, device=grad.device, BLOCK=TOKENS_PER_PROGRAM,
    )  # fmt: skip
    sum_up = plan_start(
        _patch_embed_bwd_pos_kernel, ((1 + num_patches) * cdiv(embed_dim, cfg.block_n),),
        batch, embed_dim, *grad.stride(),
        config=cfg, device=grad.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip

    def compute(grad: Tensor, keep: Tensor) -> Tensor:
        """Compute the gradient of the patch embedding's positions, for tensors of the planned layout."""
        token = torch.full((1 + num_patches, batch), -1, dtype=torch.int32, device=grad.device)
        out: Tensor = new_out()
        find_tokens(keep.contiguous(), token)
        sum_up(grad, token, out)
        return out

    return compute


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
