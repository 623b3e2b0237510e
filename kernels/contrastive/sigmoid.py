"""Sigmoid loss of image and text features, blockwise: the M x N logits never exist.

With features x [M, D], y [N, D], scale s, bias b, logits z_ij = s x_i . y_j + b and pairs (i, j = i + offset):

    L = 1/M [ sum_pairs log(1 + exp(-z_ij)) + sum_others log(1 + exp z_ij) ]
    G_ij = 1 / (1 + exp(-z_ij)), without the pairs                       g_i = 1 / (1 + exp z) of the pair of i
    dL/dx = s/M (G y - g * y)    dL/dy = s/M (G^T x - g * x)
    dL/ds = 1/M sum_i (G y - g * y)_i . x_i    dL/db = 1/M (sum_ij G_ij - sum_i g_i)

A pair passes through no 16-bit tile. Late in training its g is small, and nothing else holds the pair together, so g
must not be rounded.

FLOPs: 2 M N D forward, 6 M N D backward (one recomputed product feeds both gradients).
Memory beyond inputs and gradients: vectors of M and N, one tile of G, and float32 accumulators: [N, D] and a strip of
[M, D].
Method: the loss of Zhai et al. 2023 (equation 1).
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..dtypes import accumulate_dtype
from .features import pairs_in
from .gradients import gradients_in_strips, new_gradient, scale_gradient
from .logit_blocks import logit_blocks
from .loss_arguments import check_pairs, operand_dtype, scale_tensor
from .registration import register_gradients


@registered("sigmoid_fwd")
def _sigmoid_fwd(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, g [M] (one_minus_p of the pairs, 0 without a pair), and the gradient of the bias."""
    blocks = logit_blocks(image.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize).rows for side in (image, text))
    loss, probability, positive = blocks.sigmoid_sums(x, y, logit_scale, logit_bias, offset)
    paired, _ = pairs_in(len(x), len(y), offset)
    nll = torch.logaddexp(-positive[paired], positive.new_zeros(()))
    one_minus_p = torch.zeros_like(positive)
    one_minus_p[paired] = (-positive[paired]).sigmoid()
    loss = (loss + nll.sum(dtype=torch.float64)) / len(x)
    bias_grad = (probability - one_minus_p.sum(dtype=torch.float64)) / max(len(x), 1)
    return loss.to(one_minus_p.dtype), one_minus_p, bias_grad.to(one_minus_p.dtype)


@_sigmoid_fwd.register_fake
def _(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    return logit_scale.new_empty(()), logit_scale.new_empty(image.shape[0]), logit_scale.new_empty(())


@registered("sigmoid_bwd")
def _sigmoid_bwd(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    one_minus_p: Tensor, bias_grad: Tensor, offset: int, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of images, texts, scale and bias."""
    blocks = logit_blocks(image.device)
    x, y = (blocks.prepare(side, dtype, normalize=normalize) for side in (image, text))
    paired, partners = pairs_in(len(image), len(text), offset)
    coefficient = grad_loss.to(one_minus_p.dtype) / max(len(image), 1)
    factor = coefficient * logit_scale
    image_grad = new_gradient(image)
    acc_text = blocks.new_accumulator(len(text), y.rows)

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        own, start = x.rows[strip], offset + strip.start
        return [blocks.add_sigmoid_gradients(own, y.rows, logit_scale, logit_bias, start, acc, acc_text)]

    parts = gradients_in_strips(blocks, x, y.rows, offset, one_minus_p, factor, image_grad, add)
    text_grad = new_gradient(text)  # in the memory that G had
    of_texts = one_minus_p
    if offset or len(image) != len(text):
        of_texts = one_minus_p.new_zeros(len(text))
        of_texts[partners] = one_minus_p[paired]
    blocks.finish(acc_text, y, x.rows, -offset, of_texts, factor, text_grad)
    return image_grad, text_grad, scale_gradient(parts, coefficient), grad_loss * bias_grad


register_gradients(_sigmoid_fwd, _sigmoid_bwd)


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
            there are no pairs, as is right for the texts of another process. Without it, M and N must be the same.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Loss summed over texts and averaged over images, a float32 scalar (float64 for float64 input); NaN without
        images, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "sigmoid_loss"
    check_pairs(op, ("image", "text"), image, text, offset)
    scale = scale_tensor(op, logit_scale, image)
    bias = scale_tensor(op, logit_bias, image, name="logit_bias")
    if uses_reference(op, backend, image):
        return reference.sigmoid_loss(image, text, scale, bias, normalize=normalize, offset=offset)
    dtype = operand_dtype(op, "image", image)
    wide = accumulate_dtype(dtype)
    return _sigmoid_fwd(image, text, scale.to(wide), bias.to(wide), offset, normalize, dtype)[0]
