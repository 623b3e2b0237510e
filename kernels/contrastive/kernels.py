"""The Triton kernels that all contrastive losses share, and the kernels of the sigmoid loss.

    normalize  unit rows, and one over the length that each row had
    products   acc_x += G y and acc_y += G^T x in float32; one program writes each tile
    finish     grad = factor * (acc - one_minus_p * positive), through the normalisation if there was one

The sigmoid loss has logits l_ij = scale * x_i . y_j + bias.

    pairs     of each pair, one_minus_p = 1 / (1 + exp l); and the sums of log(1 + exp -l), of -one_minus_p and of
              -one_minus_p x_i . y_j
    sums      the sum of the losses log(1 + exp l) of one tile without its pairs
    gradient  G_ij = 1 / (1 + exp -l_ij), 0 for pairs, in the operands' dtype; and the sums of log(1 + exp l), of G_ij
              and of G_ij x_i . y_j of one tile without its pairs

These logits are not in base 2: the factor log2(e) would round both terms of a logit, and if the terms cancel, their
rounding errors remain.
"""

import triton
import triton.language as tl

from ..launch import INTERPRET
from ..tiles import grouped_tile, halves_of_columns, load_tile, log_1p
from .tiles import cosine_tile, pair_cosines, store_tile, without_pairs

IS_INTERPRETED = tl.constexpr(INTERPRET)
# The least norm that torch.nn.functional.normalize divides by.
EPS = tl.constexpr(1e-12)


