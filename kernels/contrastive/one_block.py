"""The gradients of a contrastive or sigmoid loss whose G is one block, in few launches and without other ops.

G is computed once, and its products with the features are written as gradients at once: there are no accumulators to
fill with zeros, and no sums for PyTorch to add. Between the launches stand allocations only.
"""

from torch import Tensor

from ..common import cdiv, new_rows
from ..configs import GemmConfig, RowConfig
from ..launch import launch
from .block_sizes import GradGrid
from .kernels import _sigmoid_grad_tile_kernel, _sigmoid_pairs_kernel
from .launches import PART_COLS, grid_of, launch_grad, processors, scale_of_grad
from .one_block_kernels import _gradients_kernel, _scaled_kernel, _through_norm_kernel
from .operands import has_tma, launch_on_rows, rows_config, tile_config, tiles, totals, vector
from .softmax_kernels import _grad_tile_kernel
from .stats import Features, Normalizers

SCALED = RowConfig(block_m=1, block_n=4096, num_warps=8, num_stages=1)  # block_n elements for each program


def softmax_gradients(
    grad_loss: Tensor, x: Features, y: Features, logit_scale: Tensor, normalizers: Normalizers, offset: int,
    weight: float, image_grad: Tensor, text_grad: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradients of the contrastive loss to ``image_grad`` and ``text_grad``, and return that of the scale.

    Row 2 of ``normalizers.row`` is one_minus_p. ``weight`` is the factor of a term in the mean that the loss is.
    """
    row, col, uses_shared_shift = normalizers
    cfg, grid = _grid("contrastive_grad_tile", x.rows, y.rows, offset, is_softmax=True)
    numbers = vector(x.rows, 1, grid.programs + _products(x.rows, y.rows)[1])
    grad = new_rows(x.rows, len(x.rows), len(y.rows))
    inputs = logit_scale, uses_shared_shift, row[0], row[1], col[0], col[1]
    launch_grad(_grad_tile_kernel, grid, cfg, grad, x.rows, y.rows, offset, inputs, numbers[:, : grid.programs])
    scale_grad = vector(x.rows)
    _write_gradients(
        grad, x, y, row[2], logit_scale, grad_loss, offset, weight, image_grad, text_grad,
        numbers, numbers[0, grid.programs :], scale_grad, scale_grad,
    )  # fmt: skip
    return scale_grad


def sigmoid_gradients(
    x: Features, y: Features, logit_scale: Tensor, logit_bias: Tensor, offset: int,
    image_grad: Tensor, text_grad: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradients of the sigmoid loss, and return the loss [] and the gradients of bias and scale [2]."""
    cfg, grid = _grid("sigmoid_grad_tile", x.rows, y.rows, offset, is_softmax=False)
    of_rows, m = rows_config(x.rows), len(x.rows)
    pairs = cdiv(m, of_rows.block_m)
    numbers, one_minus_p = vector(x.rows, 3, pairs + grid.programs), vector(x.rows, m)
    inputs = logit_scale, logit_bias
    launch_on_rows(
        _sigmoid_pairs_kernel, of_rows, x.rows, y.rows, *inputs, one_minus_p, *numbers[:, :pairs],
        m, len(y.rows), x.rows.shape[1], offset, x.rows.stride(0), y.rows.stride(0),
    )  # fmt: skip
    grad = new_rows(x.rows, m, len(y.rows))
    launch_grad(_sigmoid_grad_tile_kernel, grid, cfg, grad, x.rows, y.rows, offset, inputs, numbers[:, pairs:])
    loss, number_grads = vector(x.rows), vector(x.rows, 2)
    # The pairs' part of the gradient of the scale is already in ``numbers``.
    _write_gradients(
        grad, x, y, one_minus_p, logit_scale, None, offset, 1 / m, image_grad, text_grad,
        numbers, vector(x.rows, _products(x.rows, y.rows)[1]), loss, number_grads,
    )  # fmt: skip
    return loss, number_grads


def scaled(grad_loss: Tensor, image_grad: Tensor, text_grad: Tensor, numbers: Tensor, *outs: Tensor) -> None:
    """Write three gradients, which are contiguous, times ``grad_loss`` to ``outs``."""
    sizes = image_grad.numel(), text_grad.numel(), numbers.numel()
    programs = sum(cdiv(size, SCALED.block_n) for size in sizes)
    launch(
        _scaled_kernel, (programs,), image_grad, text_grad, numbers, grad_loss, *outs, *sizes,
        config=SCALED, device=image_grad.device, BLOCK=SCALED.block_n,
    )  # fmt: skip


def _grid(name: str, x: Tensor, y: Tensor, offset: int, *, is_softmax: bool) -> tuple[GemmConfig, GradGrid]:
    """Return configuration and programs of the kernel that computes the only block of G."""
    cfg = tile_config(name, x, [(len(x), len(y))], processors(x))
    return cfg, grid_of(len(x), len(y), offset, x, cfg, is_softmax=is_softmax)


def _products(x: Tensor, y: Tensor) -> tuple[GemmConfig, int, int]:
    """Return the configuration of the products of G and features, and the tiles of the gradients of x and of y."""
    d = x.shape[1]
    cfg = tile_config("contrastive_products", x, [(len(x), d), (len(y), d)], processors(x))
    x_tiles, y_tiles = (cdiv(len(side), cfg.block_m) * cdiv(d, cfg.block_n) for side in (x, y))
    return cfg, x_tiles, y_tiles


def _write_gradients(
    grad: Tensor, x: Features, y: Features, one_minus_p: Tensor, logit_scale: Tensor, grad_loss: Tensor | None,
    offset: int, weight: float, image_grad: Tensor, text_grad: Tensor,
    numbers: Tensor, of_pairs: Tensor, first: Tensor, rest: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of the features from grad_scale * G, and the totals of ``numbers``, as :func:`.totals` does.

    ``of_pairs`` gets the sums of -one_minus_p * positive . x; it may be a part of ``numbers``.
    """
    (m, d), n, device = x.rows.shape, len(y.rows), x.rows.device
    given, has_grad_loss = logit_scale if grad_loss is None else grad_loss, grad_loss is not None
    cfg, x_tiles, y_tiles = _products(x.rows, y.rows)
    tile = cfg.block_k, cfg.block_n
    has_norm = x.inv_norm is not None
    # Gradients of normalised features go through the normalisation afterwards, in float32.
    outs = [vector(x.rows, *out.shape) if has_norm else out for out in (image_grad, text_grad)]
    launch(
        _gradients_kernel, (x_tiles + y_tiles,),
        tiles(grad, cfg.block_m, cfg.block_k, x.rows), tiles(grad, cfg.block_k, cfg.block_m, x.rows),
        tiles(x.rows, *tile, x.rows), tiles(y.rows, *tile, x.rows), x.rows, y.rows,
        one_minus_p, logit_scale, given, *outs, of_pairs,
        m, n, d, offset, x_tiles, grad.stride(0), x.rows.stride(0), y.rows.stride(0),
        weight, 1 / scale_of_grad(x.rows.dtype),
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        PARTS=max(1, cfg.block_n // PART_COLS), IS_TMA=has_tma(x.rows), HAS_NORM=has_norm, HAS_GRAD_LOSS=has_grad_loss,
    )  # fmt: skip
    if not has_norm:
        totals(numbers, weight, first, rest, grad_loss=grad_loss)
        return
    of_rows = rows_config(x.rows)
    launch(
        _through_norm_kernel, (cdiv(m, of_rows.block_m) + cdiv(n, of_rows.block_m),),
        *outs, x.rows, y.rows, x.inv_norm, y.inv_norm, logit_scale, given, image_grad, text_grad, numbers, first, rest,
        m, n, d, x.rows.stride(0), y.rows.stride(0), numbers.shape[1], weight,
        config=of_rows, device=device, BLOCK_M=of_rows.block_m, BLOCK_K=of_rows.block_n,
        NUMBERS=len(numbers), HAS_GRAD_LOSS=has_grad_loss,
    )  # fmt: skip
