"""Gluon walks for an H100: the columns' features stay in shared memory, and two accumulators take turns.

    statistics  row sums_i = sum_j 2^(l_ij - m) of each tile, column sums_j = sum_i 2^(l_ij - m) of a segment
    gradient    G_ij = 2^(l_ij - m) (u_i + v_j) in 16 bits, and the sum of G_ij x_i . y_j before it is rounded

with l_ij = log2e * scale * x_i . y_j and the shared shift m, both without the pairs (i, i + offset).

A program holds BN = 128 rows of y, [128, D], in shared memory and walks down an even number of blocks of 128 rows of
x. While the tensor cores fill one accumulator [128, 128], the same warps work on the other, a quarter of its columns
behind each quarter of the steps. For a tile L2 then gives 128 KB where a tile that loads both sides gives 256, and the
product is never waited for as a whole.

What makes this correct beyond what ttsem can check (values, phases of barriers, races between programs):

* Each slot of x, and y, has an mbarrier. Slots are used in turns, in all walks of a program: use number ``used`` is
  that of slot ``used % SLOTS``, which waits for its phase ``used // SLOTS``, or rather for the parity of that.
* A slot is asked for again only behind ``warpgroup_mma_wait(1)``, which ends the product that read it, and behind a
  barrier of all warps, which Triton puts before the copy because it overlaps with a read of other warps.
* The last fills of a walk are predicated off, together with what their barriers expect.
* A tile with pairs or edges starts from ``NEVER`` there and not from zero. No product moves such a number, its power of
  two is 0, and so is its product with that. The accumulator is written before any product of its tile starts and while
  none of the other is under way, so that no wgmma sees half of it, and the epilogue has no branch.
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

# Triton 3.9 and 3.6 call them differently.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_load") else tma.async_copy_shared_to_global

PIECES = gl.constexpr(4)  # of the columns of a tile: each goes through the epilogue on its own
NEVER = gl.constexpr(1e38)


@gluon.jit
def _halves(tile, ROWS: gl.constexpr, COLS: gl.constexpr):
    return gl.split(gl.permute(gl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@gluon.jit
def quarters(tile, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Return the four quarters of a tile's columns, without moving a register."""
    left, right = _halves(tile, ROWS, COLS)
    a, b = _halves(left, ROWS, COLS // 2)
    c, d = _halves(right, ROWS, COLS // 2)
    return a, b, c, d


@gluon.jit
def fence():
    """Order what TMA reads and writes in global memory with what this program's own instructions do."""
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, $1;", "=r,r", [gl.program_id(0)], gl.int32, False, 1)


@gluon.jit
def wait_for(counter, count):
    """Wait until programs have added ``count`` to a counter in global memory."""
    while gl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
        pass
    fence()


@gluon.jit
def numbers(scale_ptr, log2e):
    """Return log2e times the scale, the shared shift, and a cosine whose power of two is 0."""
    factor = gl.load(scale_ptr) * log2e
    factor = gl.where(factor == 0.0, 1e-30, factor)
    return factor, gl.maximum(gl.ceil(gl.abs(factor)) - 100.0, 0.0), gl.where(factor > 0.0, -NEVER, NEVER)


@gluon.jit
def _first(offs_m, offs_n, M, N, offset, start_m, start_n, never, BM: gl.constexpr, BN: gl.constexpr,
           HAS_EDGES: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Return what a tile's products are added to: 0, and ``never`` for its pairs and past the edges."""
    first = gl.zeros([BM, BN], gl.float32, L)
    is_special = (start_m + offset < start_n + BN) & (start_n < start_m + offset + BM)
    if HAS_EDGES:
        is_special |= (start_m + BM > M) | (start_n + BN > N)
    if is_special:
        rows, cols = (start_m + offs_m)[:, None], (start_n + offs_n)[None, :]
        is_out = rows + offset == cols
        if HAS_EDGES:
            is_out |= (rows >= M) | (cols >= N)
        first = gl.where(is_out, never, first)
    return first


@gluon.jit
def _fill(x, xs, bars, slot, row, k: gl.constexpr, pred, BM: gl.constexpr, BK: gl.constexpr):
    mbarrier.expect(bars.index(slot), BM * BK * 2, pred=pred)
    load_tile(x, [row, k * BK], bars.index(slot), xs.index(slot), pred=pred)


@gluon.jit
def _sum_piece(piece, col_sum, of_rows, factor, shift):
    """Return ``col_sum`` and ``of_rows`` with the powers of two of a piece added to them: all that a thread holds of a
    column, and all of a row.
    """
    p = gl.exp2(piece * factor - shift)
    of_threads = gl.sum(gl.reshape(p, (8, 2, 8, p.shape[1])), 1)
    col_sum += gl.convert_layout(of_threads, col_sum.type.layout, assert_trivial=True)
    return col_sum, of_rows + gl.convert_layout(gl.sum(p, 1), of_rows.type.layout, assert_trivial=True)


@gluon.jit
def _grad_piece(piece, n: gl.constexpr, row, cw, dots, factor, shift):
    """Return a piece of G, and ``dots`` with the sums of its product with the cosines added to it."""
    of_row = gl.convert_layout(row, gl.SliceLayout(1, piece.type.layout), assert_trivial=True)
    of_col = cw.index(n).load(gl.SliceLayout(0, piece.type.layout))
    g = gl.exp2(piece * factor - shift) * (of_row[:, None] + of_col[None, :])
    return g, dots + gl.convert_layout(gl.sum(g * piece, 1), dots.type.layout, assert_trivial=True)


@gluon.jit
def _store_pieces(left, right, out, gs, start_m, start_n):
    """Store two pieces of G that are neighbours."""
    ROWS: gl.constexpr = left.shape[0]
    COLS: gl.constexpr = 2 * left.shape[1]
    tma.store_wait(0)  # the store before this one has read the buffer
    gs.store(gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (ROWS, COLS)))
    fence_async_shared()
    store_tile(out, [start_m, start_n], gs)


@gluon.jit
def _step(
    x, xs, ys, bars, new, used, tile, tiles, first_m, zero, k: gl.constexpr,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Start the products of step k of a tile, wait for those of the step before it, and fill the slot that these used.

    Return the accumulator, and the number of the next use.
    """
    slot = used % SLOTS
    mbarrier.wait(bars.index(slot), used // SLOTS & 1)
    new = warpgroup_mma(xs.index(slot), ys.index(k + zero).permute((1, 0)), new, is_async=True)
    new = warpgroup_mma_wait(1, deps=[new])
    free = (used + SLOTS - 1) % SLOTS
    ahead = tile + (k + SLOTS - 1) // KS
    _fill(x, xs, bars, free, first_m + ahead * BM, (k + SLOTS - 1) % KS, ahead < tiles, BM, BK)
    return new, used + 1


@gluon.jit
def _load_both(
    x, y, xs, ys, bars, used, first_m, start_n,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Ask for all of y's rows, with the last barrier, and for the first steps of x, from use ``used`` of a slot on."""
    mbarrier.expect(bars.index(SLOTS), KS * BN * BK * 2)
    for k in gl.static_range(KS):
        load_tile(y, [start_n, k * BK], bars.index(SLOTS), ys.index(k))
    for k in gl.static_range(SLOTS - 1):
        _fill(x, xs, bars, (used + k) % SLOTS, first_m, k, True, BM, BK)


@gluon.jit
def _grad_phase(
    x, xs, ys, bars, out, gs, new, old, row, cw, dots, factor, shift, used, tile, tiles, first_m, out_m, out_n,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Add the products of ``tile`` to ``new``; behind them, store G of ``old``, the tile before it."""
    # before the first row the descriptor stores nothing, and in the first phase nothing has been computed
    start_m = gl.where(tile > 0, out_m + (tile - 1) * BM, -BM)
    # For all that the compiler knows, this changes from tile to tile. It would keep the addresses of all steps in
    # registers otherwise, of which there are too few.
    zero = gl.minimum(tile, 0)
    for k in gl.static_range(KS):
        new, used = _step(x, xs, ys, bars, new, used, tile, tiles, first_m, zero, k, KS, SLOTS, BM, BK)
        if k == 0:
            pieces = quarters(old, BM, BN)
        if k % (KS // PIECES) == 0:
            g, dots = _grad_piece(pieces[k * PIECES // KS], k * PIECES // KS, row, cw, dots, factor, shift)
            if k % (2 * KS // PIECES) == 0:
                left = g.to(out.dtype)
            else:
                _store_pieces(left, g.to(out.dtype), out, gs, start_m, out_n + (k * PIECES // KS - 1) * (BN // PIECES))
    return warpgroup_mma_wait(0, deps=[new]), dots, used


@gluon.jit
def grad_walk(
    x, y, out, bars, used, parity, row_weight_ptr, col_weight_ptr, free_ptr, free_at, dots, factor, shift, never,
    first_m, start_n, out_m, out_n, M, N, offset, tiles,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Store G of ``tiles`` tiles from row ``first_m`` on at (out_m, out_n) of ``out``; return ``dots`` with the sums of
    its product with the cosines added to it, and the number of the next use of a slot.

    Nothing is stored before the counter behind ``free_ptr`` is at ``free_at``. Until then, the first tile is computed.
    """
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, L)
    xs = gl.allocate_shared_memory(x.dtype, [SLOTS, BM, BK], x.layout)
    ys = gl.allocate_shared_memory(y.dtype, [KS, BN, BK], y.layout)
    gs = gl.allocate_shared_memory(out.dtype, [BM, 2 * BN // PIECES], out.layout)
    cw = gl.allocate_shared_memory(gl.float32, [PIECES, BN // PIECES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _load_both(x, y, xs, ys, bars, used, first_m, start_n, KS, SLOTS, BM, BN, BK)
    V: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    for i in gl.static_range(PIECES):
        offs = start_n + i * (BN // PIECES) + gl.arange(0, BN // PIECES, layout=V)
        cw.index(i).store(gl.load(col_weight_ptr + offs, mask=offs < N, other=0.0))
    offs_m, offs_n = gl.arange(0, BM, layout=rows), gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    odd = gl.zeros([BM, BN], gl.float32, L) + never
    of_odd = gl.zeros([BM], gl.float32, rows)
    mbarrier.wait(bars.index(SLOTS), parity)
    for t in range(0, tiles, 2):
        start_m = first_m + t * BM
        even = _first(offs_m, offs_n, M, N, offset, start_m, start_n, never, BM, BN, False, L)
        of_even = gl.load(row_weight_ptr + start_m + offs_m, mask=start_m + offs_m < M, other=0.0)
        even, dots, used = _grad_phase(
            x, xs, ys, bars, out, gs, even, odd, of_odd, cw, dots, factor, shift, used, t, tiles, first_m,
            out_m, out_n, KS, SLOTS, BM, BN, BK,
        )  # fmt: skip
        if t == 0:
            wait_for(free_ptr, free_at)
        start_m += BM
        odd = _first(offs_m, offs_n, M, N, offset, start_m, start_n, never, BM, BN, False, L)
        of_odd = gl.load(row_weight_ptr + start_m + offs_m, mask=start_m + offs_m < M, other=0.0)
        odd, dots, used = _grad_phase(
            x, xs, ys, bars, out, gs, odd, even, of_even, cw, dots, factor, shift, used, t + 1, tiles, first_m,
            out_m, out_n, KS, SLOTS, BM, BN, BK,
        )  # fmt: skip
    pieces = quarters(odd, BM, BN)
    for n in gl.static_range(PIECES):
        g, dots = _grad_piece(pieces[n], n, of_odd, cw, dots, factor, shift)
        if n % 2 == 0:
            left = g.to(out.dtype)
        else:
            col = out_n + (n - 1) * (BN // PIECES)
            _store_pieces(left, g.to(out.dtype), out, gs, out_m + (tiles - 1) * BM, col)
    return dots, used


@gluon.jit
def _stats_phase(
    x, xs, ys, bars, new, old, row_sum_ptr, cols, factor, shift, used, tile, tiles, first_m, M, offs_m,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Add the products of ``tile`` to ``new``; behind them, sum the powers of ``old``, the tile before it."""
    a, b, c, d = cols
    OF_ROWS: gl.constexpr = offs_m.type.layout
    of_rows = gl.zeros([BM], gl.float32, OF_ROWS)
    # For all that the compiler knows, this changes from tile to tile. It would keep the addresses of all steps in
    # registers otherwise, of which there are too few.
    zero = gl.minimum(tile, 0)
    for k in gl.static_range(KS):
        new, used = _step(x, xs, ys, bars, new, used, tile, tiles, first_m, zero, k, KS, SLOTS, BM, BK)
        if k == 0:
            p0, p1, p2, p3 = quarters(old, BM, BN)
            a, of_rows = _sum_piece(p0, a, of_rows, factor, shift)
        if k == KS // PIECES:
            b, of_rows = _sum_piece(p1, b, of_rows, factor, shift)
        if k == 2 * (KS // PIECES):
            c, of_rows = _sum_piece(p2, c, of_rows, factor, shift)
        if k == 3 * (KS // PIECES):
            d, of_rows = _sum_piece(p3, d, of_rows, factor, shift)
    offs = first_m + (tile - 1) * BM + offs_m
    gl.store(row_sum_ptr + offs, of_rows, mask=(offs < M) & (tile > 0))
    return warpgroup_mma_wait(0, deps=[new]), (a, b, c, d), used


@gluon.jit
def stats_kernel(
    x,  # descriptor of [M, D], blocks [BM, BK]
    y,  # descriptor of [N, D], blocks [BN, BK]
    scale_ptr,  # [] fp32
    row_sum_ptr,  # [N / BN, M] fp32
    col_sum_ptr,  # [segments, N] fp32
    M, N, offset, segments, tiles, log2e,
    KS: gl.constexpr, SLOTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Store the sums of a segment's rows, tile by tile, and those of its columns."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BN, 16])
    block, segment = gl.program_id(0) // segments, gl.program_id(0) % segments
    start_n, first_m = block * BN, segment * tiles * BM
    row_sum_ptr += block.to(gl.int64) * M
    xs = gl.allocate_shared_memory(x.dtype, [SLOTS, BM, BK], x.layout)
    ys = gl.allocate_shared_memory(y.dtype, [KS, BN, BK], y.layout)
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS + 1):
        mbarrier.init(bars.index(i), count=1)
    _load_both(x, y, xs, ys, bars, 0, first_m, start_n, KS, SLOTS, BM, BN, BK)
    factor, shift, never = numbers(scale_ptr, log2e)
    offs_m, offs_n = gl.arange(0, BM, layout=gl.SliceLayout(1, L)), gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    odd = gl.zeros([BM, BN], gl.float32, L) + never
    zeros = gl.sum(gl.reshape(quarters(gl.zeros([BM, BN], gl.float32, L), BM, BN)[0], (8, 2, 8, BN // PIECES)), 1)
    cols = (zeros, zeros, zeros, zeros)
    used = 0
    mbarrier.wait(bars.index(SLOTS), 0)
    for t in range(0, tiles, 2):
        start_m = first_m + t * BM
        even = _first(offs_m, offs_n, M, N, offset, start_m, start_n, never, BM, BN, True, L)
        even, cols, used = _stats_phase(
            x, xs, ys, bars, even, odd, row_sum_ptr, cols, factor, shift, used, t, tiles, first_m, M, offs_m,
            KS, SLOTS, BM, BN, BK,
        )  # fmt: skip
        odd = _first(offs_m, offs_n, M, N, offset, start_m + BM, start_n, never, BM, BN, True, L)
        odd, cols, used = _stats_phase(
            x, xs, ys, bars, odd, even, row_sum_ptr, cols, factor, shift, used, t + 1, tiles, first_m, M, offs_m,
            KS, SLOTS, BM, BN, BK,
        )  # fmt: skip
    pieces = quarters(odd, BM, BN)
    of_rows = gl.zeros([BM], gl.float32, gl.SliceLayout(1, L))
    for n in gl.static_range(PIECES):
        total, of_rows = _sum_piece(pieces[n], cols[n], of_rows, factor, shift)
        total = gl.sum(gl.reshape(total, (64, BN // PIECES)), 0)
        offs = start_n + n * (BN // PIECES) + gl.arange(0, BN // PIECES, layout=total.type.layout)
        gl.store(col_sum_ptr + segment.to(gl.int64) * N + offs, total, mask=offs < N)
    offs = first_m + (tiles - 1) * BM + offs_m
    gl.store(row_sum_ptr + offs, of_rows, mask=offs < M)
