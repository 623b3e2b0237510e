"""Symmetric contrastive loss of image and text features, blockwise: the M x N logits never exist.

With features x [M, D], y [N, D], scale s, logits s_ij = s x_i . y_j and pairs (i, j = i + offset):

    Zr_i = sum_j exp s_ij,  Zc_j = sum_i exp s_ij                L = 1/(2P) sum_pairs [log Zr_i + log Zc_j - 2 s_ij]
    G_ij = exp(s_ij) (1/Zr_i + 1/Zc_j), without the pairs        g_i = (1 - p of its row) + (1 - p of its column)
    dL/dx = s/(2P) (G y - g * y)    dL/dy = s/(2P) (G^T x - g * x)    dL/ds = 1/(2P) sum_i (G y - g * y)_i . x_i

A pair is in neither the sums nor G. Late in training p is nearly 1, and what it lacks is all there is to learn from: it
is taken from the sum of the others, never as a difference from 1, and never passes through a 16-bit tile.

FLOPs: 2 M N D forward (one product gives both sums), 6 M N D backward (one recomputed product feeds both gradients).
Memory beyond inputs and gradients: vectors of M and N, one tile of G, and float32 accumulators: [N, D] and a strip of
[M, D], or with ``memory="min"`` strips only, for 8 M N D backward.
Method: the loss of Radford et al. 2021, with the blockwise softmax of FlashAttention (Dao et al. 2022) in both
directions at once.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import outside_autocast, uses_reference
from ..checks import check_float, check_like, check_tensor
from ..dtypes import FLOATS, accumulate_dtype, autocast_to, dtype_name
from . import symmetric

MEMORY = ("default", "min")


@torch.library.custom_op("clipfast::contrastive_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _contrastive_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return symmetric.forward(image, text, logit_scale, offset, both, normalize, dtype)


@_contrastive_fwd.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    row, col = (x.new_empty(3, x.shape[0], dtype=accumulate_dtype(dtype)) for x in (image, text))
    return row.new_empty(()), row, col, row.new_empty((), dtype=torch.int8)


@torch.library.custom_op("clipfast::contrastive_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _contrastive_bwd(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return symmetric.backward(
        grad_loss, image, text, logit_scale, row, col, shared, offset, both, normalize, dtype, save_memory
    )


@_contrastive_bwd.register_fake
def _(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    offset: int, both: bool, normalize: bool, dtype: torch.dtype, save_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return image.new_empty(image.shape), text.new_empty(text.shape), row.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, logit_scale, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, logit_scale, *output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    return *torch.ops.clipfast.contrastive_bwd(grad_loss, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)


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
            copy of the text gradients.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over pairs and directions, a float32 scalar (float64 for float64 input); NaN without pairs, as a mean
        is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "contrastive_loss"
    check_sides(op, image, text, offset)
    return pairwise_loss(op, image, text, logit_scale, True, normalize, offset, memory, backend)


def pairwise_loss(
    op: str,
    rows: Tensor,
    cols: Tensor,
    logit_scale: Tensor | float,
    both: bool,
    normalize: bool,
    offset: int,
    memory: str,
    backend: str,
) -> Tensor:
    """The loss of rows against columns, ``both`` directions or that of the rows only; see :func:`contrastive_loss`."""
    check_width(op, rows, cols)
    if memory not in MEMORY:
        raise ValueError(f"{op}: memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    scale = scale_tensor(op, logit_scale, rows)
    check_like(op, "text", cols, "image", rows)
    operand = autocast_to(rows.new_empty(0))
    if uses_reference(op, backend, rows):
        return reference.pairwise_loss(rows, cols, scale, both=both, normalize=normalize, offset=offset)
    check_float(op, "image", operand)
    scale = scale.to(accumulate_dtype(operand.dtype))
    return _contrastive_fwd(rows, cols, scale, offset, both, normalize, operand.dtype, memory == "min")[0]


def check_sides(op: str, image: Tensor, text: Tensor, offset: int) -> None:
    """Refuse what are no features, and sides of different shapes unless ``offset`` says where the pairs are."""
    check_tensor(op, "image", image, 2)
    check_tensor(op, "text", text, 2)
    if offset == 0 and image.shape != text.shape:
        raise ValueError(
            f"{op}: image and text must have the same shape, got {tuple(image.shape)} and {tuple(text.shape)}; "
            "with offset=..., they may have other numbers of rows"
        )


def check_width(op: str, rows: Tensor, cols: Tensor) -> None:
    """Refuse features of different sizes."""
    if rows.shape[1] != cols.shape[1]:
        raise ValueError(f"{op}: features must have the same size, got {rows.shape[1]} and {cols.shape[1]}")


def scale_tensor(
    op: str, logit_scale: Tensor | float, like: Tensor, *, name: str = "logit_scale", like_name: str = "image"
) -> Tensor:
    """``logit_scale`` (or what else ``name`` says) as a tensor without dimensions, on the device of ``like``."""
    if isinstance(logit_scale, (int, float)):
        return torch.full((), logit_scale, dtype=torch.float32, device=like.device)
    if not isinstance(logit_scale, Tensor):
        raise TypeError(f"{op}: {name} must be a number or a torch.Tensor, got {type(logit_scale).__name__}")
    if logit_scale.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must have a floating dtype, got {dtype_name(logit_scale.dtype)}")
    if logit_scale.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element, got shape {tuple(logit_scale.shape)}")
    if logit_scale.device != like.device:
        raise ValueError(f"{op}: {name} is on {logit_scale.device}, but {like_name} is on {like.device}")
    return logit_scale.reshape(())
