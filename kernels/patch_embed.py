"""Patch embedding from pixels to tokens in one kernel: gather, normalise, project, add class token and positions.

    token_0 = class + pos_0                  token_t = W p_t + pos_t,   t = 1 .. T - 1, p_t the pixels of patch t

For uint8 pixels u the normalisation (u/255 - mean)/std folds into the projection. Per channel c, v = (u - 128)/128:

    W' = W 128 / (255 std_c)     b' = sum_c W (128/255 - mean_c) / std_c     token_t = W' v_t + b' + pos_t

v is exact in bfloat16 and W' is of the size of W, so neither loses anything; and pixels cross PCIe and lie in memory as
bytes. Backward, with g = dL/dtoken:

    dpos = sum_B g      dclass = dpos_0      db' = sum_{t>0} dpos_t      dW' = sum_{B, t>0} g_t v_t^T
    dW = dW' 128 / (255 std_c) + db' (128/255 - mean_c) / std_c          dpixels = W^T g (floating images only)

FLOPs: 2 B T E C P^2 forward and for each of dW and dpixels. Bytes: one read of the pixels, one write of the tokens.
Method: the patch projection of Dosovitskiy et al. 2021 as an implicit GEMM.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu, reference
from ._launch import (
    accumulate_dtype,
    arch_of,
    autocast_to,
    check_float,
    check_tensor,
    launch,
    outside_autocast,
    triton_runs_on,
    uses_reference,
)
from .configs import gemm_config
from .reference import CLIP_MEAN, CLIP_STD

MAX_SPLITS = 32  # of the weight gradient's sum over patches
PATCHES_PER_SPLIT = 1024
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _patch_offsets(
    patches,  # [R] index of a patch in the batch
    NUM_PATCHES, GRID_W,
    stride_b, stride_h, stride_w,
    PATCH: tl.constexpr,
):  # fmt: skip
    """Offset of each patch's first pixel in the images, [R] int64."""
    image = (patches // NUM_PATCHES).to(tl.int64)
    patch = patches % NUM_PATCHES
    top = (patch // GRID_W * PATCH).to(tl.int64)
    left = (patch % GRID_W * PATCH).to(tl.int64)
    return image * stride_b + top * stride_h + left * stride_w


@triton.jit
def _pixel_offsets(
    k,  # [K] index into a flattened patch (channel, row, column)
    stride_c, stride_h, stride_w,
    PATCH: tl.constexpr,
):  # fmt: skip
    """Offset of each element of a patch from its first pixel, [K] int64."""
    channel = (k // (PATCH * PATCH)).to(tl.int64)
    row = (k // PATCH % PATCH).to(tl.int64)
    column = (k % PATCH).to(tl.int64)
    return channel * stride_c + row * stride_h + column * stride_w


@triton.jit
def _load_pixels(pointers, mask, dtype: tl.constexpr, IS_UINT8: tl.constexpr):
    """Pixels as a matrix operand, zero where masked; bytes as (u - 128) / 128, exact in every float format."""
    if IS_UINT8:
        return ((tl.load(pointers, mask=mask, other=128).to(tl.float32) - 128.0) * 0.0078125).to(dtype)
    return tl.load(pointers, mask=mask, other=0.0).to(dtype)


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,  # [B, C, H, W]
    weight_ptr,  # [E, K] contiguous, K = C P P
    bias_ptr,  # [E] fp32
    class_ptr,  # [E]
    pos_ptr,  # [T, E] contiguous
    out_ptr,  # [B, T, E] contiguous
    ROWS,  # B T
    T, E, K, GRID_W,
    stride_ib, stride_ic, stride_ih, stride_iw,
    PATCH: tl.constexpr, IS_UINT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M tokens x BLOCK_N dimensions; the class token is a row without pixels."""
    num_n = tl.cdiv(E, BLOCK_N)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = offs_m % T
    is_patch = (offs_m < ROWS) & (token > 0)
    mask_n = offs_n < E
    patches = tl.where(is_patch, offs_m // T * (T - 1) + token - 1, 0)
    first_pixel = images_ptr + _patch_offsets(patches, T - 1, GRID_W, stride_ib, stride_ih, stride_iw, PATCH)  # [BM]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        k = start_k + tl.arange(0, BLOCK_K)
        mask_k = k < K
        pixels = first_pixel[:, None] + _pixel_offsets(k, stride_ic, stride_ih, stride_iw, PATCH)[None, :]
        w_tile = weight_ptr + offs_n.to(tl.int64)[None, :] * K + k[:, None]
        w = tl.load(w_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BK, BN]
        x = _load_pixels(pixels, is_patch[:, None] & mask_k[None, :], w.dtype, IS_UINT8)  # [BM, BK]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    mask = (offs_m < ROWS)[:, None] & mask_n[None, :]
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
    class_token = tl.load(class_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc += tl.where(is_patch[:, None], bias[None, :], class_token[None, :])
    acc += tl.load(pos_ptr + token[:, None] * E + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * E + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    images_ptr,  # [B, C, H, W]
    grad_ptr,  # [B, T, E]
    partial_ptr,  # [SPLITS, E, K] fp32 contiguous
    PATCHES,  # B (T - 1)
    T, E, K, GRID_W, patches_per_split,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_gb, stride_gt, stride_ge,
    PATCH: tl.constexpr, IS_UINT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split] = sum over the split's patches of g p^T, in a fixed order; the splits are summed in order."""
    num_k = tl.cdiv(K, BLOCK_N)
    offs_e = tl.program_id(0) // num_k * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(0) % num_k * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_e = offs_e < E
    mask_k = offs_k < K
    pixel = _pixel_offsets(offs_k, stride_ic, stride_ih, stride_iw, PATCH)  # [BN]
    start = split * patches_per_split
    end = tl.minimum(start + patches_per_split, PATCHES)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_p in range(start, end, BLOCK_K):
        patches = start_p + tl.arange(0, BLOCK_K)
        mask_p = patches < end
        patches = tl.where(mask_p, patches, 0)
        token = patches // (T - 1) * stride_gb + (patches % (T - 1) + 1) * stride_gt  # [BK]
        g_tile = grad_ptr + token[None, :] + offs_e.to(tl.int64)[:, None] * stride_ge
        g = tl.load(g_tile, mask=mask_e[:, None] & mask_p[None, :], other=0.0).to(DTYPE)  # [BM, BK]
        first_pixel = _patch_offsets(patches, T - 1, GRID_W, stride_ib, stride_ih, stride_iw, PATCH)  # [BK]
        x = _load_pixels(
            images_ptr + first_pixel[:, None] + pixel[None, :], mask_p[:, None] & mask_k[None, :], DTYPE, IS_UINT8
        )  # [BK, BN]
        acc = tl.dot(g, x, acc, input_precision=PRECISION)
    partial = partial_ptr + split * E * K + offs_e.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(partial, acc, mask=mask_e[:, None] & mask_k[None, :])


@triton.jit
def _patch_embed_bwd_images_kernel(
    grad_ptr,  # [B, T, E]
    weight_ptr,  # [E, K] contiguous
    out_ptr,  # [B, C, H, W] contiguous
    PATCHES,  # B (T - 1)
    T, E, K, GRID_W,
    stride_gb, stride_gt, stride_ge, stride_ob, stride_oc, stride_oh,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dpixels = g W, stored where the forward read: every pixel belongs to one patch, so it has one writer."""
    num_n = tl.cdiv(K, BLOCK_N)
    patches = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = patches < PATCHES
    mask_n = offs_n < K
    token = patches // (T - 1) * stride_gb + (patches % (T - 1) + 1) * stride_gt  # [BM]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_e in range(0, E, BLOCK_K):
        offs_e = (start_e + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_e = offs_e < E
        w = tl.load(
            weight_ptr + offs_e[:, None] * K + offs_n[None, :], mask=mask_e[:, None] & mask_n[None, :], other=0.0
        )  # [BK, BN]
        g_tile = grad_ptr + token[:, None] + offs_e[None, :] * stride_ge
        g = tl.load(g_tile, mask=mask_m[:, None] & mask_e[None, :], other=0.0).to(w.dtype)  # [BM, BK]
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    first_pixel = _patch_offsets(patches, T - 1, GRID_W, stride_ob, stride_oh, 1, PATCH)
    pixels = out_ptr + first_pixel[:, None] + _pixel_offsets(offs_n, stride_oc, stride_oh, 1, PATCH)[None, :]
    tl.store(pixels, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _fwd_triton(
    images: Tensor, weight: Tensor, bias: Tensor, class_embedding: Tensor, positional_embedding: Tensor
) -> Tensor:
    batch, embed_dim, patch, tokens = len(images), len(weight), weight.shape[-1], len(positional_embedding)
    out = weight.new_empty(batch, tokens, embed_dim)
    cfg = gemm_config("patch_embed_fwd", arch_of(images.device), weight.dtype)
    launch(
        _patch_embed_fwd_kernel, (triton.cdiv(batch * tokens, cfg.block_m) * triton.cdiv(embed_dim, cfg.block_n),),
        images, weight.contiguous(), bias, class_embedding.contiguous(), positional_embedding.contiguous(), out,
        batch * tokens, tokens, embed_dim, weight[0].numel(), images.shape[3] // patch, *images.stride(),
        config=cfg, device=images.device, PATCH=patch, IS_UINT8=images.dtype == torch.uint8,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PRECISION="ieee",
    )  # fmt: skip
    return out


def _bwd_weight_triton(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    embed_dim, patch, tokens = len(weight), weight.shape[-1], grad.shape[1]
    patches, k = len(images) * (tokens - 1), weight[0].numel()
    cfg = gemm_config("patch_embed_bwd_weight", arch_of(images.device), weight.dtype)
    splits = max(1, min(MAX_SPLITS, patches // PATCHES_PER_SPLIT))
    per_split = triton.cdiv(triton.cdiv(patches, splits), cfg.block_k) * cfg.block_k
    partial = torch.empty(splits, *weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _patch_embed_bwd_weight_kernel, (triton.cdiv(embed_dim, cfg.block_m) * triton.cdiv(k, cfg.block_n), splits),
        images, grad, partial, patches, tokens, embed_dim, k, images.shape[3] // patch, per_split,
        *images.stride(), *grad.stride(),
        config=cfg, device=images.device, PATCH=patch, IS_UINT8=images.dtype == torch.uint8,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, DTYPE=TL_DTYPES[weight.dtype], PRECISION="ieee",
    )  # fmt: skip
    return partial.sum(0)


def _bwd_images_triton(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    patch, tokens, k = weight.shape[-1], grad.shape[1], weight[0].numel()
    patches = len(images) * (tokens - 1)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    cfg = gemm_config("patch_embed_bwd_images", arch_of(images.device), weight.dtype)
    launch(
        _patch_embed_bwd_images_kernel, (triton.cdiv(patches, cfg.block_m) * triton.cdiv(k, cfg.block_n),),
        grad, weight.contiguous(), out, patches, tokens, len(weight), k, images.shape[3] // patch,
        *grad.stride(), *out.stride()[:3],
        config=cfg, device=images.device, PATCH=patch,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PRECISION="ieee",
    )  # fmt: skip
    return out


def _fold(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """W' in the weight's dtype and b' in the accumulation dtype."""
    work = weight.to(accumulate_dtype(weight.dtype))
    folded = _scale_channels(work, _gains(std))
    bias = _scale_channels(work, _shifts(mean, std)).sum((1, 2, 3))
    return folded.to(weight.dtype), bias


def _unfold_grad(grad_folded: Tensor, grad_bias: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Gradient of W from those of W' and b'."""
    shift = _scale_channels(grad_bias[:, None, None, None].expand_as(grad_folded), _shifts(mean, std))
    return _scale_channels(grad_folded, _gains(std)) + shift


def _gains(std: Sequence[float]) -> list[float]:
    return [128 / (255 * s) for s in std]


def _shifts(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    return [(128 / 255 - m) / s for m, s in zip(mean, std, strict=True)]


def _scale_channels(weight: Tensor, factors: Sequence[float]) -> Tensor:
    # Channel by channel with numbers: a tensor of factors would be a copy to the device, which a CUDA graph cannot
    # capture.
    return torch.stack([weight[:, c] * factor for c, factor in enumerate(factors)], dim=1)


@torch.library.custom_op("clipfast::patch_embed_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    if images.dtype == torch.uint8:
        weight, bias = _fold(weight, mean, std)
    else:
        bias = weight.new_zeros(len(weight), dtype=accumulate_dtype(weight.dtype))
    fwd = _fwd_triton if triton_runs_on(images.device) else cpu.patch_embed_fwd
    return fwd(images, weight, bias, class_embedding, positional_embedding)


@_patch_embed_fwd.register_fake
def _(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    return weight.new_empty(images.shape[0], *positional_embedding.shape)


@torch.library.custom_op("clipfast::patch_embed_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _patch_embed_bwd(
    grad: Tensor, images: Tensor, weight: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and positions, in the accumulation dtype."""
    grad_pos = grad.sum(0, dtype=accumulate_dtype(weight.dtype))
    bwd = _bwd_weight_triton if triton_runs_on(images.device) else cpu.patch_embed_bwd_weight
    grad_weight = bwd(grad, images, weight)
    if images.dtype == torch.uint8:
        grad_weight = _unfold_grad(grad_weight, grad_pos[1:].sum(0), mean, std)
    return grad_weight, grad_pos


@_patch_embed_bwd.register_fake
def _(
    grad: Tensor, images: Tensor, weight: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    return weight.new_empty(weight.shape, dtype=dtype), grad.new_empty(grad.shape[1:], dtype=dtype)


@torch.library.custom_op("clipfast::patch_embed_bwd_images", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _patch_embed_bwd_images(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    bwd = _bwd_images_triton if triton_runs_on(images.device) else cpu.patch_embed_bwd_images
    return bwd(grad, images, weight)


@_patch_embed_bwd_images.register_fake
def _(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    return images.new_empty(images.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, class_embedding, positional_embedding, ctx.mean, ctx.std = inputs
    ctx.class_dtype, ctx.pos_dtype = class_embedding.dtype, positional_embedding.dtype
    ctx.save_for_backward(images, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    grad_images = torch.ops.clipfast.patch_embed_bwd_images(grad, images, weight) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:4]):
        return grad_images, None, None, None, None, None
    grad_weight, grad_pos = torch.ops.clipfast.patch_embed_bwd(grad, images, weight, ctx.mean, ctx.std)
    # a copy: autograd accumulates into what it is given, and two gradients must not share memory
    grad_class = grad_pos[0].to(ctx.class_dtype, copy=True)
    return grad_images, grad_weight.to(weight.dtype), grad_class, grad_pos.to(ctx.pos_dtype), None, None


_patch_embed_fwd.register_autograd(_backward, setup_context=_setup_context)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    backend: str = "auto",
) -> Tensor:
    """Tokens of a vision transformer from raw images: class token first, positions added.

    Args:
        images: [B, C, H, W], uint8 as decoded (normalised here) or floating (taken as already normalised); any
            strides, so that ``hwc.permute(0, 3, 1, 2)`` needs no copy. Gradients flow into floating images.
        weight: projection [E, C, P, P] without a bias, P dividing H and W. Under autocast it is taken in the autocast
            dtype.
        class_embedding: [E].
        positional_embedding: [1 + (H / P)(W / P), E].
        mean, std: per channel, for pixels scaled to [0, 1]; only uint8 images use them. Default: CLIP's.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, 1 + (H / P)(W / P), E] in the dtype of ``weight``, contiguous.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "patch_embed"
    check_tensor(op, "images", images, 4, also=(torch.uint8,))
    check_tensor(op, "weight", weight, 4)
    check_tensor(op, "class_embedding", class_embedding, 1)
    check_tensor(op, "positional_embedding", positional_embedding, 2)
    mean, std = _channel_values("mean", mean, images.shape[1]), _channel_values("std", std, images.shape[1])
    _check_shapes(images, weight, class_embedding, positional_embedding)
    weight = autocast_to(weight)
    if uses_reference(op, backend, images):
        return reference.patch_embed(images, weight, class_embedding, positional_embedding, mean=mean, std=std)
    check_float(op, "weight", weight)
    return _patch_embed_fwd(images, weight, class_embedding, positional_embedding, mean, std)


def _channel_values(name: str, values: Sequence[float], channels: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"patch_embed: {name} must be a sequence of numbers, got {values!r}") from error
    usable = all((0 if name == "std" else -math.inf) < number < math.inf for number in numbers)
    if len(numbers) != channels or not usable:
        kind = "positive" if name == "std" else "finite"
        raise ValueError(f"patch_embed: {name} must be {channels} {kind} numbers, one per channel, got {values!r}")
    return numbers


def _check_shapes(images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor) -> None:
    channels, height, width = images.shape[1:]
    embed_dim, patch = weight.shape[0], weight.shape[-1]
    if channels == 0 or patch == 0 or weight.shape[1:] != (channels, patch, patch):
        raise ValueError(
            f"patch_embed: weight must be [E, {channels}, P, P] for images {tuple(images.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if height % patch or width % patch or height * width == 0:
        raise ValueError(
            f"patch_embed: image size {height}x{width} is not a multiple of the patch size {patch}: "
            "resize or pad the images"
        )
    tokens = 1 + (height // patch) * (width // patch)
    if class_embedding.shape != (embed_dim,):
        raise ValueError(f"patch_embed: class_embedding must be [{embed_dim}], got {tuple(class_embedding.shape)}")
    if positional_embedding.shape != (tokens, embed_dim):
        raise ValueError(
            f"patch_embed: positional_embedding must be [{tokens}, {embed_dim}] "
            f"for {height}x{width} images and patch {patch}, got {tuple(positional_embedding.shape)}"
        )
    parameters = {"weight": weight, "class_embedding": class_embedding, "positional_embedding": positional_embedding}
    for name, tensor in parameters.items():
        if tensor.device != images.device:
            raise ValueError(f"patch_embed: {name} is on {tensor.device}, but images is on {images.device}")
