"""Sigmoid loss of image and text features, in blocks: the M x N logits are never all in memory.

With features x [M, D], y [N, D], scale s, bias b, logits z_ij = s x_i . y_j + b and pairs (i, j = i + offset):

    L = 1/M [ sum_pairs log(1 + exp(-z_ij)) + sum_others log(1 + exp z_ij) ]
    G_ij = 1 / (1 + exp(-z_ij)), without the pairs                       g_i = 1 / (1 + exp z) of the pair of i
    dL/dx = s/M (G y - g * y)    dL/dy = s/M (G^T x - g * x)
    dL/ds = 1/M sum_i (G y - g * y)_i . x_i    dL/db = 1/M (sum_ij G_ij - sum_i g_i)

Pairs are never stored in 16 bits. Late in training the g of a pair is small, but it is the only force that holds the
pair together, so it must not be rounded.

G does not depend on a sum over logits. Therefore the forward pass computes the gradients as well, if any will be
needed: it uses each tile of logits for both the loss and G, and the backward pass only multiplies by dL.

FLOPs: 6 M N D with gradients (one product of logits, two for the features), 2 M N D without.
Memory beyond inputs and gradients: vectors of M and N, and a block of G as in ``contrastive``. If G is more than one
block, also float32 accumulators: [N, D] and a strip of [M, D]. Between the passes the gradients stay in memory.
Gradients of float16 features are kept in float32: in float16 a small one would lose its digits, since the factor of the
loss is known only in the backward pass.
Method: the loss of Zhai et al. 2023 (equation 1).
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import planned_op, registered, uses_reference
from ..checks import check_bool
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from ..replay import Pass
from . import cpu, launches
from .one_block import scaled, sigmoid_gradients
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
    scale_tensor,
)
from .small_batch import suits_whole, whole_operands, whole_sigmoid_loss
from .stats import new_accumulator, pairs_in


def _plan_forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype, with_grads: bool,
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that computes the sigmoid loss for tensors with the layout of the arguments.

    It returns the loss alone unless ``with_grads``.
    """
    how: dict[str, Any] = {"offset": offset, "normalize": normalize, "dtype": dtype}
    if with_grads and is_one_block(image, text, dtype):
        function: Any = functools.partial(sigmoid_gradients, **how, grad_dtype=_held_dtype(image))
    elif not with_grads and triton_runs_on(image.device):
        function = functools.partial(launches.sigmoid_loss, **how)
    else:
        return _loss_and_gradients_in_blocks if with_grads else _loss_on_cpu
    return features_pass(function, (image, text, None, None), dtype, normalize=normalize)


@registered("sigmoid_fwd")
def _sigmoid_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype, with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sigmoid loss, and with ``with_grads`` its gradients of images, of texts, and of bias and scale [2]."""
    args = image, text, logit_scale, logit_bias, offset, normalize, dtype, with_grads
    loss, *grads = _plan_forward(*args)(*args)
    image_grad, text_grad, number_grads = grads or _no_gradients(logit_scale)
    return loss, image_grad, text_grad, number_grads


_sigmoid_fwd.planned_by(_plan_forward)


def _loss_on_cpu(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype, with_grads: bool,
) -> tuple[Tensor]:  # fmt: skip
    """Return the sigmoid loss without gradients on a CPU."""
    x, y = (cpu.prepare(side, dtype, normalize=normalize).rows for side in (image, text))
    return (cpu.sigmoid_loss(x, y, logit_scale, logit_bias, offset),)


def _loss_and_gradients_in_blocks(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype, with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sigmoid loss and its gradients from several blocks of G, or on a CPU."""
    blocks = logit_blocks(image.device)
    x, y = prepare_both(image, text, dtype, normalize=normalize)
    one_minus_p, of_pairs = blocks.sigmoid_pairs(x.rows, y.rows, logit_scale, logit_bias, offset)
    factor = logit_scale / max(len(image), 1)
    image_grad = _held_gradient(image)
    acc_text = new_accumulator(y.rows)
    sums = [of_pairs]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the sigmoid loss's gradient of a strip of images, and keep its sums."""
        block = x.rows[strip], y.rows, logit_scale, logit_bias, offset + strip.start
        sums.append(blocks.add_sigmoid_gradients(*block, acc, acc_text, is_new_y=strip.start == 0))
        return []

    columns = many_columns(x.rows, y.rows)
    gradients_in_strips(blocks, x, y.rows, offset, one_minus_p, factor, image_grad, add, columns)
    text_grad = _held_gradient(text)  # allocated here, so that it can reuse the memory of G
    of_texts = one_minus_p
    if offset or len(image) != len(text):
        paired, partners = pairs_in(len(image), len(text), offset)
        of_texts = one_minus_p.new_zeros(len(text))
        of_texts[partners] = one_minus_p[paired]
    blocks.finish(acc_text, y, x.rows, -offset, of_texts, factor, text_grad)
    means = torch.cat(sums, 1).sum(1, dtype=torch.float64) / max(len(image), 1)
    loss, number_grads = (part.to(logit_scale.dtype, copy=True) for part in (means[0], means[1:]))
    if not len(image):
        loss.fill_(float("nan"))
    return loss, image_grad, text_grad, number_grads


