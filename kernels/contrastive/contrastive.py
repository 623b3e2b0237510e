"""Symmetric contrastive loss of image and text features, in blocks: the M x N logits are never all in memory.

With features x [M, D], y [N, D], scale s, logits s_ij = s x_i . y_j and pairs (i, j = i + offset):

    Zr_i = sum_j exp s_ij,  Zc_j = sum_i exp s_ij                L = 1/(2P) sum_pairs [log Zr_i + log Zc_j - 2 s_ij]
    G_ij = exp(s_ij) (1/Zr_i + 1/Zc_j), without the pairs        g_i = (1 - p of its row) + (1 - p of its column)
    dL/dx = s/(2P) (G y - g * y)    dL/dy = s/(2P) (G^T x - g * x)    dL/ds = 1/(2P) sum_i (G y - g * y)_i . x_i

The sums and G leave out the pairs. Late in training the probability p of a pair is nearly 1, and the gradient depends
on 1 - p. Therefore 1 - p is computed from the sum over the other logits, never as a difference from 1, and it is never
stored in 16 bits.

FLOPs: 2 M N D forward (one product gives both sums), 6 M N D backward (one recomputed product feeds both gradients).
Memory beyond inputs and gradients: vectors of M and N, and a block of G. On a GPU the block takes at most 32 MiB, or as
much as the gradient of the texts in float32 but at most 128 MiB: in 16 bits it is all of G up to 4,096 pairs, and
4,096 x 4,096 of 8,192 pairs. On a CPU it is a chunk of rows. If G is more than one block, there are float32
accumulators: [N, D] and a strip of [M, D], or with ``memory="min"`` strips only, for 8 M N D backward.
Method: the loss of Radford et al. 2021, with the blockwise softmax of FlashAttention (Dao et al. 2022) in both
directions at once.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import planned_op, uses_reference
from ..checks import check_bool
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from . import cpu, launches
from .one_block import softmax_gradients
from .shared import (
    call_planned,
    check_pairs,
    features_pass,
    gradients_in_strips,
    is_one_block,
    logit_blocks,
    many_columns,
    new_gradient,
    operand_dtype,
    prepare_both,
    register_gradients,
    scale_gradient,
    scale_tensor,
)
from .small_batch import suits_whole, whole_info_nce_loss, whole_loss, whole_operands
from .stats import ALL, Normalizers, new_accumulator, pair_losses, pairs_in

MEMORY = ("default", "min")


@planned_op("contrastive_fwd")
def _contrastive_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes the contrastive loss for tensors with the layout of the arguments.

    It returns the loss, and for the backward pass row [3, M], col [3, N] and uses_shared_shift []. row and col hold
    maximum, inv_denom and g. g is one_minus_p summed over the directions of the loss.
    """
    if triton_runs_on(image.device):
        forward = functools.partial(launches.pair_losses, offset=offset, both=both, normalize=normalize, dtype=dtype)
        return features_pass(forward, (image, text, None), dtype, normalize=normalize)

    def compute(image: Tensor, text: Tensor, logit_scale: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the contrastive loss on a CPU."""
        x, y = (side.rows for side in prepare_both(image, text, dtype, normalize=normalize))
        stats = cpu.statistics(x, y, logit_scale, offset)
        return *pair_losses(stats, offset, both=both), stats.uses_shared_shift

    return compute


@_contrastive_fwd.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, col = (logit_scale.new_empty(3, x.shape[0]) for x in (image, text))
    return logit_scale.new_empty(()), row, col, logit_scale.new_empty((), dtype=torch.int8)


@planned_op("contrastive_bwd")
def _contrastive_bwd(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor,
    row: Tensor, col: Tensor, uses_shared_shift: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes the contrastive loss's gradients of images, texts and scale, for tensors with
    the arguments' layout.
    """
    if not is_one_block(image, text, dtype):
        return _gradients_in_blocks
    backward = functools.partial(
        softmax_gradients, offset=offset, weight=1 / _terms_of(image, text, offset, both), normalize=normalize,
        dtype=dtype, grad_dtype=image.dtype,
    )  # fmt: skip
    return features_pass(backward, (None, image, text, *[None] * 4), dtype, normalize=normalize)


def _terms_of(image: Tensor, text: Tensor, offset: int, both: bool) -> int:
    """Return the number of terms in the mean that the contrastive loss is, and 1 if there are none."""
    paired, _ = pairs_in(len(image), len(text), offset)
    return max((2 if both else 1) * (paired.stop - paired.start), 1)


def _gradients_in_blocks(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor,
    row: Tensor, col: Tensor, uses_shared_shift: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the contrastive loss from several blocks of G, or on a CPU."""
    normalizers = Normalizers(row, col, uses_shared_shift)
    blocks = logit_blocks(image.device)
    x, y = prepare_both(image, text, dtype, normalize=normalize)
    image_grad = new_gradient(image)
    row_one_minus_p, col_one_minus_p = row[2], col[2]
    coefficient = grad_loss.to(row_one_minus_p.dtype) / _terms_of(image, text, offset, both)
    factor = coefficient * logit_scale
    acc_text = None if save_memory else new_accumulator(y.rows)

    def add_images(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the contrastive gradient of a strip of images, and in the same pass its part of the texts' gradient."""
        block = x.rows[strip], y.rows, logit_scale, normalizers.part(strip, ALL), offset + strip.start
        return [blocks.add_gradients(*block, acc, acc_text, is_new_x=True, is_new_y=strip.start == 0)]

    def add_texts(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the contrastive gradient of a strip of texts."""
        block = x.rows, y.rows[strip], logit_scale, normalizers.part(ALL, strip), offset - strip.start
        return [blocks.add_gradients(*block, None, acc, is_new_y=True)]

    columns = many_columns(x.rows, y.rows)
    parts = gradients_in_strips(blocks, x, y.rows, offset, row_one_minus_p, factor, image_grad, add_images, columns)
    text_grad = new_gradient(text)  # allocated here, so that it can reuse the memory of G
    if acc_text is None:
        gradients_in_strips(blocks, y, x.rows, -offset, col_one_minus_p, factor, text_grad, add_texts)
    else:
        blocks.finish(acc_text, y, x.rows, -offset, col_one_minus_p, factor, text_grad)
    return image_grad, text_grad, scale_gradient(parts, coefficient)


register_gradients(_contrastive_fwd, _contrastive_bwd)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = False,
    offset: int = 0,
    memory: str = "default",
    backend: str = "auto",
) -> Tensor:
    """CLIP's symmetric contrastive loss of matching rows, without the M x N logits.

    Args:
        image: image features [M, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Under autocast
            both are taken in the autocast dtype, as a matrix product would.
        text: text features [N, D], same dtype and device as ``image``.
        logit_scale: the factor on the cosine similarities, already exponentiated: a one-element tensor, into which
            gradients flow, or a number (which ``torch.compile`` takes for a constant).
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        offset: image i and text ``i + offset`` are a pair, where both exist; other rows are negatives only. Without it,
            M and N must be the same.
        memory: "min" recomputes the logits once more in the backward pass (8 in place of 6 M N D) and keeps no float32
            copy of the text gradients. On a GPU it changes nothing up to 4,096 pairs in 16 bits: there is no such copy.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over pairs and directions, a float32 scalar (float64 for float64 input); NaN without pairs, as a mean
        is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "contrastive_loss"
    if type(offset) is not int:
        offset = operator.index(offset)
    save_memory = memory == "min"
    options = op, normalize, normalize.__class__, offset, memory, backend
    known = known_loss(
        options, image, text, logit_scale, both=True, normalize=normalize, offset=offset, save_memory=save_memory
    )  # fmt: skip
    if known is not None:
        return known
    check_pairs(op, ("image", "text"), image, text, offset)
    check_bool(op, "normalize", normalize)
    if memory not in MEMORY:
        raise ValueError(f"{op}: memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    scale = scale_tensor(op, logit_scale, image)
    return pairwise_loss(
        op, "image", image, text, scale, backend, options,
        both=True, normalize=normalize, offset=offset, save_memory=save_memory,
    )  # fmt: skip


def known_loss(
    options: tuple[Any, ...], rows: Tensor, cols: Tensor, logit_scale: Tensor | float, *,
    both: bool, normalize: bool, offset: int = 0, save_memory: bool = False,
) -> Tensor | None:  # fmt: skip
    """Return the loss that :func:`pairwise_loss` returns, if it was called with equal ``options`` and layouts before.

    Otherwise return None; then the arguments have to be checked.
    """
    compute = _contrastive_fwd.find(options, (rows, cols, logit_scale))  # type: ignore[arg-type]
    if compute is None:
        return None
    loss: Tensor = compute(rows, cols, logit_scale, offset, both, normalize, autocast_dtype(rows), save_memory)[0]
    return loss


def pairwise_loss(
    op: str, row_name: str, rows: Tensor, cols: Tensor, logit_scale: Tensor, backend: str, options: tuple[Any, ...], *,
    both: bool, normalize: bool, offset: int, save_memory: bool,
) -> Tensor:  # fmt: skip
    """Return the loss of rows against columns, in ``both`` directions or of the rows only; arguments are checked.

    ``op`` and ``row_name`` appear in errors: the name of the loss, and the name of its argument for ``rows``. A later
    call finds its plan by ``options`` (:func:`known_loss`).
    """
    if uses_reference(op, backend, rows):
        return reference.pairwise_loss(rows, cols, logit_scale, both=both, normalize=normalize, offset=offset)
    dtype = operand_dtype(op, row_name, rows)
    scale = logit_scale.to(accumulate_dtype(dtype))
    if offset == 0 and suits_whole(rows, cols, dtype):  # with offset 0, there are as many columns as rows
        x, y = whole_operands(rows, cols, normalize=normalize, dtype=dtype)
        found = whole_loss(x, y, scale) if both else whole_info_nce_loss(x, y, y[:0], scale, in_batch=True)
        if found is not None:
            return found
    args = rows, cols, scale, offset, both, normalize, dtype, save_memory
    loss: Tensor = call_planned(_contrastive_fwd, options, args[:3], args)[0]
    return loss
