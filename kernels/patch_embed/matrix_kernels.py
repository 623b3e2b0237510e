"""The Triton kernels of the patch embedding on GPUs with tensor descriptors; ``op`` has the equations.

Patches are first laid out as a matrix, a row for each token, in the dtype of the products. Both products are then plain
matrix products, whose tiles are loaded through descriptors. If pixels were gathered and converted within the products,
as in ``kernels.py``, this work would be repeated for each tile of the embedding, and would take longer than the
products.
"""

import triton
import triton.language as tl

from ..tiles import halves_of_columns
from .kernels import _kept_patch, _load_pixels, _patch_offsets, _pixel_offsets, tokens_of_sums


@triton.jit
def _lay_out_kernel(
    images_ptr,  # [B, C, H, W]
    keep_ptr,  # [B, T - 1] contiguous
    patches_ptr,  # [B T, K] with rows of stride_p
    ROWS,  # B T
    T, NUM_PATCHES, K, GRID_W, stride_p,
    stride_ib, stride_ic, stride_ih, stride_iw,
    PATCH_SIZE: tl.constexpr, IS_UINT8: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Lay out the pixels of BLOCK_M tokens, BLOCK_N at a time; zeros for the class token and an index of no patch."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, index = (offs_m // T).to(tl.int64), offs_m % T - 1
    patch, has_pixels = _kept_patch(
        keep_ptr, image, index, (offs_m < ROWS) & (index >= 0), T - 1, NUM_PATCHES, HAS_KEEP
    )  # fmt: skip
    first_pixel = images_ptr + _patch_offsets(image, patch, GRID_W, stride_ib, stride_ih, stride_iw, PATCH_SIZE)
    for start_k in tl.range(0, K, BLOCK_N, num_stages=NUM_STAGES):
        k = start_k + tl.arange(0, BLOCK_N)
        pixels = first_pixel[:, None] + _pixel_offsets(k, stride_ic, stride_ih, stride_iw, PATCH_SIZE)[None, :]
        mask = has_pixels[:, None] & (k < K)[None, :]
        x = _load_pixels(pixels, mask, patches_ptr.dtype.element_ty, IS_UINT8)  # [BM, BN]
        out = patches_ptr + offs_m.to(tl.int64)[:, None] * stride_p + k[None, :]
        tl.store(out, x, mask=(offs_m < ROWS)[:, None] & (k < K)[None, :])


@triton.jit
def _fold_kernel(
    weight_ptr,  # [E, K] contiguous
    folded_ptr,  # [E, K] with rows of stride_f
    bias_ptr,  # [E] fp32
    K, stride_f,
    GAINS: tl.constexpr, SHIFTS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute W' = gain_c W and b' = sum of shift_c W for one dimension of the embedding; a channel has PIXELS
    weights.
    """
    e = tl.program_id(0).to(tl.int64)
    bias = 0.0
    for c in tl.static_range(len(GAINS)):
        for start in range(0, PIXELS, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            w = tl.load(weight_ptr + e * K + c * PIXELS + offs, mask=offs < PIXELS, other=0.0).to(tl.float32)
            folded = (w * GAINS[c]).to(folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + e * stride_f + c * PIXELS + offs, folded, mask=offs < PIXELS)
            bias += tl.sum(w, 0) * SHIFTS[c]
    tl.store(bias_ptr + e, bias)


@triton.jit
def _tokens_kernel(
    patches,  # [B T, K], tiles of [BM, BK]
    weight,  # [E, K], tiles of [BN, BK]
    out,  # [B T, E], tiles of [BM, BN / PARTS]
    bias_ptr,  # [E] fp32
    class_ptr,  # [E]
    pos_ptr,  # [1 + NUM_PATCHES, E] contiguous
    keep_ptr,  # [B, T - 1] contiguous
    ROWS,  # B T
    T, NUM_PATCHES, E, K,
    HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M tokens x BLOCK_N dimensions of the patch embedding from patches that are laid out as a matrix."""
    num_n = tl.cdiv(E, BLOCK_N)
    start_m, start_n = tl.program_id(0) // num_n * BLOCK_M, tl.program_id(0) % num_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        x = patches.load([start_m, start_k])  # [BM, BK]
        w = weight.load([start_n, start_k])  # [BN, BK]
        acc = tl.dot(x, w.T, acc)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    image, token = (offs_m // T).to(tl.int64), offs_m % T
    is_patch = (offs_m < ROWS) & (token > 0)
    patch, exists = _kept_patch(keep_ptr, image, token - 1, is_patch, T - 1, NUM_PATCHES, HAS_KEEP)
    position = tl.where(exists, patch + 1, tl.where(is_patch, -1, 0))
    _store_tokens(
        out, acc, position, offs_m < ROWS, start_m, start_n, bias_ptr, class_ptr, pos_ptr, E,
        HAS_KEEP, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


@triton.jit
def _store_tokens(
    out, acc, position, mask_m, start_m, start_n, bias_ptr, class_ptr, pos_ptr, E,
    HAS_KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add class token, bias and positions to sums of products [BM, BN], and store these tokens in PARTS groups of
    columns, one after another.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(acc, BLOCK_M, BLOCK_N)
        _store_tokens(
            out, left, position, mask_m, start_m, start_n, bias_ptr, class_ptr, pos_ptr, E,
            HAS_KEEP, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        _store_tokens(
            out, right, position, mask_m, start_m, start_n + HALF, bias_ptr, class_ptr, pos_ptr, E,
            HAS_KEEP, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < E
        mask = mask_m[:, None] & mask_n[None, :]
        tokens = tokens_of_sums(acc, position, offs_n, mask_n, mask, bias_ptr, class_ptr, pos_ptr, E, HAS_KEEP)
        out.store([start_m, start_n], tokens.to(out.dtype))


@triton.jit
def _weight_sums_kernel(
    grad,  # [B T, E], tiles of [BK, BM]
    patches,  # [B T, K], tiles of [BK, BN]
    partial_ptr,  # [SPLITS, E, K] fp32 contiguous
    ROWS,  # B T
    E, K, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute partial[split] = sum of g p^T over the tokens of the split, in order.

    rows_per_split is a multiple of BLOCK_K.
    """
    num_k = tl.cdiv(K, BLOCK_N)
    start_e, start_k = tl.program_id(0) // num_k * BLOCK_M, tl.program_id(0) % num_k * BLOCK_N
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_r in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, ROWS), BLOCK_K):
        g = grad.load([start_r, start_e])  # [BK, BM]
        x = patches.load([start_r, start_k])  # [BK, BN]
        acc = tl.dot(g.T, x, acc)
    offs_e, offs_k = tl.arange(0, BLOCK_M), start_k + tl.arange(0, BLOCK_N)
    partial = partial_ptr + (split.to(tl.int64) * E + start_e) * K + (offs_e[:, None] * K + offs_k[None, :])
    tl.store(partial, acc, mask=(start_e + offs_e < E)[:, None] & (offs_k < K)[None, :])


@triton.jit
def _unfold_grad_kernel(
    partial_ptr,  # [SPLITS, E, K] fp32 contiguous
    bias_grad_ptr,  # [E] fp32
    out_ptr,  # [E, K] fp32 contiguous
    SPLITS, E, K,
    GAINS: tl.constexpr, SHIFTS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dW = gain_c dW' + shift_c db' for one dimension of the embedding, with dW' the sum of its splits."""
    e = tl.program_id(0).to(tl.int64)
    bias_grad = tl.load(bias_grad_ptr + e)
    for c in tl.static_range(len(GAINS)):
        for start in range(0, PIXELS, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(SPLITS):
                partial = partial_ptr + (split * E + e) * K + c * PIXELS + offs
                total += tl.load(partial, mask=offs < PIXELS, other=0.0)
            dw = total * GAINS[c]
            if SHIFTS[c] != 0.0:
                dw += bias_grad * SHIFTS[c]
            tl.store(out_ptr + e * K + c * PIXELS + offs, dw, mask=offs < PIXELS)
