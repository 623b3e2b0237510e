"""The blocks of the contrastive losses on a GPU: launches of the Triton kernels."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import LOG2E, slices
from ..configs import GemmConfig, RowConfig, gemm_config, row_config
from ..launch import arch_of, launch, multiprocessors
from .row_tiles import _finish_kernel, _normalize_kernel
from .stats import Stats, Weights, is_exact, no_stats, shared_shift
from .tiles import _grad_tile_kernel, _merge_kernel, _online_stats_kernel, _products_kernel, _stats_kernel

# Rows and columns whose sums by tile are held at once: at most 64 MiB, whatever M and N are.
STATS_EDGE = 16384
MERGE = RowConfig(block_m=256, block_n=1, num_warps=4, num_stages=1)
RECORDED_MULTIPROCESSORS = 132  # of an H100, where none is at hand
GROUP_M = 8
PRODUCTS = ("triton", "addmm")
_products = "triton"


@contextlib.contextmanager
def products_by(route: str) -> Iterator[None]:
    """Multiply G with the features by the Triton kernel or by ``torch.addmm``, for benchmarks: they decide.

    Raises:
        ValueError: not one of ``PRODUCTS``.
    """
    global _products
    if route not in PRODUCTS:
        raise ValueError(f"route must be one of {', '.join(PRODUCTS)}, got {route!r}")
    outer, _products = _products, route
    try:
        yield
    finally:
        _products = outer


def prepare(x: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """``x`` as the kernels take it: in ``dtype``, unit stride along rows, rows aligned. With ``normalize``, unit rows
    and one over the norm of each.
    """
    if not normalize:
        x = x.to(dtype)
        return (x if _is_aligned(x) else _aligned(x.shape, x).copy_(x)), None
    (n, d), device = x.shape, x.device
    out = _aligned(x.shape, x.new_empty(0, dtype=dtype))
    inv_norm = x.new_empty(n, dtype=torch.float32)
    cfg = row_config("contrastive_rows", arch_of(device), x.dtype)
    launch(
        _normalize_kernel, (triton.cdiv(n, cfg.block_m),), x, out, inv_norm, n, d, *x.stride(), out.stride(0),
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n,
    )  # fmt: skip
    return out, inv_norm


def new_accumulator(rows: int, like: Tensor) -> Tensor:
    """Zeros [rows, D] that gradients are added to."""
    return like.new_zeros(rows, like.shape[1], dtype=torch.float32)


def strips(x: Tensor) -> list[slice]:
    """Rows to accumulate before they are finished."""
    return slices(len(x), _block_edge(x))


def stats(x: Tensor, y: Tensor, logit_scale: Tensor, diagonal: int) -> Stats:
    """Statistics of the logits x y^T, pairs (i, i + diagonal) left out: one product if the shared shift suits them."""
    result = no_stats(x, y)
    _accumulate_stats(x, y, logit_scale, diagonal, result, is_online=False)
    shift = shared_shift(logit_scale)
    result.row_max.copy_(shift)
    result.col_max.copy_(shift)
    result.shared.copy_(is_exact(result.row_sum, result.col_sum))
    _accumulate_stats(x, y, logit_scale, diagonal, result, is_online=True)
    return result


def _accumulate_stats(
    x: Tensor, y: Tensor, logit_scale: Tensor, diagonal: int, result: Stats, *, is_online: bool
) -> None:
    device = x.device
    cfg = gemm_config(f"contrastive_{'online_stats' if is_online else 'stats'}", arch_of(device), x.dtype)
    # by tile, of rows and of columns: sums, and maxima before them
    of_rows, of_cols = (
        result.row_sum.new_empty(2 if is_online else 1, size) for size in _sums_by_tile(cfg, len(x), len(y))
    )
    for rows in slices(len(x), STATS_EDGE):
        for cols in slices(len(y), STATS_EDGE):
            m, n = rows.stop - rows.start, cols.stop - cols.start
            num_m, num_n = triton.cdiv(m, cfg.block_m), triton.cdiv(n, cfg.block_n)
            kernel, programs, buffers = _stats_kernel, num_m * num_n, (of_rows[0], of_cols[0])
            if is_online:
                programs = min(programs, 2 * multiprocessors(device, RECORDED_MULTIPROCESSORS))
                kernel, buffers = _online_stats_kernel, (result.shared, *of_rows, *of_cols)
            launch(
                kernel, (programs,),
                _source(x[rows], cfg.block_m, cfg.block_k), _source(y[cols], cfg.block_n, cfg.block_k), logit_scale,
                *buffers, result.positive[rows], m, n, x.shape[1], diagonal + rows.start - cols.start,
                x.stride(0), y.stride(0), LOG2E,
                config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
                GROUP_M=GROUP_M, IS_TMA=_has_tma(x),
            )  # fmt: skip
            sides = (
                (of_rows, num_n, m, result.row_max[rows], result.row_sum[rows], cols.start == 0),
                (of_cols, num_m, n, result.col_max[cols], result.col_sum[cols], rows.start == 0),
            )
            for buffer, count, size, maximum, total, is_first in sides:
                launch(
                    _merge_kernel, (triton.cdiv(size, MERGE.block_m),), buffer[0], buffer[-1], maximum, total,
                    result.shared, count, size, config=MERGE, device=device,
                    BLOCK=MERGE.block_m, IS_ONLINE=is_online, IS_FIRST=is_first,
                )  # fmt: skip


def _sums_by_tile(cfg: GemmConfig, m: int, n: int) -> tuple[int, int]:
    """Elements that hold the sums of rows and of columns by tile."""
    m, n = min(STATS_EDGE, m), min(STATS_EDGE, n)
    return triton.cdiv(n, cfg.block_n) * m, triton.cdiv(m, cfg.block_m) * n


def stats_scratch(arch: int, dtype: torch.dtype, m: int, n: int) -> int:
    """Bytes that :func:`stats` of ``m`` rows and ``n`` columns takes for a while: the online pass has the most."""
    return 4 * 2 * sum(_sums_by_tile(gemm_config("contrastive_online_stats", arch, dtype), m, n))


def add_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    weights: Weights,
    diagonal: int,
    acc_x: Tensor | None,
    acc_y: Tensor | None,
) -> Tensor | None:
    """acc_x += grad_scale * G y and acc_y += grad_scale * G^T x, with G recomputed once for both; returns what
    :func:`add_products` does.
    """

    def write(grad: Tensor, rows: slice, cols: slice) -> Tensor:
        row, col = weights.row[:, rows], weights.col[:, cols]
        offset = diagonal + rows.start - cols.start
        return _launch_grad_tile(x[rows], y[cols], grad, logit_scale, weights.shared, row, col, offset)

    return add_products(x, y, write, acc_x, acc_y)


def add_products(
    x: Tensor,
    y: Tensor,
    write: Callable[[Tensor, slice, slice], Tensor],
    acc_x: Tensor | None,
    acc_y: Tensor | None,
) -> Tensor | None:
    """acc_x += grad_scale * G y and acc_y += grad_scale * G^T x, with blocks of grad_scale * G that ``write(grad, rows,
    cols)`` writes to ``grad``; it returns the sums of their tiles of grad_scale * G_ij x_i . y_j, [tiles] in float32.

    Returns:
        Sum of G_ij x_i . y_j, [] in float64, from G before it is rounded to 16 bits: what the accumulators say of that
        has the rounding in it, which the gradient of the scale would show. None if G is not rounded.
    """
    total = x.new_zeros((), dtype=torch.float64)
    edge = _block_edge(x)
    buffer = _aligned((min(edge, len(x)), min(edge, len(y))), x)
    for rows in slices(len(x), edge):
        for cols in slices(len(y), edge):
            grad = buffer[: rows.stop - rows.start, : cols.stop - cols.start]
            total += write(grad, rows, cols).sum(dtype=torch.float64)
            _add_products(
                grad, x[rows], y[cols], None if acc_x is None else acc_x[rows], None if acc_y is None else acc_y[cols]
            )
    return total / _grad_scale(x.dtype) if x.dtype.itemsize == 2 else None


def _launch_grad_tile(
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    logit_scale: Tensor,
    shared: Tensor,
    row: Tensor,
    col: Tensor,
    diagonal: int,
) -> Tensor:
    (m, d), n = x.shape, len(y)
    cfg = gemm_config("contrastive_grad_tile", arch_of(x.device), x.dtype)
    dots = x.new_empty(triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n), dtype=torch.float32)
    launch(
        _grad_tile_kernel, (len(dots),),
        _source(x, cfg.block_m, cfg.block_k), _source(y, cfg.block_n, cfg.block_k),
        _source(grad, cfg.block_m, cfg.block_n // 2), logit_scale, shared, row[0], row[1], col[0], col[1], dots,
        m, n, d, diagonal, x.stride(0), y.stride(0), grad.stride(0), LOG2E, _grad_scale(x.dtype),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        GROUP_M=GROUP_M, IS_TMA=_has_tma(x),
    )  # fmt: skip
    return dots


def _add_products(grad: Tensor, x: Tensor, y: Tensor, acc_x: Tensor | None, acc_y: Tensor | None) -> None:
    if _products == "addmm":
        for acc, left, right in ((acc_x, grad, y), (acc_y, grad.T, x)):
            if acc is not None:
                torch.addmm(acc, left, right, out_dtype=torch.float32, out=acc)
        return
    (m, n), d = grad.shape, x.shape[1]
    cfg = gemm_config("contrastive_products", arch_of(x.device), x.dtype)
    num_d = triton.cdiv(d, cfg.block_n)
    num_x_tiles = 0 if acc_x is None else triton.cdiv(m, cfg.block_m) * num_d
    num_y_tiles = 0 if acc_y is None else triton.cdiv(n, cfg.block_m) * num_d
    nowhere = x.new_empty(0, dtype=torch.float32)
    launch(
        _products_kernel, (num_x_tiles + num_y_tiles,),
        _source(grad, cfg.block_m, cfg.block_k), _source(grad, cfg.block_k, cfg.block_m),
        _source(x, cfg.block_k, cfg.block_n), _source(y, cfg.block_k, cfg.block_n),
        nowhere if acc_x is None else acc_x, nowhere if acc_y is None else acc_y,
        m, n, d, num_x_tiles, grad.stride(0), x.stride(0), y.stride(0),
        config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        IS_TMA=_has_tma(x),
    )  # fmt: skip


def finish(
    acc: Tensor, own: Tensor, other: Tensor, diagonal: int, miss: Tensor, factor: Tensor, inv_norm: Tensor | None,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """out = factor * (acc - miss * positive), through the normalisation if there was one; see ``cpu.finish``."""
    n, d = own.shape
    dot = torch.empty_like(miss)
    cfg = row_config("contrastive_rows", arch_of(own.device), own.dtype)
    launch(
        _finish_kernel, (triton.cdiv(n, cfg.block_m),),
        acc, own, other, miss, factor, miss if inv_norm is None else inv_norm, out, dot,
        n, len(other), d, diagonal, own.stride(0), other.stride(0), 1.0 / _grad_scale(own.dtype),
        config=cfg, device=own.device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, HAS_NORM=inv_norm is not None,
    )  # fmt: skip
    return dot


def _grad_scale(dtype: torch.dtype) -> float:
    # G lies in [0, 2] and is about 2/N at the start: in fp16 that would be subnormal, so it is stored larger
    return 2.0**14 if dtype == torch.float16 else 1.0


def _block_edge(x: Tensor) -> int:
    return block_edge(arch_of(x.device), x.dtype, x.shape[1], multiprocessors(x.device, RECORDED_MULTIPROCESSORS))


def block_edge(arch: int, dtype: torch.dtype, embed_dim: int, multiprocessors: int) -> int:
    """Rows and columns of a block of G: as many as make the two products one wave of tiles, so that G stays in L2."""
    cfg = gemm_config("contrastive_products", arch, dtype)
    return cfg.block_m * max(4, multiprocessors // 2 // triton.cdiv(embed_dim, cfg.block_n))


def _has_tma(x: Tensor) -> bool:
    # float32 products must stay exact, so they do not reach the matrix units that tiles are copied for
    return arch_of(x.device) >= 90 and x.dtype.itemsize == 2


def _source(x: Tensor, rows: int, cols: int) -> Any:
    """What ``load_tile`` takes: a tensor descriptor where the architecture has them, otherwise the tensor itself."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols]) if _has_tma(x) else x


def _is_aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) * x.dtype.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _aligned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised [rows, cols] whose rows start at multiples of 16 bytes, as tensor descriptors need."""
    multiple = 16 // like.dtype.itemsize
    return like.new_empty(shape[0], triton.cdiv(shape[1], multiple) * multiple)[:, : shape[1]]
