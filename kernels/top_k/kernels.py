"""Triton kernels of top_k: the best score of each group of items, the scores of the items in chosen groups, and the
results.

group_maxima:  g_qb = max over the items i of group b of x_q . y_i
group_scores:  s_qci = x_q . y_(GROUP b_qc + i), for the chosen groups b_qc
results:       the scores and the indices of the best keys

Scores are stored as keys: whole numbers in the order of the scores, and of equal scores in the reverse order of the
indices. So no two keys of a query are equal, and the k largest keys are those of the k best, the first of equal scores
first. The upper 32 bits of a key are the score, the lower ones its complemented index.
"""

import triton
import triton.language as tl

from ..tiles import grouped_tile, row_products


@triton.jit
def _ordered(bits):
    """Return the bits of a float32 as an integer of the same order, or the bits of such an integer."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(score, index):
    """Return the keys of scores and of their indices, which are below 2^32; both zeros have the same score."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (_ordered(bits).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _index(key):
    """Return the index of the item, or group of items, that a key holds beside its score."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _group_maxima_kernel(
    x_ptr,  # [Q, D]
    y_ptr,  # [N, D]
    allowed_ptr,  # [N] bytes, 0 for an item that must not be returned; only read if HAS_ALLOWED
    maxima_ptr,  # [Q, G] int64, keys of the maxima and of their groups
    Q, N, D, G,
    stride_xq, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    GROUP_M: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    """Compute the maxima of BLOCK_N / GROUP groups for BLOCK_M queries; the scores stay in registers."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(Q, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < Q, offs_n < N
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_xq  # [BM]
    y_rows = y_ptr + offs_n.to(tl.int64) * stride_yn  # [BN]
    acc = row_products(x_rows, y_rows, mask_m, mask_n, D, stride_xd, stride_yd, BLOCK_M, BLOCK_N, BLOCK_K)  # [BM, BN]
    if HAS_ALLOWED:
        mask_n = mask_n & (tl.load(allowed_ptr + offs_n, mask=mask_n, other=0) != 0)
    # A NaN differs from itself; it counts as the lowest score.
    scores = tl.where(mask_n[None, :] & (acc == acc), acc, float("-inf"))
    maxima = tl.max(tl.reshape(scores, (BLOCK_M, BLOCK_N // GROUP, GROUP)), 2)  # [BM, BN / GROUP]
    offs_g = pid_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    out = maxima_ptr + offs_m.to(tl.int64)[:, None] * G + offs_g[None, :]
    tl.store(out, _key(maxima, offs_g[None, :]), mask=mask_m[:, None] & (offs_g < G)[None, :])


@triton.jit
def _group_scores_kernel(
    x_ptr,  # [Q, D]
    y_ptr,  # [N, D]
    allowed_ptr,  # [N] bytes, as in _group_maxima_kernel
    group_ptr,  # [Q, C] int64, keys of the maxima of the chosen groups
    score_ptr,  # [Q, C, GROUP] int64, keys of the scores and of their items
    N, D, C,
    stride_xq, stride_xd, stride_yn, stride_yd,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    """Compute the scores of one query with the items of one group."""
    pid = tl.program_id(0).to(tl.int64)
    offs_n = _index(tl.load(group_ptr + pid)) * GROUP + tl.arange(0, GROUP)
    mask_n = offs_n < N
    acc = tl.zeros((GROUP,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = dims < D
        x = tl.load(x_ptr + pid // C * stride_xq + dims * stride_xd, mask=mask_k, other=0.0)  # [BK]
        y = tl.load(
            y_ptr + offs_n[:, None] * stride_yn + dims[None, :] * stride_yd,
            mask=mask_n[:, None] & mask_k[None, :], other=0.0,
        )  # [GROUP, BK]  # fmt: skip
        acc += tl.sum(y.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    if HAS_ALLOWED:
        mask_n = mask_n & (tl.load(allowed_ptr + offs_n, mask=mask_n, other=0) != 0)
    scores = tl.where(mask_n & (acc == acc), acc, float("-inf"))
    tl.store(score_ptr + pid * GROUP + tl.arange(0, GROUP), _key(scores, offs_n))


@triton.jit
def _results_kernel(
    key_ptr,  # [Q, F] int64, keys of the best items in falling order
    score_ptr,  # [Q, K] fp32
    index_ptr,  # [Q, K] int64
    size,
    F,
    K,
    BLOCK: tl.constexpr,
):
    """Write BLOCK of the Q K = ``size`` results. Past the F keys of a query, and where there is no score, they are -inf
    and -1.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, place = offs < size, offs % K
    is_found = mask & (place < F)
    key = tl.load(key_ptr + offs // K * F + place, mask=is_found, other=0)
    score = _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    score = tl.where(is_found, score, float("-inf"))
    tl.store(score_ptr + offs, score, mask=mask)
    tl.store(index_ptr + offs, tl.where(score == float("-inf"), -1, _index(key)), mask=mask)
