"""Triton kernels of the retrieval ranks: the score of each text with its own image, and the counts of others ahead.

Both kernels compute scores by ``row_products``, so equal rows give scores with equal bits in both.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, row_products


@triton.jit
def _own_score_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    owner_ptr,  # [N] int32, -1 for no image
    score_ptr,  # [N] fp32
    N, D,
    stride_xm, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Compute the score of PAIRS = min(BLOCK_M, BLOCK_N) texts with their own images, the diagonal of a tile."""
    first = tl.program_id(0) * PAIRS
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    owner = tl.load(owner_ptr + offs_m, mask=offs_m < N, other=-1)  # [BM]
    acc = row_products(
        x_ptr + owner.to(tl.int64) * stride_xm, y_ptr + offs_n.to(tl.int64) * stride_yn, owner >= 0, offs_n < N,
        D, stride_xd, stride_yd, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    score = tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], acc, 0.0), 0)  # [BN]
    tl.store(score_ptr + offs_n, score, mask=offs_n < tl.minimum(first + PAIRS, N))


@triton.jit
def _count_ahead_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    owner_ptr,  # [N] int32, -1 for no image
    image_best_ptr,  # [M] fp32
    text_best_ptr,  # [N] fp32
    image_ahead_ptr,  # [M] int32, zeros
    text_ahead_ptr,  # [N] int32, zeros
    M, N, D,
    stride_xm, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Count for each of BLOCK_M images the texts of others, and for each of SPAN texts the other images, that score at
    least as high as its own best match.

    Programs add integers, so the order in which they run does not matter.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, SPAN), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_xm  # [BM]
    image_best = tl.load(image_best_ptr + offs_m, mask=mask_m, other=0.0)
    image_ahead = tl.zeros((BLOCK_M,), tl.int32)
    for start_n in range(pid_n * SPAN, tl.minimum(pid_n * SPAN + SPAN, N), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y_rows = y_ptr + offs_n.to(tl.int64) * stride_yn  # [BN]
        acc = row_products(
            x_rows, y_rows, mask_m, mask_n, D, stride_xd, stride_yd, BLOCK_M, BLOCK_N, BLOCK_K
        )  # [BM, BN]
        text_best = tl.load(text_best_ptr + offs_n, mask=mask_n, other=0.0)
        owner = tl.load(owner_ptr + offs_n, mask=mask_n, other=-1)
        others = ((owner[None, :] != offs_m[:, None]) & mask_m[:, None] & mask_n[None, :]).to(tl.int32)
        image_ahead += tl.sum(tl.where(acc < image_best[:, None], 0, others), 1)
        text_ahead = tl.sum(tl.where(acc < text_best[None, :], 0, others), 0)
        tl.atomic_add(text_ahead_ptr + offs_n, text_ahead, mask=mask_n, sem="relaxed")
    tl.atomic_add(image_ahead_ptr + offs_m, image_ahead, mask=mask_m, sem="relaxed")
