"""The Triton kernels of the patch embedding; ``op`` has the equations.

A row of a product is a token. Token 1 + i of an image is its patch i or, if patches are dropped, its patch keep[i].
The index of the patch is known before a pixel is loaded, so dropped patches are never read.
"""

import triton
import triton.language as tl


@triton.jit
def _image_and_index(
    first,  # int64
    offsets,  # [R] int32
    PER_IMAGE,
):  # fmt: skip
    """Return the image of each row ``first + offsets``, int64, and the row's index in the image, int32.

    Each image has PER_IMAGE rows. A division in 64 bits is a function call. Only numbers that are the same for a whole
    program are divided in 64 bits here, and the compiler moves these divisions out of loops.
    """
    index = (first % PER_IMAGE).to(tl.int32) + offsets
    return first // PER_IMAGE + index // PER_IMAGE, index % PER_IMAGE


@triton.jit
def _kept_patch(
    keep_ptr,  # [B, KEPT] contiguous, unused if HAS_KEEP is false
    image, index,  # [R], [R]
    mask,  # [R]
    KEPT, NUM_PATCHES,
    HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """Return the index-th kept patch of each row's image, [R], and whether the image has a patch with that
    number, [R].
    """
    patch = index
    if HAS_KEEP:
        patch = tl.load(keep_ptr + image * KEPT + index, mask=mask, other=-1)
        mask = (patch >= 0) & (patch < NUM_PATCHES)
        patch = patch.to(tl.int32)
    return patch, mask


@triton.jit
def _patch_offsets(
    image, patch,  # [R] int64, [R]
    GRID_W,
    stride_b, stride_h, stride_w,
    PATCH_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the offset of each patch's first pixel in the images, [R] int64."""
    top = (patch // GRID_W * PATCH_SIZE).to(tl.int64)
    left = (patch % GRID_W * PATCH_SIZE).to(tl.int64)
    return image * stride_b + top * stride_h + left * stride_w


@triton.jit
def _pixel_offsets(
    k,  # [K] index into a flattened patch (channel, row, column)
    stride_c, stride_h, stride_w,
    PATCH_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the offset of each element of a patch from its first pixel, [K] int64."""
    channel = (k // (PATCH_SIZE * PATCH_SIZE)).to(tl.int64)
    row = (k // PATCH_SIZE % PATCH_SIZE).to(tl.int64)
    column = (k % PATCH_SIZE).to(tl.int64)
    return channel * stride_c + row * stride_h + column * stride_w


@triton.jit
def _load_pixels(pointers, mask, dtype: tl.constexpr, IS_UINT8: tl.constexpr):
    """Load pixels as a matrix operand, 0 where masked. A byte u becomes (u - 128) / 128, exact in any float format."""
    if IS_UINT8:
        return ((tl.load(pointers, mask=mask, other=128).to(tl.float32) - 128.0) * 0.0078125).to(dtype)
    return tl.load(pointers, mask=mask, other=0.0).to(dtype)


@triton.jit
def tokens_of_sums(
    acc,  # [BM, BN] fp32
    position,  # [BM], -1 for an index that belongs to no patch
    offs_n, mask_n,  # [BN]
    mask,  # [BM, BN]
    bias_ptr, class_ptr, pos_ptr, E,
    HAS_KEEP: tl.constexpr,
):  # fmt: skip
    """Return tokens from the products of patches and weight: add the class token or the bias, and the positions."""
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
    class_token = tl.load(class_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    acc += tl.where((position == 0)[:, None], class_token[None, :], bias[None, :])
    pos = pos_ptr + position.to(tl.int64)[:, None] * E + offs_n[None, :]
    acc += tl.load(pos, mask=mask & (position >= 0)[:, None], other=0.0).to(tl.float32)
    if HAS_KEEP:
        acc = tl.where((position < 0)[:, None], float("nan"), acc)  # NaN marks the token of an index of no patch
    return acc


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,  # [B, C, H, W]
    weight_ptr,  # [E, K] contiguous, K = C P P
    bias_ptr,  # [E] fp32
    class_ptr,  # [E]
    pos_ptr,  # [1 + NUM_PATCHES, E] contiguous
    keep_ptr,  # [B, T - 1] contiguous
    out_ptr,  # [B, T, E] contiguous
    ROWS,  # B T
    T, NUM_PATCHES, E, K, GRID_W,
    stride_ib, stride_ic, stride_ih, stride_iw,
    PATCH_SIZE: tl.constexpr, IS_UINT8: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M tokens x BLOCK_N dimensions of the patch embedding. The class token is a row without pixels."""
    num_n = tl.cdiv(E, BLOCK_N)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.where(offs_m < ROWS, offs_m % T, 0).to(tl.int32)
    is_patch = token > 0
    mask_n = offs_n < E
    image = offs_m // T
    patch, has_pixels = _kept_patch(keep_ptr, image, token - 1, is_patch, T - 1, NUM_PATCHES, HAS_KEEP)
    first_pixel = images_ptr + _patch_offsets(image, patch, GRID_W, stride_ib, stride_ih, stride_iw, PATCH_SIZE)  # [BM]
    # The loop needs only one number for each row: its position, or -1 if its index belongs to no patch.
    position = token
    if HAS_KEEP:
        position = tl.where(has_pixels, patch + 1, tl.where(is_patch, -1, 0))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        k = start_k + tl.arange(0, BLOCK_K)
        mask_k = k < K
        pixels = first_pixel[:, None] + _pixel_offsets(k, stride_ic, stride_ih, stride_iw, PATCH_SIZE)[None, :]
        w_tile = weight_ptr + offs_n.to(tl.int64)[None, :] * K + k[:, None]
        w = tl.load(w_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BK, BN]
        x = _load_pixels(pixels, (position > 0)[:, None] & mask_k[None, :], w.dtype, IS_UINT8)  # [BM, BK]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    mask = (offs_m < ROWS)[:, None] & mask_n[None, :]
    tokens = tokens_of_sums(acc, position, offs_n, mask_n, mask, bias_ptr, class_ptr, pos_ptr, E, HAS_KEEP)
    tl.store(out_ptr + offs_m[:, None] * E + offs_n[None, :], tokens.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    images_ptr,  # [B, C, H, W]
    grad_ptr,  # [B, 1 + KEPT, E]
    keep_ptr,  # [B, KEPT] contiguous
    partial_ptr,  # [SPLITS, E, K] fp32 contiguous
    ROWS,  # B KEPT
    KEPT, NUM_PATCHES, E, K, GRID_W, rows_per_split,
    stride_ib, stride_ic, stride_ih, stride_iw, stride_gb, stride_gt, stride_ge,
    PATCH_SIZE: tl.constexpr, IS_UINT8: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute partial[split] = sum of g p^T over the patches of the split, in order. PyTorch then sums the splits."""
    num_k = tl.cdiv(K, BLOCK_N)
    offs_e = tl.program_id(0) // num_k * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(0) % num_k * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_e = offs_e < E
    mask_k = offs_k < K
    pixel = _pixel_offsets(offs_k, stride_ic, stride_ih, stride_iw, PATCH_SIZE)  # [BN]
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, ROWS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_r in range(start, end, BLOCK_K):
        mask_r = start_r + tl.arange(0, BLOCK_K) < end
        image, index = _image_and_index(start, (start_r - start).to(tl.int32) + tl.arange(0, BLOCK_K), KEPT)
        patch, mask_r = _kept_patch(keep_ptr, image, index, mask_r, KEPT, NUM_PATCHES, HAS_KEEP)
        token = image * stride_gb + (index + 1).to(tl.int64) * stride_gt  # [BK]
        g_tile = grad_ptr + token[None, :] + offs_e.to(tl.int64)[:, None] * stride_ge
        g = tl.load(g_tile, mask=mask_e[:, None] & mask_r[None, :], other=0.0).to(DTYPE)  # [BM, BK]
        first_pixel = _patch_offsets(image, patch, GRID_W, stride_ib, stride_ih, stride_iw, PATCH_SIZE)  # [BK]
        x = _load_pixels(
            images_ptr + first_pixel[:, None] + pixel[None, :], mask_r[:, None] & mask_k[None, :], DTYPE, IS_UINT8
        )  # [BK, BN]
        acc = tl.dot(g, x, acc, input_precision="ieee")
    partial = partial_ptr + split * E * K + offs_e.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(partial, acc, mask=mask_e[:, None] & mask_k[None, :])


@triton.jit
def _token_of_position_kernel(
    keep_ptr,  # [B, KEPT] contiguous
    token_ptr,  # [1 + NUM_PATCHES, B] int32 contiguous, filled with -1
    B, KEPT, NUM_PATCHES,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write token[p, b], the token of image b to which position p was added; it stays -1 if the patch was dropped."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image, token = tokens // (1 + KEPT), tokens % (1 + KEPT)
    mask = image < B
    is_patch = mask & (token > 0)
    patch = tl.load(keep_ptr + image * KEPT + token - 1, mask=is_patch, other=0).to(tl.int64)
    position = tl.where(is_patch, patch + 1, 0)
    mask = mask & (position >= 0) & (position <= NUM_PATCHES) & (is_patch == (position > 0))
    tl.store(token_ptr + position * B + image, token.to(tl.int32), mask=mask)


@triton.jit
def _patch_embed_bwd_pos_kernel(
    grad_ptr,  # [B, T, E]
    token_ptr,  # [1 + NUM_PATCHES, B] int32 contiguous
    out_ptr,  # [1 + NUM_PATCHES, E] fp32 contiguous
    B, E,
    stride_gb, stride_gt, stride_ge,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one position, image by image, so that each row of the tokens' gradient is read once."""
    num_e = tl.cdiv(E, BLOCK_N)
    position = (tl.program_id(0) // num_e).to(tl.int64)
    offs_e = tl.program_id(0) % num_e * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_e = offs_e < E
    columns = offs_e.to(tl.int64)[None, :] * stride_ge
    # acc sums tiles element by element, so that loads overlap. Its rows are added up once, after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_b in tl.range(0, B, BLOCK_M, num_stages=NUM_STAGES):
        image = (start_b + tl.arange(0, BLOCK_M)).to(tl.int64)
        token = tl.load(token_ptr + position * B + image, mask=image < B, other=-1)  # [BM]
        g_tile = grad_ptr + (image * stride_gb + token.to(tl.int64) * stride_gt)[:, None] + columns
        acc += tl.load(g_tile, mask=(token >= 0)[:, None] & mask_e[None, :], other=0.0).to(tl.float32)  # [BM, BN]
    tl.store(out_ptr + position * E + offs_e, tl.sum(acc, 0), mask=mask_e)


@triton.jit
def _patch_embed_bwd_images_kernel(
    grad_ptr,  # [B, 1 + KEPT, E]
    weight_ptr,  # [E, K] contiguous
    keep_ptr,  # [B, KEPT] contiguous
    out_ptr,  # [B, C, H, W] contiguous
    ROWS,  # B KEPT
    KEPT, NUM_PATCHES, E, K, GRID_W,
    stride_gb, stride_gt, stride_ge, stride_ob, stride_oc, stride_oh,
    PATCH_SIZE: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dpixels = g W and store it at the pixels that forward read. A pixel is in one patch, so it has one
    writer.
    """
    num_n = tl.cdiv(K, BLOCK_N)
    start_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    image, index = _image_and_index(start_m, tl.arange(0, BLOCK_M), KEPT)
    patch, mask_m = _kept_patch(keep_ptr, image, index, rows < ROWS, KEPT, NUM_PATCHES, HAS_KEEP)
    token = image * stride_gb + (index + 1).to(tl.int64) * stride_gt  # [BM]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_e in range(0, E, BLOCK_K):
        offs_e = (start_e + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_e = offs_e < E
        w = tl.load(
            weight_ptr + offs_e[:, None] * K + offs_n[None, :], mask=mask_e[:, None] & mask_n[None, :], other=0.0
        )  # [BK, BN]
        g_tile = grad_ptr + token[:, None] + offs_e[None, :] * stride_ge
        g = tl.load(g_tile, mask=mask_m[:, None] & mask_e[None, :], other=0.0).to(w.dtype)  # [BM, BK]
        acc = tl.dot(g, w, acc, input_precision="ieee")
    first_pixel = _patch_offsets(image, patch, GRID_W, stride_ob, stride_oh, 1, PATCH_SIZE)
    pixels = out_ptr + first_pixel[:, None] + _pixel_offsets(offs_n, stride_oc, stride_oh, 1, PATCH_SIZE)[None, :]
    tl.store(pixels, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
