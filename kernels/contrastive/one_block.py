"""The gradients of a contrastive or sigmoid loss whose G is one block, in few launches and without PyTorch's kernels.

G, the gradient with respect to the logits (see ``contrastive``), is computed once, and its products with the features
are written directly as gradients: there are no accumulators to fill with zeros, and no sums for PyTorch to add. Between
the launches, PyTorch only allocates memory.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import aligned_stride, cdiv, new_rows
from ..configs import RowConfig, planned, row_config
from ..launch import Plan, arch_of
from .kernels import _sigmoid_pairs_kernel
from .one_block_kernels import _gradients_kernel, _scaled_kernel, _through_norm_kernel
from .operands import Layout, Tile, has_tma, layout_of, prepare_both, tile_config, tile_of, tiles, totals_plan, vector
from .products import GradPlan, grad_plan, scale_of_grad
from .stats import Features
from .strips import PART_COLS

SCALED = RowConfig(block_m=1, block_n=4096, num_warps=8, num_stages=1)  # block_n elements for each program


class _Gradients(NamedTuple):
    """The launches that compute the gradients of a contrastive or sigmoid loss at a layout.

    Attributes:
        pairs: the launch for the pairs, which only the sigmoid loss has, and the number of its programs.
        of_g: the launch that computes G.
        products, tiles, x_tiles: the launch that computes G y and G^T x; its tiles of G, of the transposed G, of x and
            of y; and the number of its programs that compute G y.
        length: the number of partial sums of each kind, which ``last`` adds up.
        last: the launch that adds up the partial sums; it also takes the gradients through a normalisation.
    """

    pairs: tuple[Plan, int]
    of_g: GradPlan
    products: Plan
    tiles: tuple[Tile, ...]
    x_tiles: int
    length: int
    last: Plan


def softmax_gradients(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor,
    uses_shared_shift: Tensor, *,
    offset: int, weight: float, normalize: bool, dtype: torch.dtype, grad_dtype: torch.dtype, has_text: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of the contrastive loss: of the images, of the texts if ``has_text``, and of the scale.

    Args:
        grad_loss: [], the upstream gradient.
        image, text: features as a loss gets them.
        logit_scale, row, col, uses_shared_shift: see :class:`.stats.Normalizers`; row 2 of ``row`` is one_minus_p.
        offset, normalize: as :func:`.contrastive.contrastive_loss` gets them.
        weight: one over the number of terms in the loss, a mean.
        dtype: the dtype of the products' operands.
        grad_dtype: the dtype of the gradients of the features.
        has_text: whether the texts' gradient is computed.
    """
    x, y = prepare_both(image, text, dtype, normalize=normalize)
    layout = layout_of(x.rows, y.rows, offset)
    how = _gradients(layout, weight, normalize, True, has_text)
    image_grad = image.new_empty(image.shape, dtype=grad_dtype)
    # No program writes a gradient of the texts that is not wanted.
    text_grad = text.new_empty(text.shape, dtype=grad_dtype) if has_text else image_grad
    numbers, scale_grad = vector(x.rows, how.length), vector(x.rows)
    grad = new_rows(x.rows, layout.m, layout.n)
    how.of_g.start(x.rows, y.rows, grad, logit_scale, uses_shared_shift, row, row[1], col, col[1], numbers)
    of_pairs = numbers[how.of_g.programs :]
    _write_gradients(
        how,
        grad,
        x,
        y,
        row[2],
        logit_scale,
        grad_loss,
        image_grad,
        text_grad,
        numbers,
        of_pairs,
        scale_grad,
        scale_grad,
    )
    return (image_grad, text_grad, scale_grad) if has_text else (image_grad, scale_grad)


