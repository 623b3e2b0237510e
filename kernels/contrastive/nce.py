"""Contrastive losses of one direction with negatives from elsewhere: InfoNCE with a queue, and NT-Xent.

InfoNCE of queries x [N, D], their keys y [N, D] and negatives q [K, D] with scale s:

    Z_i = sum_k exp(s x_i . q_k) + sum_{j != i} exp(s x_i . y_j)                  the second sum with ``in_batch`` only
    L = 1/N sum_i log(1 + Z_i / exp(s x_i . y_i))                           p_i = exp(s x_i . y_i) / (Z_i + its own)
    dL/dx = s/N (P_q q + P_y y - (1 - p) * y)    dL/dq = s/N P_q^T x    dL/dy = s/N (P_y^T x - (1 - p) * x)

NT-Xent of two views x, y [N, D] is the same over all 2N views, each against all but itself:

    Z of x_i = sum_{j != i} exp(s x_i . x_j) + exp(s x_i . y_j), and of y_i likewise           L = mean over 2N views

The product x y^T serves both views, x x^T and y y^T are symmetric: three products in place of four, 6 N^2 D FLOPs
forward and 14 N^2 D backward. InfoNCE takes 2 N C D forward and 6 N C D backward (4 where the C columns need no
gradient). As in :mod:`loss`, a pair is in no sum and passes through no 16-bit tile, and the logits never exist.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import outside_autocast, uses_reference
from ..checks import check_float, check_like, check_tensor
from ..dtypes import accumulate_dtype, autocast_to
from . import several
from .loss import pairwise_loss, scale_tensor


@torch.library.custom_op("clipfast::info_nce_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _info_nce_fwd(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return several.info_nce_forward(query, key, negatives, logit_scale, in_batch, normalize, dtype)


@_info_nce_fwd.register_fake
def _(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    row = query.new_empty(3, query.shape[0], dtype=accumulate_dtype(dtype))
    return row.new_empty(()), row, row.new_empty((), dtype=torch.int8)


@torch.library.custom_op("clipfast::info_nce_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _info_nce_bwd(
    grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, row: Tensor, shared: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype, needs_key: bool, needs_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return several.info_nce_backward(
        grad_loss, query, key, negatives, logit_scale, row, shared,
        in_batch, normalize, dtype, needs_key, needs_negatives,
    )  # fmt: skip


@_info_nce_bwd.register_fake
def _(
    grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, row: Tensor, shared: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype, needs_key: bool, needs_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query_grad, key_grad, negatives_grad = (
        side.new_empty(side.shape[0] if needed else 0, side.shape[1])
        for side, needed in ((query, True), (key, needs_key), (negatives, needs_negatives))
    )
    return query_grad, key_grad, negatives_grad, row.new_empty(())


def _info_nce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.in_batch, ctx.normalize, ctx.dtype = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _info_nce_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    _, needs_key, needs_negatives, *_ = ctx.needs_input_grad
    query, key, negatives, scale = torch.ops.clipfast.info_nce_bwd(
        grad_loss, *ctx.saved_tensors, ctx.in_batch, ctx.normalize, ctx.dtype, needs_key, needs_negatives
    )
    return query, key if needs_key else None, negatives if needs_negatives else None, scale, None, None, None


_info_nce_fwd.register_autograd(_info_nce_backward, setup_context=_info_nce_context)


@torch.library.custom_op("clipfast::nt_xent_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _nt_xent_fwd(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return several.nt_xent_forward(first, second, logit_scale, normalize, dtype)


@_nt_xent_fwd.register_fake
def _(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, col = (x.new_empty(2, 3, x.shape[0], dtype=accumulate_dtype(dtype)) for x in (first, second))
    return row.new_empty(()), row, col, row.new_empty((), dtype=torch.int8)


@torch.library.custom_op("clipfast::nt_xent_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _nt_xent_bwd(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return several.nt_xent_backward(grad_loss, first, second, logit_scale, row, col, shared, normalize, dtype)


@_nt_xent_bwd.register_fake
def _(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return first.new_empty(first.shape), second.new_empty(second.shape), row.new_empty(())


def _nt_xent_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize, ctx.dtype = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _nt_xent_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    return *torch.ops.clipfast.nt_xent_bwd(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.dtype), None, None


_nt_xent_fwd.register_autograd(_nt_xent_backward, setup_context=_nt_xent_context)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE: each query's own key against the other keys of the batch, a queue of negatives, or both.

    The defaults are the loss of van den Oord et al. 2018. With ``negatives=queue, in_batch=False`` it is MoCo's (He et
    al. 2020, algorithm 1): the positive and the queue, nothing else. With a queue and ``in_batch``, the other keys are
    negatives as well. Queries only are classified, keys are not: one direction.

    Args:
        query: features [N, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Under autocast all
            features are taken in the autocast dtype, as a matrix product would.
        key: features [N, D]; row i is the positive of query i. Same dtype and device as ``query``, as are
        negatives: features [K, D], or None. Gradients of keys and negatives are computed only if they are required.
        logit_scale: the factor on the products, one over the temperature: a one-element tensor, into which gradients
            flow, or a number.
        in_batch: whether the other keys are negatives; without, there must be ``negatives``.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over queries, a float32 scalar (float64 for float64 input); NaN without queries, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together, or no negatives at all.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "info_nce_loss"
    _check_pairs(op, "query", query, "key", key)
    if not isinstance(in_batch, bool):
        raise TypeError(f"{op}: in_batch must be a bool, got {type(in_batch).__name__}")
    scale = scale_tensor(op, logit_scale, query, like_name="query")
    if negatives is None:
        if not in_batch:
            raise ValueError(f"{op}: in_batch=False needs negatives [K, D], got None")
        return pairwise_loss(op, query, key, scale, False, normalize, 0, "default", backend)
    _check_negatives(op, negatives, query)
    operand = autocast_to(query.new_empty(0))
    if uses_reference(op, backend, query):
        return reference.info_nce_loss(query, key, scale, negatives=negatives, in_batch=in_batch, normalize=normalize)
    check_float(op, "query", operand)
    scale = scale.to(accumulate_dtype(operand.dtype))
    return _info_nce_fwd(query, key, negatives, scale, in_batch, normalize, operand.dtype)[0]


def nt_xent_loss(
    first: Tensor,
    second: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, equation 1): each view's other view against all views but itself.

    Args:
        first: features [N, D] of one view of each image, float32, float16 or bfloat16 (float64 on the CPU); any
            strides. Under autocast both are taken in the autocast dtype, as a matrix product would.
        second: features [N, D] of the other view, in the same order; same dtype and device as ``first``.
        logit_scale: the factor on the cosine similarities, one over the temperature: a one-element tensor, into which
            gradients flow, or a number.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over 2N views, a float32 scalar (float64 for float64 input); NaN without views, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "nt_xent_loss"
    _check_pairs(op, "first", first, "second", second)
    scale = scale_tensor(op, logit_scale, first, like_name="first")
    operand = autocast_to(first.new_empty(0))
    if uses_reference(op, backend, first):
        return reference.nt_xent_loss(first, second, scale, normalize=normalize)
    check_float(op, "first", operand)
    scale = scale.to(accumulate_dtype(operand.dtype))
    return _nt_xent_fwd(first, second, scale, normalize, operand.dtype)[0]


def _check_negatives(op: str, negatives: Tensor, query: Tensor) -> None:
    check_tensor(op, "negatives", negatives, 2)
    check_like(op, "negatives", negatives, "query", query)
    if negatives.shape[1] != query.shape[1]:
        raise ValueError(f"{op}: negatives must be [K, {query.shape[1]}], got {tuple(negatives.shape)}")


def _check_pairs(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    check_tensor(op, name, tensor, 2)
    check_tensor(op, other_name, other, 2)
    if tensor.shape != other.shape:
        shapes = f"{tuple(tensor.shape)} and {tuple(other.shape)}"
        raise ValueError(f"{op}: {name} and {other_name} must have the same shape, got {shapes}")
    check_like(op, other_name, other, name, tensor)
