"""The gradients of the contrastive loss in one launch on an H100, in Gluon: of each block G first, then its products.

All programs run at once, one on each multiprocessor, and go through the blocks of G together:

    1  each walks down its segment of the block and stores G                  (``resident_walks``)
    2  it waits until all have stored their parts
    3  it takes its tiles [128, 256] of G y and G^T x, and adds them to the accumulators in L2

and so on with the next block, whose first tile it computes before it waits until nobody reads the last G any more. The
last block of a row of blocks finishes the gradient of x as ``_finish_kernel`` does, where the accumulator is still in
L2; that of y is left to ``_finish_kernel``, because G may lie in its memory.

What makes this correct:

* ``counters`` are two numbers in global memory, 0 at the launch: how often programs have stored their part of G, and
  have read all that they need of it. A program adds to one after its TMA stores are complete (not only read) and after
  a barrier of its warps; who waits for a number acquires what came before it. ``fence`` stands on both sides, since
  the data moves by TMA and the numbers do not. It also orders what warps and TMA do with shared memory, which G and
  the products use one after the other.
* Each tile of an accumulator belongs to one program in all blocks, which stores it in the first one and adds to it in
  the others, in order: sums are reproducible, and nothing must be zero before the launch.
* A program that waits keeps its multiprocessor, so all programs must have one: launch them cooperatively.

Needs Triton 3.9: 3.6 has no reduction by TMA in Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import resident_walks
from .resident_walks import grad_walk, load_tile, numbers, quarters, store_tile, wait_for

ROWS = gl.constexpr(128)  # of a tile of the products
COLS = gl.constexpr(256)
PART = gl.constexpr(64)  # columns of a tile that are stored at a time


@gluon.jit
def _announce(counter):
    """Add 1 to a counter, after all that this program has stored."""
    tma.store_wait(0, read_only=False)
    resident_walks.fence()
    gl.barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def _fill(g, b, gs, bs, bars, slot, m, start_k, k, d, pred, IS_TRANSPOSED: gl.constexpr, BK: gl.constexpr):
    """Ask for step k of a product: a tile of G, whose coordinates are local, and one of the features."""
    mbarrier.expect(bars.index(slot), (ROWS + COLS) * BK * 2, pred=pred)
    if IS_TRANSPOSED:
        load_tile(g, [k * BK, m], bars.index(slot), gs.index(slot), pred=pred)
    else:
        load_tile(g, [m, k * BK], bars.index(slot), gs.index(slot), pred=pred)
    load_tile(b, [start_k + k * BK, d], bars.index(slot), bs.index(slot), pred=pred)


@gluon.jit
def _product(
    g, b, acc, bars, used, m, out_m, start_k, d, steps, is_first,
    IS_TRANSPOSED: gl.constexpr, SLOTS: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Store a tile at (out_m, d) of an accumulator, or add to it: the product of rows m of G, or of its transpose, with
    features from row ``start_k`` on. Return the number of the next use of a slot.
    """
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, COLS, 16])
    gs = gl.allocate_shared_memory(g.dtype, [SLOTS, BK, ROWS] if IS_TRANSPOSED else [SLOTS, ROWS, BK], g.layout)
    bs = gl.allocate_shared_memory(b.dtype, [SLOTS, BK, COLS], b.layout)
    part = gl.allocate_shared_memory(gl.float32, [ROWS, PART], acc.layout)
    for k in gl.static_range(SLOTS - 1):
        _fill(g, b, gs, bs, bars, (used + k) % SLOTS, m, start_k, k, d, k < steps, IS_TRANSPOSED, BK)
    tile = gl.zeros([ROWS, COLS], gl.float32, L)
    for k in range(steps):
        slot = used % SLOTS
        mbarrier.wait(bars.index(slot), used // SLOTS & 1)
        rows = gs.index(slot).permute((1, 0)) if IS_TRANSPOSED else gs.index(slot)
        tile = warpgroup_mma(rows, bs.index(slot), tile, is_async=True)
        tile = warpgroup_mma_wait(1, deps=[tile])
        free, ahead = (used + SLOTS - 1) % SLOTS, k + SLOTS - 1
        _fill(g, b, gs, bs, bars, free, m, start_k, ahead, d, ahead < steps, IS_TRANSPOSED, BK)
        used += 1
    tile = warpgroup_mma_wait(0, deps=[tile])
    parts = quarters(tile, ROWS, COLS)
    for n in gl.static_range(COLS // PART):
        tma.store_wait(0)
        part.store(parts[n])
        fence_async_shared()
        if is_first:
            store_tile(acc, [out_m, d + n * PART], part)
        else:
            tma.async_atomic_add(acc, [out_m, d + n * PART], part)
    tma.store_wait(0)
    return used


@gluon.jit
def _finish(
    acc_ptr, other_ptr, one_minus_p_ptr, factor, grad_ptr, m, start_m, d, M, N, D, offset, inv_grad_scale,
    STEP: gl.constexpr,
):  # fmt: skip
    """Store grad = factor * (acc - one_minus_p * positive) for the tile at (m, d) of an accumulator, whose first row is
    row ``start_m`` of the features.
    """
    tma.store_wait(0, read_only=False)
    resident_walks.fence()
    gl.barrier()
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    cols = d + gl.arange(0, COLS, layout=gl.SliceLayout(0, L))[None, :]
    for first in range(0, ROWS, STEP):
        offs = first + gl.arange(0, STEP, layout=gl.SliceLayout(1, L))
        rows = start_m + offs
        is_row = rows < M
        has_pair = is_row & (rows + offset >= 0) & (rows + offset < N)
        acc = gl.load(acc_ptr + (m + offs).to(gl.int64)[:, None] * D + cols, mask=is_row[:, None], other=0.0)
        pairs = other_ptr + (rows + offset).to(gl.int64)[:, None] * D + cols
        positive = gl.load(pairs, mask=has_pair[:, None], other=0.0).to(gl.float32)
        one_minus_p = gl.load(one_minus_p_ptr + rows, mask=has_pair, other=0.0)
        grad = factor * (acc * inv_grad_scale - one_minus_p[:, None] * positive)
        out = grad_ptr + rows.to(gl.int64)[:, None] * D + cols
        gl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=is_row[:, None])
    gl.barrier()
    resident_walks.fence()


@gluon.jit
def backward_kernel(
    x,  # descriptor of [M, D], blocks [BM, BK]
    y,  # descriptor of [N, D], blocks [BN, BK]
    g,  # descriptor of G [R, C], blocks [BM, BK]
    g_cols,  # the same, blocks [BK, BM]
    x_wide,  # descriptor of [M, D], blocks [BK, COLS]
    y_wide,  # descriptor of [N, D], blocks [BK, COLS]
    acc_x,  # descriptor of [R, D] fp32, blocks [ROWS, PART]
    acc_y,  # descriptor of [N, D] fp32, the same
    acc_x_ptr,  # [R, D] fp32
    y_ptr,  # [N, D]
    grad_x_ptr,  # [M, D]
    scale_ptr,  # [] fp32
    factor_ptr,  # [] fp32: of all gradients
    row_weight_ptr,  # [M] fp32: grad_scale / denominator
    col_weight_ptr,  # [N] fp32
    one_minus_p_ptr,  # [M] fp32
    dot_ptr,  # [programs] fp32
    counters,  # [2] int32, 0
    M, N, D, R, C, offset, num_rows, num_cols, segments, tiles, x_programs, x_tiles, y_tiles, log2e, inv_grad_scale,
    KS: gl.constexpr, SLOTS: gl.constexpr, SLOTS_OF_PRODUCTS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Store the gradient of x, the accumulator of y's, and each program's sum of G_ij x_i . y_j.

    There are num_rows x num_cols blocks of G. The first ``x_programs`` programs take ``x_tiles`` tiles of G y each, the
    last ones ``y_tiles`` of G^T x. A program walks over ``tiles`` tiles, an even number, of a column of tiles.
    """
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BN, 16])
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())
    bars_of_products = gl.allocate_shared_memory(gl.int64, [SLOTS_OF_PRODUCTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS + 1):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(SLOTS_OF_PRODUCTS):
        mbarrier.init(bars_of_products.index(i), count=1)
    pid, programs = gl.program_id(0), gl.num_programs(0)
    scale, shift, never = numbers(scale_ptr, log2e)
    dots = gl.zeros([BM], gl.float32, gl.SliceLayout(1, L))
    num_d, y_first = D // COLS, (pid - (programs - C // ROWS * (D // COLS) // y_tiles)) * y_tiles
    used, used_by_products = 0, 0
    for block in range(num_rows * num_cols):
        row, col = block // num_cols, block % num_cols
        out_m, out_n = pid % segments * tiles * BM, pid // segments * BN
        dots, used = grad_walk(
            x, y, g, bars, used, block & 1, row_weight_ptr, col_weight_ptr, counters + 1, block * programs,
            dots, scale, shift, never, row * R + out_m, col * C + out_n, out_m, out_n, M, N, offset, tiles,
            KS, SLOTS, BM, BN, BK,
        )  # fmt: skip
        _announce(counters)
        wait_for(counters, (block + 1) * programs)
        if pid < x_programs:
            for tile in range(pid * x_tiles, (pid + 1) * x_tiles):
                m, d = tile // num_d * ROWS, tile % num_d * COLS
                used_by_products = _product(
                    g, y_wide, acc_x, bars_of_products, used_by_products, m, m, col * C, d, C // BK,
                    col == 0, False, SLOTS_OF_PRODUCTS, BK,
                )  # fmt: skip
                if col == num_cols - 1:
                    _finish(
                        acc_x_ptr, y_ptr, one_minus_p_ptr, gl.load(factor_ptr), grad_x_ptr, m, row * R + m, d,
                        M, N, D, offset, inv_grad_scale, 16,
                    )  # fmt: skip
        if y_first >= 0:
            for tile in range(y_first, y_first + y_tiles):
                m, d = tile // num_d * ROWS, tile % num_d * COLS
                used_by_products = _product(
                    g_cols, x_wide, acc_y, bars_of_products, used_by_products, m, col * C + m, row * R,
                    d, R // BK, row == 0, True, SLOTS_OF_PRODUCTS, BK,
                )  # fmt: skip
        _announce(counters + 1)
    gl.store(dot_ptr + pid, gl.sum(dots, 0) * inv_grad_scale)
