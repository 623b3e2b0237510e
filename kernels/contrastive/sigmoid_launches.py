"""The blocks of the sigmoid loss on a GPU: launches of the Triton kernels."""

import torch
import triton
from torch import Tensor

from ..common import slices
from ..configs import gemm_config
from ..launch import arch_of, launch
from .launches import GROUP_M, STATS_EDGE, _grad_scale, _has_tma, _source, add_products
from .sigmoid_tiles import _sigmoid_grad_tile_kernel, _sigmoid_sums_kernel


def sums(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all but the pairs (i, i + diagonal) of losses and of probabilities, [] in float64; logits of the pairs,
    [M].
    """
    positive = x.new_empty(len(x), dtype=torch.float32)
    totals = x.new_zeros(2, dtype=torch.float64)
    cfg = gemm_config("sigmoid_sums", arch_of(x.device), x.dtype)
    for rows in slices(len(x), STATS_EDGE):
        for cols in slices(len(y), STATS_EDGE):
            m, n = rows.stop - rows.start, cols.stop - cols.start
            tiles = triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n)
            of_tiles = x.new_empty(2, tiles, dtype=torch.float32)
            launch(
                _sigmoid_sums_kernel, (tiles,),
                _source(x[rows], cfg.block_m, cfg.block_k), _source(y[cols], cfg.block_n, cfg.block_k),
                logit_scale, logit_bias, of_tiles[0], of_tiles[1], positive[rows],
                m, n, x.shape[1], diagonal + rows.start - cols.start, x.stride(0), y.stride(0),
                config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
                GROUP_M=GROUP_M, IS_TMA=_has_tma(x),
            )  # fmt: skip
            totals += of_tiles.sum(1, dtype=torch.float64)
    return totals[0], totals[1], positive


def add_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    diagonal: int,
    acc_x: Tensor,
    acc_y: Tensor,
) -> Tensor | None:
    """acc_x += grad_scale * G y and acc_y += grad_scale * G^T x, with G recomputed once for both; returns what
    ``launches.add_products`` does.
    """
    cfg = gemm_config("sigmoid_grad_tile", arch_of(x.device), x.dtype)

    def write(grad: Tensor, rows: slice, cols: slice) -> Tensor:
        (m, n), d = grad.shape, x.shape[1]
        dots = x.new_empty(triton.cdiv(m, cfg.block_m) * triton.cdiv(n, cfg.block_n), dtype=torch.float32)
        launch(
            _sigmoid_grad_tile_kernel, (len(dots),),
            _source(x[rows], cfg.block_m, cfg.block_k), _source(y[cols], cfg.block_n, cfg.block_k),
            _source(grad, cfg.block_m, cfg.block_n // 2), logit_scale, logit_bias, dots,
            m, n, d, diagonal + rows.start - cols.start, x.stride(0), y.stride(0), grad.stride(0),
            _grad_scale(x.dtype),
            config=cfg, device=x.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
            GROUP_M=GROUP_M, IS_TMA=_has_tma(x),
        )  # fmt: skip
        return dots

    return add_products(x, y, write, acc_x, acc_y)
