"""The Triton kernel that lays out packed patches as a matrix; ``op`` has the equations."""

import triton
import triton.language as tl

from ..patch_embed.kernels import _load_pixels


@triton.jit
def _filter(x, IS_CUBIC: tl.constexpr):
    """Return the weight of the filter that resizes positions at each distance ``x``, in steps of the coarser grid: the
    triangle, or Keys' cubic with a = -1/2.
    """
    x = tl.abs(x)
    if IS_CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.maximum(1.0 - x, 0.0)


@triton.jit
def _axis_weights(
    table_index,  # [1 or BM, S] index into an axis of the table
    index, size,  # [BM] index into the same axis of an image, and its size
    G,  # the size of the table's axis
    IS_CUBIC: tl.constexpr,
):  # fmt: skip
    """Return the weights [BM, S] fp32 of a table's rows in a row of the resized table, not yet divided by their sum."""
    scale = G / size.to(tl.float32)
    centre = (index.to(tl.float32) + 0.5) * scale
    distance = (table_index.to(tl.float32) + 0.5 - centre[:, None]) * (1.0 / tl.maximum(scale, 1.0))[:, None]
    return tl.where(table_index < G, _filter(distance, IS_CUBIC), 0.0)


@triton.jit
def _patch_embed_packed_kernel(
    patches_ptr,  # [N, K]
    grids_ptr,  # [B, 2] int32 contiguous
    first_ptr,  # [2, T] int32 contiguous; row 0 has the first token of each token's image
    image_ptr,  # [T] int32 contiguous, the image of each token; B for a token that belongs to no image
    out_ptr,  # [T, COLUMNS] contiguous
    T, N, B, PREFIX, K, COLUMNS,
    G, GH, GW,  # G = GH GW
    stride_n, stride_k,
    IS_UINT8: tl.constexpr, IS_CUBIC: tl.constexpr, KEEP_ASPECT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_GRID: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Lay out BLOCK_M rows of the matrix of packed patches.

    The row of a patch has its pixels, the weights of GH x GW positions and a one for the bias. The row of a prefix
    token has only a one.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = token < T
    image = tl.load(image_ptr + token, mask=mask_t, other=B)
    in_image = (image >= 0) & (image < B)
    height = tl.load(grids_ptr + 2 * image.to(tl.int64), mask=in_image, other=1)
    width = tl.maximum(tl.load(grids_ptr + 2 * image.to(tl.int64) + 1, mask=in_image, other=1), 1)
    index = (token - tl.load(first_ptr + token, mask=mask_t, other=0)).to(tl.int32) - PREFIX
    row = token - PREFIX * (image + 1).to(tl.int64)
    is_patch = in_image & (index >= 0) & (index < height.to(tl.int64) * width) & (row >= 0) & (row < N)
    # ``one`` is the column of the token's one, counted from the first position: the bias's or a prefix token's column.
    is_prefix = in_image & (index < 0) & (index >= -PREFIX)
    one = tl.where(is_patch, G, tl.where(is_prefix, G + 1 + PREFIX + index, -1))
    out = out_ptr + token[:, None] * COLUMNS
    for start in tl.range(0, K, BLOCK_N, num_stages=NUM_STAGES):
        k = start + tl.arange(0, BLOCK_N)
        pixels = patches_ptr + row[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
        x = _load_pixels(pixels, is_patch[:, None] & (k < K)[None, :], out_ptr.dtype.element_ty, IS_UINT8)  # [BM, BN]
        tl.store(out + k[None, :], x, mask=mask_t[:, None] & (k < K)[None, :])
    index = tl.where(is_patch, index, 0)
    y, x = index // width, index % width
    if KEEP_ASPECT:
        height = tl.maximum(height, width)
        width = height
    of_grid = tl.arange(0, BLOCK_GRID)[None, :]
    total = tl.sum(_axis_weights(of_grid, y, height, GH, IS_CUBIC), 1)
    total *= tl.sum(_axis_weights(of_grid, x, width, GW, IS_CUBIC), 1)
    for start in range(0, COLUMNS - K, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[None, :]
        weights = _axis_weights(n // GW, y, height, GH, IS_CUBIC) * _axis_weights(n % GW, x, width, GW, IS_CUBIC)
        weights = tl.where(is_patch[:, None], weights * (1.0 / total)[:, None], 0.0)
        values = tl.where(n == one[:, None], 1.0, weights).to(out_ptr.dtype.element_ty)  # [BM, BN]
        tl.store(out + K + n, values, mask=mask_t[:, None] & (n < COLUMNS - K))