@triton.jit
def _normalize_kernel(
    x_ptr, y_ptr,  # [M, D] and [N, D]
    x_out_ptr, y_out_ptr,  # [M, D] and [N, D]
    x_inv_norm_ptr, y_inv_norm_ptr,  # [M] and [N] fp32
    M, N, D, stride_xn, stride_xd, stride_yn, stride_yd, stride_x_out, stride_y_out,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Normalise features: compute out_i = x_i / max(|x_i|, EPS), rounded once; the first programs take rows of x.

    The others take rows of y.
    """
    pid, num_m = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    if pid < num_m:
        _normalize(x_ptr, x_out_ptr, x_inv_norm_ptr, pid, M, D, stride_xn, stride_xd, stride_x_out, BLOCK_M, BLOCK_K)
    else:
        pid -= num_m
        _normalize(y_ptr, y_out_ptr, y_inv_norm_ptr, pid, N, D, stride_yn, stride_yd, stride_y_out, BLOCK_M, BLOCK_K)


@triton.jit
def _normalize(
    x_ptr, out_ptr, inv_norm_ptr, part, N, D, stride_xn, stride_xd, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_M rows of features [N, D]."""
    offs_n = part * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    square = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = mask_n[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_xn + dims * stride_xd, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        square += tl.sum(x * x, 1)
    norm = tl.maximum(tl.sqrt_rn(square), EPS, propagate_nan=tl.PropagateNan.ALL)
    tl.store(inv_norm_ptr + offs_n, 1.0 / norm, mask=mask_n)
    for start_k in range(0, D, BLOCK_K):
        dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = mask_n[:, None] & (dims < D)
        x = tl.load(x_ptr + rows * stride_xn + dims * stride_xd, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        unit = tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape))
        tl.store(out_ptr + rows * stride_out + dims, unit.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _products_kernel(
    grad,  # [M, N], tiles of [BM, BK]
    grad_cols,  # grad again, as tiles of [BK, BM]
    x,  # [M, D]
    y,  # [N, D]
    acc_x,  # [M, D] fp32, contiguous; with IS_ADDED a descriptor of tiles [BM, BN / PARTS]
    acc_y,  # [N, D] fp32, in the form of acc_x
    M, N, D, num_x_tiles, stride_grad, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    IS_TMA: tl.constexpr, IS_ADDED: tl.constexpr, IS_NEW_X: tl.constexpr, IS_NEW_Y: tl.constexpr,
):  # fmt: skip
    """Add grad y to acc_x (in the first ``num_x_tiles`` programs) and grad^T x to acc_y (in the other programs).

    With IS_NEW_X or IS_NEW_Y, the accumulator has no values yet, and is overwritten.
    """
    pid = tl.program_id(0)
    num_d = tl.cdiv(D, BLOCK_N)
    if pid < num_x_tiles:
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _initial_tile(acc_x, start_m, start_d, M, D, BLOCK_M, BLOCK_N, IS_ADDED or IS_NEW_X)
        for start_k in range(0, N, BLOCK_K):
            g = load_tile(grad, start_m, start_k, M, N, stride_grad, BLOCK_M, BLOCK_K, IS_TMA)  # [BM, BK]
            b = load_tile(y, start_k, start_d, N, D, stride_y, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g, b, acc, input_precision="ieee")
        _store_sum(acc_x, acc, start_m, start_d, M, D, BLOCK_M, BLOCK_N, PARTS, IS_ADDED, IS_NEW_X)
    else:
        pid -= num_x_tiles
        start_m, start_d = pid // num_d * BLOCK_M, pid % num_d * BLOCK_N
        acc = _initial_tile(acc_y, start_m, start_d, N, D, BLOCK_M, BLOCK_N, IS_ADDED or IS_NEW_Y)
        for start_k in range(0, M, BLOCK_K):
            g = load_tile(grad_cols, start_k, start_m, M, N, stride_grad, BLOCK_K, BLOCK_M, IS_TMA)  # [BK, BM]
            b = load_tile(x, start_k, start_d, M, D, stride_x, BLOCK_K, BLOCK_N, IS_TMA)  # [BK, BN]
            acc = tl.dot(g.T, b, acc, input_precision="ieee")
        # The barrier costs nothing. It keeps LLVM from merging the code after the loops of the two branches. In merged
        # code, ptxas could not tell which products are still running, and would wait for each of them.
        tl.debug_barrier()
        _store_sum(acc_y, acc, start_m, start_d, N, D, BLOCK_M, BLOCK_N, PARTS, IS_ADDED, IS_NEW_Y)


@triton.jit
def _initial_tile(
    acc, start_m, start_d, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_ZERO: tl.constexpr
):  # fmt: skip
    """Return the tile to which a program adds its products: zeros, or the tile of the accumulator in memory.

    With IS_ZERO, the sum is added to the accumulator in L2 later, or overwrites it. Otherwise the accumulator is
    loaded before the products, since no registers would be left to load it after them.
    """
    if IS_ZERO:
        first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        first = load_tile(acc, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)
    return first


@triton.jit
def _store_sum(
    acc, tile, start_m, start_d, M, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, IS_ADDED: tl.constexpr, IS_NEW: tl.constexpr,
):  # fmt: skip
    """Store a tile [BM, BN] of an accumulator, or with IS_ADDED and not IS_NEW add it to the accumulator in L2.

    With IS_ADDED, the accumulator is a descriptor, and the columns are taken in ``PARTS`` parts, one after the other.
    """
    if not IS_ADDED:
        store_tile(acc, tile, start_m, start_d, M, D, D, BLOCK_M, BLOCK_N, False)
    elif PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(tile, BLOCK_M, BLOCK_N)
        _store_sum(acc, left, start_m, start_d, M, D, BLOCK_M, HALF, PARTS // 2, IS_ADDED, IS_NEW)
        _store_sum(acc, right, start_m, start_d + HALF, M, D, BLOCK_M, HALF, PARTS // 2, IS_ADDED, IS_NEW)
    elif IS_NEW:
        acc.store([start_m, start_d], tile)
    elif IS_INTERPRETED:  # Triton's interpreter has no atomic_add of descriptors
        acc.store([start_m, start_d], acc.load([start_m, start_d]) + tile)
    else:
        acc.atomic_add([start_m, start_d], tile)  # this launch adds to each element once, so the sums are reproducible


@triton.jit
def _finish_kernel(
    acc_ptr,  # [N, D] fp32, contiguous: grad_scale * G times the features of the other side
    own_ptr,  # [N, D]
    other_ptr,  # [C, D]: the positive of row i is row i + offset, if there is one
    one_minus_p_ptr,  # [N] fp32
    factor_ptr,  # [] fp32
    inv_norm_ptr,  # [N] fp32; unused without HAS_NORM
    grad_ptr,  # [N, D], contiguous
    of_scale_ptr,  # [N] fp32
    N, C, D, offset, stride_own, stride_other, inv_grad_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, HAS_NORM: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of features from the accumulated G times other features, through the normalisation.

    total = acc - one_minus_p * positive;  dot = total . own;  grad = factor * total, or with a normalisation
    grad = factor / norm * (total - dot * own).

    of_scale is dot, the row's part of the gradient of the scale. If ``acc`` was computed from a rounded G (IS_ROUNDED),
    of_scale is only -one_minus_p * positive . own, since the kernel that computed G has summed the other terms before
    it rounded G.
    """
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)[:, None]
    has_pair = mask_n & (offs_n + offset >= 0) & (offs_n + offset < C)
    one_minus_p = tl.load(one_minus_p_ptr + offs_n, mask=has_pair, other=0.0)[:, None]
    factor = tl.load(factor_ptr)
    along = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32) + factor
    dot = tl.zeros((BLOCK_M,), tl.float32)
    of_pair = tl.zeros((BLOCK_M,), tl.float32)
    # With a normalisation, the first pass computes the dot product, which the second pass needs. The second pass reads
    # its operands from the cache.
    FIRST: tl.constexpr = 0 if HAS_NORM else 1
    for last in tl.static_range(FIRST, 2):
        for start_k in range(0, D, BLOCK_K):
            dims = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
            mask = mask_n[:, None] & (dims < D)
            acc = tl.load(acc_ptr + rows * D + dims, mask=mask, other=0.0)  # [BM, BK]
            positive = tl.load(
                other_ptr + (rows + offset) * stride_other + dims, mask=has_pair[:, None] & (dims < D), other=0.0
            )  # [BM, BK]
            own = tl.load(own_ptr + rows * stride_own + dims, mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
            from_pair = one_minus_p * positive.to(tl.float32)
            total = acc * inv_grad_scale - from_pair
            if last == FIRST:
                if HAS_NORM or not IS_ROUNDED:
                    dot += tl.sum(total * own, 1)
                if IS_ROUNDED:
                    of_pair -= tl.sum(from_pair * own, 1)
            if last == 1:
                grad = (total - along[:, None] * own) * scale[:, None]
                tl.store(grad_ptr + rows * D + dims, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if last == 0:
            inv_norm = tl.load(inv_norm_ptr + offs_n, mask=mask_n, other=0.0)
            # A norm that was raised to EPS is a constant, so no gradient flows through it.
            along = tl.where(inv_norm < 0.999 / EPS, dot, 0.0)
            scale = factor * inv_norm
    tl.store(of_scale_ptr + offs_n, of_pair if IS_ROUNDED else dot, mask=mask_n)


@triton.jit
def _probability(logits, e):
    """Return the probabilities 1 / (1 + exp -logits) of the sigmoid loss, given e = exp -|logits|.

    A plain division would also test whether its divisor is too large to be inverted, but 1 + e is at most 2.
    """
    root = tl.rsqrt(1.0 + e)
    return tl.where(logits > 0, 1.0, e) * (root * root)


@triton.jit
def _of_product(a, b):
    """Return (1 + a) (1 + b) - 1 without computing 1 + a, which would round off the digits of a small a."""
    return a * b + (a + b)


@triton.jit
def _exp_of_minus(distance):
    """Return exp -distance for the absolute values of logits, which are at least 0."""
    return tl.exp2(distance * -1.4426950408889634)


@triton.jit
def _sums(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return partial sums [BM, 4] of a tile of logits or of G [BM, BN].

    In the layout of a product, a thread holds two neighbours of each group of 8 columns. Adding these over all groups
    takes no exchange between threads.
    """
    return tl.sum(tl.sum(tl.reshape(tile, (BLOCK_M, BLOCK_N // 8, 4, 2)), 3), 1)


@triton.jit
def _loss_sums(logits, e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return partial sums [BM, 4] of the sigmoid losses log(1 + exp logits), given e = exp -|logits|.

    A thread multiplies the 1 + e of eight logits, and computes one logarithm of the product.
    """
    left, right = tl.split(tl.reshape(e, (BLOCK_M, BLOCK_N // 2, 2)))
    products = _of_product(left, right)
    left, right = tl.split(tl.permute(tl.reshape(products, (BLOCK_M, BLOCK_N // 16, 2, 4)), (0, 1, 3, 2)))
    products = _of_product(left, right)
    left, right = tl.split(tl.permute(tl.reshape(products, (BLOCK_M, BLOCK_N // 32, 2, 4)), (0, 1, 3, 2)))
    products = _of_product(left, right)  # [BM, BN / 32, 4], from 0 to 255
    is_large = products > 1.0
    logs = tl.where(is_large, tl.log2(1.0 + products) * 0.6931471805599453, log_1p(tl.where(is_large, 1.0, products)))
    return tl.sum(logs, 1) + _sums(tl.maximum(logits, 0.0), BLOCK_M, BLOCK_N)


@triton.jit
def _sigmoid_pairs_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    one_minus_p_ptr,  # [M] fp32
    loss_ptr,  # [programs] fp32
    bias_sum_ptr,  # [programs] fp32
    scale_sum_ptr,  # [programs] fp32
    M, N, D, offset, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one_minus_p of the pairs (i, i + offset), 0 in a row without a pair, and the sums of the pairs."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_pair = (offs_m < M) & (offs_m + offset >= 0) & (offs_m + offset < N)
    cosines = pair_cosines(x_ptr, y_ptr, offs_m, has_pair, D, offset, stride_x, stride_y, BLOCK_M, BLOCK_K)
    logits = -(cosines * tl.load(scale_ptr) + tl.load(bias_ptr))
    e = _exp_of_minus(tl.abs(logits))
    one_minus_p = tl.where(has_pair, _probability(logits, e), 0.0)
    tl.store(one_minus_p_ptr + offs_m, one_minus_p, mask=offs_m < M)
    losses = tl.where(has_pair, tl.maximum(logits, 0.0) + log_1p(e), 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(losses, 0))
    tl.store(bias_sum_ptr + tl.program_id(0), -tl.sum(one_minus_p, 0))
    tl.store(scale_sum_ptr + tl.program_id(0), -tl.sum(one_minus_p * cosines, 0))


@triton.jit
def _sigmoid_sums_kernel(
    x,  # [M, D]
    y,  # [N, D]
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    loss_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store the sum of the losses of one tile without its pairs (i, i + offset)."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # loaded before the loop, so that they arrive while it runs
    cosines = cosine_tile(
        x, y, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA,
    )  # fmt: skip
    logits = cosines * scale + bias
    # The logits of pairs and past the edges become -inf, whose loss is 0.
    logits = without_pairs(logits, None, pid_m, pid_n, M, N, offset, BLOCK_M, BLOCK_N)
    losses = _loss_sums(logits, _exp_of_minus(tl.abs(logits)), BLOCK_M, BLOCK_N)
    tl.store(loss_ptr + pid, tl.sum(losses))


@triton.jit
def _sigmoid_grad_tile_kernel(
    x,  # [M, D]
    y,  # [N, D]
    grad,  # [M, N], the operands' dtype
    scale_ptr,  # [] fp32
    bias_ptr,  # [] fp32
    loss_ptr,  # [tiles] fp32
    bias_sum_ptr,  # [tiles] fp32
    scale_sum_ptr,  # [tiles] fp32
    M, N, D, offset, stride_x, stride_y, stride_grad,
    GRAD_SCALE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store grad = GRAD_SCALE * G for one tile, and the tile's sums, which are taken before grad is rounded."""
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)  # loaded before the loop, so that they arrive while it runs
    cosines = cosine_tile(x, y, start_m, start_n, M, N, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, IS_TMA)
    zero = tl.zeros((BLOCK_M, 4), tl.float32)
    loss, bias_sum, scale_sum = _store_grad(
        grad, cosines, zero, zero, zero, scale, bias, start_m, start_n, M, N, offset, stride_grad,
        GRAD_SCALE, PARTS, BLOCK_M, BLOCK_N, IS_TMA,
    )  # fmt: skip
    tl.store(loss_ptr + pid, tl.sum(loss))
    tl.store(bias_sum_ptr + pid, tl.sum(bias_sum))
    tl.store(scale_sum_ptr + pid, tl.sum(scale_sum))


@triton.jit
def _store_grad(
    grad, cosines, loss, bias_sum, scale_sum, scale, bias, start_m, start_n, M, N, offset, stride_grad,
    GRAD_SCALE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """Store GRAD_SCALE * G of the sigmoid loss for cosines [BM, BN]; return the three sums [BM, 4] with this tile
    added.

    The columns are taken in ``PARTS`` parts, one after the other: all of G at once would not fit into the registers.
    """
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves_of_columns(cosines, BLOCK_M, BLOCK_N)
        loss, bias_sum, scale_sum = _store_grad(
            grad, left, loss, bias_sum, scale_sum, scale, bias, start_m, start_n, M, N, offset, stride_grad,
            GRAD_SCALE, PARTS // 2, BLOCK_M, HALF, IS_TMA,
        )  # fmt: skip
        loss, bias_sum, scale_sum = _store_grad(
            grad, right, loss, bias_sum, scale_sum, scale, bias, start_m, start_n + HALF, M, N, offset, stride_grad,
            GRAD_SCALE, PARTS // 2, BLOCK_M, HALF, IS_TMA,
        )  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # Pairs and elements past the edges get a logit of -inf, whose loss and probability are 0. A branch that skips
        # this in other tiles would cost more than it saves: the compiler moves the sums behind the branch, and keeps
        # their terms in registers until then.
        row_bias = tl.where(offs_m < M, bias, float("-inf"))[:, None]
        col_bias = tl.where(offs_n < N, 0.0, float("-inf"))[None, :]
        is_pair = (offs_m + offset)[:, None] == offs_n[None, :]
        logits = tl.where(is_pair, float("-inf"), cosines * scale + (row_bias + col_bias))  # [BM, BN]
        e = _exp_of_minus(tl.abs(logits))
        tile = _probability(logits, e)
        loss += _loss_sums(logits, e, BLOCK_M, BLOCK_N)
        bias_sum += _sums(tile, BLOCK_M, BLOCK_N)
        scale_sum += _sums(tile * cosines, BLOCK_M, BLOCK_N)
        store_tile(grad, tile * GRAD_SCALE, start_m, start_n, M, N, stride_grad, BLOCK_M, BLOCK_N, IS_TMA)
    return loss, bias_sum, scale_sum
