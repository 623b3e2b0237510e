"""Sigmoid loss of image and text features, blockwise: the M x N logits never exist.

With features x [M, D], y [N, D], scale s, bias b, logits z_ij = s x_i . y_j + b and pairs (i, j = i + offset):

    L = 1/M [ sum_pairs log(1 + exp(-z_ij)) + sum_others log(1 + exp z_ij) ]
    G_ij = 1 / (1 + exp(-z_ij)), without the pairs                       g_i = 1 / (1 + exp z) of the pair of i
    dL/dx = s/M (G y - g * y)    dL/dy = s/M (G^T x - g * x)
    dL/ds = 1/M sum_i (G y - g * y)_i . x_i    dL/db = 1/M (sum_ij G_ij - sum_i g_i)

A pair passes through no 16-bit tile: late in training g is small, and is the only force that holds a pair together.

FLOPs: 2 M N D forward, 6 M N D backward (one recomputed product feeds both gradients).
Memory beyond inputs and gradients: vectors of M and N, one tile of G, and float32 accumulators: [N, D] and a strip of
[M, D].
Method: the loss of Zhai et al. 2023 (equation 1).
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import outside_autocast, uses_reference
from ..checks import check_float, check_like
from ..dtypes import accumulate_dtype, autocast_to
from .blocks import blocks_on
from .loss import check_sides, check_width, scale_tensor
from .stats import pairs_in
from .symmetric import _part, scale_gradient


@torch.library.custom_op("clipfast::sigmoid_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _sigmoid_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, g [M], and the gradient of the bias."""
    blocks, sigmoid = blocks_on(image.device), blocks_on(image.device, "sigmoid_")
    x, y = (blocks.prepare(side, dtype, normalize=normalize)[0] for side in (image, text))
    loss, probability, positive = sigmoid.sums(x, y, logit_scale, logit_bias, offset)
    paired, _ = pairs_in(len(x), len(y), offset)
    nll = torch.logaddexp(-positive[paired], positive.new_zeros(()))
    miss = torch.zeros_like(positive)
    miss[paired] = (-positive[paired]).sigmoid()
    loss = (loss + nll.sum(dtype=torch.float64)) / len(x)
    bias = (probability - miss.sum(dtype=torch.float64)) / max(len(x), 1)
    return loss.to(miss.dtype), miss, bias.to(miss.dtype)


@_sigmoid_fwd.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    miss = image.new_empty(image.shape[0], dtype=accumulate_dtype(dtype))
    return miss.new_empty(()), miss, miss.new_empty(())


@torch.library.custom_op("clipfast::sigmoid_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _sigmoid_bwd(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, miss: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of images, texts and scale."""
    blocks, sigmoid = blocks_on(image.device), blocks_on(image.device, "sigmoid_")
    x, x_inv_norm = blocks.prepare(image, dtype, normalize=normalize)
    y, y_inv_norm = blocks.prepare(text, dtype, normalize=normalize)
    paired, partners = pairs_in(len(x), len(y), offset)
    coefficient = grad_loss.to(miss.dtype) / max(len(x), 1)
    factor = coefficient * logit_scale
    image_grad, text_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (image, text))
    acc_text = blocks.new_accumulator(len(y), y)
    dot = torch.empty_like(miss)
    products = []
    for strip in blocks.strips(x):
        acc = blocks.new_accumulator(strip.stop - strip.start, x)
        diagonal = offset + strip.start
        products.append(sigmoid.add_gradients(x[strip], y, logit_scale, logit_bias, diagonal, acc, acc_text))
        finish = (miss[strip], factor, _part(x_inv_norm, strip), image_grad[strip])
        dot[strip] = blocks.finish(acc, x[strip], y, diagonal, *finish)
    of_texts = miss.new_zeros(len(y))
    of_texts[partners] = miss[paired]
    blocks.finish(acc_text, y, x, -offset, of_texts, factor, y_inv_norm, text_grad)
    of_scale = scale_gradient(dot, products, miss[paired], x[paired], y[partners])
    return image_grad, text_grad, of_scale * coefficient


@_sigmoid_bwd.register_fake
def _(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, miss: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return image.new_empty(image.shape), text.new_empty(text.shape), miss.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.offset, ctx.normalize, ctx.dtype = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    *tensors, bias = ctx.saved_tensors
    gradients = torch.ops.clipfast.sigmoid_bwd(grad_loss, *tensors, ctx.offset, ctx.normalize, ctx.dtype)
    return *gradients, grad_loss * bias, None, None, None


_sigmoid_fwd.register_autograd(_backward, setup_context=_setup_context)


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
        logit_bias: what is added to every logit; like ``logit_scale``.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        offset: image i and text ``i + offset`` are a pair, where both exist; others are negatives. With ``offset=N``
            there are no pairs, as with the texts of another process. Without it, M and N must be the same.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Loss summed over texts and averaged over images, a float32 scalar (float64 for float64 input); NaN without
        images, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "sigmoid_loss"
    check_sides(op, image, text, offset)
    check_width(op, image, text)
    scale = scale_tensor(op, logit_scale, image)
    bias = scale_tensor(op, logit_bias, image, name="logit_bias")
    check_like(op, "text", text, "image", image)
    operand = autocast_to(image.new_empty(0))
    if uses_reference(op, backend, image):
        return reference.sigmoid_loss(image, text, scale, bias, normalize=normalize, offset=offset)
    check_float(op, "image", operand)
    wide = accumulate_dtype(operand.dtype)
    return _sigmoid_fwd(image, text, scale.to(wide), bias.to(wide), offset, normalize, operand.dtype)[0]