def sigmoid_gradients(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *,
    offset: int, normalize: bool, dtype: torch.dtype, grad_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the sigmoid loss [], and the gradients of the images, of the texts, and of bias and scale [2].

    The arguments are those of :func:`softmax_gradients`.
    """
    x, y = prepare_both(image, text, dtype, normalize=normalize)
    layout = layout_of(x.rows, y.rows, offset)
    how = _gradients(layout, 1 / layout.m, normalize, False, True)
    image_grad, text_grad = (side.new_empty(side.shape, dtype=grad_dtype) for side in (image, text))
    pairs, programs = how.pairs
    numbers, one_minus_p = vector(x.rows, 3, how.length), vector(x.rows, layout.m)
    of_loss, of_bias, of_scale = numbers.unbind()
    pairs.start(x.rows, y.rows, logit_scale, logit_bias, one_minus_p, of_loss, of_bias, of_scale)
    grad = new_rows(x.rows, layout.m, layout.n)
    how.of_g.start(x.rows, y.rows, grad, logit_scale, logit_bias, *numbers[:, programs:].unbind())
    loss, number_grads = vector(x.rows), vector(x.rows, 2)
    # ``of_pairs`` is written but not read, since ``numbers`` already has the pairs' part of the gradient of the scale.
    of_pairs = vector(x.rows, how.x_tiles)
    _write_gradients(
        how, grad, x, y, one_minus_p, logit_scale, None, image_grad, text_grad, numbers, of_pairs, loss, number_grads
    )
    return loss, image_grad, text_grad, number_grads


def scaled(
    grad_loss: Tensor, image_grad: Tensor, text_grad: Tensor, numbers: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return three gradients of a loss, which are contiguous, times ``grad_loss``; those of features in ``dtype``."""
    plan = _scaled_plan(image_grad.device, image_grad.numel(), text_grad.numel(), numbers.numel())
    outs = *(torch.empty_like(grad, dtype=dtype) for grad in (image_grad, text_grad)), torch.empty_like(numbers)
    plan.start(image_grad, text_grad, numbers, grad_loss, *outs)
    return outs


@planned
def _scaled_plan(device: torch.device, *sizes: int) -> Plan:
    """Return the plan of the kernel that multiplies a contrastive loss's gradients by the upstream gradient."""
    programs = sum(cdiv(size, SCALED.block_n) for size in sizes)
    return Plan(_scaled_kernel, (programs,), *sizes, config=SCALED, device=device, BLOCK=SCALED.block_n)


@planned
def _gradients(layout: Layout, weight: float, has_norm: bool, is_softmax: bool, has_y: bool) -> _Gradients:
    """Plan the gradients of a contrastive or sigmoid loss; the sigmoid loss's are later multiplied by the upstream
    gradient.
    """
    device, dtype, m, n, d, offset, stride_x, stride_y = layout
    rows = row_config("contrastive_rows", arch_of(device), dtype)
    of_rows = functools.partial(Plan, config=rows, device=device, BLOCK_M=rows.block_m, BLOCK_K=rows.block_n)
    num_m, num_n = cdiv(m, rows.block_m), cdiv(n, rows.block_m) * has_y
    pairs = of_rows(_sigmoid_pairs_kernel, (num_m,), m, n, d, offset, stride_x, stride_y)
    stride_grad = aligned_stride(n, dtype)  # the stride of the rows that ``new_rows`` makes
    of_g = grad_plan(layout, stride_grad, is_softmax)
    cfg = tile_config("contrastive_products", device, dtype, (m, d), (n, d))
    x_tiles, y_tiles = (cdiv(side, cfg.block_m) * cdiv(d, cfg.block_n) for side in (m, n * has_y))
    products = Plan(
        _gradients_kernel, (x_tiles + y_tiles,),
        m, n, d, offset, x_tiles, stride_grad, stride_x, stride_y, weight, 1 / scale_of_grad(dtype),
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k,
        PARTS=max(1, cfg.block_n // PART_COLS), IS_TMA=has_tma(device, dtype, d),
        HAS_NORM=has_norm, HAS_GRAD_LOSS=is_softmax,
    )  # fmt: skip
    of_tiles = [(cfg.block_m, cfg.block_k), (cfg.block_k, cfg.block_m), *[(cfg.block_k, cfg.block_n)] * 2]
    of_g_and_features = tuple([tile_of(*tile, layout) for tile in of_tiles])
    numbers, count = (1, of_g.programs + x_tiles) if is_softmax else (3, num_m + of_g.programs)
    last = totals_plan(device, numbers, count, weight, has_flags=False, has_grad_loss=is_softmax)
    if has_norm:
        last = of_rows(
            _through_norm_kernel, (num_m + num_n,), m, n, d, stride_x, stride_y, count, weight,
            NUMBERS=numbers, HAS_GRAD_LOSS=is_softmax,
        )  # fmt: skip
    return _Gradients((pairs, num_m), of_g, products, of_g_and_features, x_tiles, count, last)


def _write_gradients(
    how: _Gradients, grad: Tensor, x: Features, y: Features, one_minus_p: Tensor, logit_scale: Tensor,
    grad_loss: Tensor | None, image_grad: Tensor, text_grad: Tensor,
    numbers: Tensor, of_pairs: Tensor, first: Tensor, rest: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of the features, and write the totals of the partial sums ``numbers`` to ``first`` and
    ``rest``.

    ``grad`` is a scaled G. ``of_pairs`` gets the sums of -one_minus_p * positive . x; it may be a part of ``numbers``.
    """
    given = logit_scale if grad_loss is None else grad_loss
    has_norm = x.inv_norm is not None
    # Gradients of normalised features go through the normalisation afterwards, in float32.
    outs = [vector(x.rows, *out.shape) if has_norm else out for out in (image_grad, text_grad)]
    of_g, of_transposed, of_x, of_y = how.tiles
    how.products.start(
        tiles(grad, of_g), tiles(grad, of_transposed), tiles(x.rows, of_x), tiles(y.rows, of_y), x.rows, y.rows,
        one_minus_p, logit_scale, given, *outs, of_pairs,
    )  # fmt: skip
    if has_norm:
        how.last.start(
            *outs, x.rows, y.rows, x.inv_norm, y.inv_norm, logit_scale, given, image_grad, text_grad,
            numbers, first, rest,
        )  # fmt: skip
    else:
        how.last.start(numbers, numbers, first if grad_loss is None else grad_loss, first, rest, numbers)