def _no_gradients(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors in place of the gradients of a sigmoid loss that needs none."""
    return like.new_empty(0), like.new_empty(0), like.new_empty(0)


def _held_gradient(features: Tensor) -> Tensor:
    """Return an uninitialised gradient of the sigmoid loss, which is kept between the forward and the backward pass."""
    return new_gradient(features, _held_dtype(features))


def _held_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of the gradients that are kept between the passes."""
    return torch.float32 if features.dtype == torch.float16 else features.dtype


@_sigmoid_fwd.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype, with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss = logit_scale.new_empty(())
    if not with_grads:
        return loss, *_no_gradients(logit_scale)
    return loss, _held_gradient(image), _held_gradient(text), logit_scale.new_empty(2)


@planned_op("sigmoid_bwd")
def _sigmoid_bwd(
    grad_loss: Tensor, image_grad: Tensor, text_grad: Tensor, number_grads: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the function that multiplies the sigmoid loss's gradients by the upstream gradient, for tensors with the
    arguments' layout. It returns those of the features in ``dtype``.
    """
    if not triton_runs_on(image_grad.device):
        return _scaled_on_cpu
    replay: Any = Pass(functools.partial(scaled, dtype=dtype))
    return lambda *args: replay(*args[:4])


def _scaled_on_cpu(
    grad_loss: Tensor, image_grad: Tensor, text_grad: Tensor, number_grads: Tensor, dtype: torch.dtype
) -> Any:
    """Return the sigmoid loss's gradients multiplied by the upstream gradient, on a CPU."""
    grads = image_grad, text_grad, number_grads
    outs = tuple(torch.empty_like(grad, dtype=kind) for grad, kind in zip(grads, (dtype, dtype, None), strict=True))
    for grad, out in zip(grads, outs, strict=True):
        torch.mul(grad, grad_loss, out=out)
    return outs


@_sigmoid_bwd.register_fake
def _(
    grad_loss: Tensor, image_grad: Tensor, text_grad: Tensor, number_grads: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    of_images, of_texts = (torch.empty_like(grad, dtype=dtype) for grad in (image_grad, text_grad))
    return of_images, of_texts, torch.empty_like(number_grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradients of the sigmoid loss, which the forward pass has computed."""
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sigmoid loss to autograd."""
    if grad_loss is None:
        return (None,) * 8
    tensors = grad_loss, *ctx.saved_tensors
    of_images, of_texts, of_numbers = call_planned(_sigmoid_bwd, (ctx.dtype,), tensors, (*tensors, ctx.dtype))
    return of_images, of_texts, of_numbers[1], of_numbers[0], None, None, None, None


# The gradients of the forward pass are results too, so that autograd finds a second derivative, and refuses it.
_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context, results=lambda *_: 4)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """SigLIP's sigmoid loss of matching rows, without the M x N logits.

    Args:
        image: image features [M, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Under autocast
            both are taken in the autocast dtype, as a matrix product would.
        text: text features [N, D], same dtype and device as ``image``.
        logit_scale: the factor on the cosine similarities, already exponentiated: a one-element tensor, into which
            gradients flow, or a number (which ``torch.compile`` takes for a constant).
        logit_bias: the term that is added to every logit; a tensor or a number like ``logit_scale``.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        offset: image i and text ``i + offset`` are a pair, where both exist; others are negatives. With ``offset=N``
            there are no pairs, as is right for the texts of another process. Without it, M and N must be the same.
        backend: "auto" (Triton on GPUs, on CPUs PyTorch, blockwise for more than a million logits),
            "triton", or "torch" for the full-matrix reference.

    Returns:
        Loss summed over texts and averaged over images, a float32 scalar (float64 for float64 input); NaN without
        images, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "sigmoid_loss"
    if type(offset) is not int:
        offset = operator.index(offset)
    options = op, normalize, normalize.__class__, offset, backend, torch.is_grad_enabled()
    tensors: Any = (image, text, logit_scale, logit_bias)
    compute = _sigmoid_fwd.find(options, tensors)
    if compute is not None:
        with_grads = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        loss: Tensor = compute(*tensors, offset, normalize, autocast_dtype(image), with_grads)[0]
        return loss
    check_pairs(op, ("image", "text"), image, text, offset)
    check_bool(op, "normalize", normalize)
    scale = scale_tensor(op, logit_scale, image)
    bias = scale_tensor(op, logit_bias, image, name="logit_bias")
    if uses_reference(op, backend, image):
        return reference.sigmoid_loss(image, text, scale, bias, normalize=normalize, offset=offset)
    dtype = operand_dtype(op, "image", image)
    wide = accumulate_dtype(dtype)
    if suits_whole(image, text, dtype):
        x, y = whole_operands(image, text, normalize=normalize, dtype=dtype)
        return whole_sigmoid_loss(x, y, scale.to(wide), bias.to(wide), offset)
    inputs = image, text, scale.to(wide), bias.to(wide)
    with_grads = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    found: Tensor = call_planned(_sigmoid_fwd, options, inputs, (*inputs, offset, normalize, dtype, with_grads))[0]
    return found
