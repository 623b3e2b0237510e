"""Patch embedding from pixels to tokens: gather, normalise, project, add class token and positions.

    token_0 = class + pos_0                  token_t = W p_k(t) + pos_k(t),   t = 1 .. T - 1, p_k the pixels of patch k

Patches are counted from 1. If all of them are embedded, k(t) = t; if some are dropped, k(t) is the t-th kept patch.

For uint8 pixels u the normalisation (u/255 - mean)/std folds into the projection. Per channel c, v = (u - 128)/128:

    W' = W 128 / (255 std_c)     b' = sum_c W (128/255 - mean_c) / std_c     token_t = W' v_k(t) + b' + pos_k(t)

v is exact in bfloat16, and the values of W' are about as large as those of W, so neither loses precision. The pixels
stay bytes on the way to the GPU and in its memory. Backward, with g = dL/dtoken, each sum also runs over the images:

    dpos_k = sum_{t: k(t) = k} g_t      dclass = dpos_0      db' = sum_{k>0} dpos_k      dW' = sum_{t>0} g_t v_k(t)^T
    dW = dW' 128 / (255 std_c) + db' (128/255 - mean_c) / std_c          dpixels = W^T g (floating images only)

An image has each patch at most once. So dpos needs one pass over g and no atomics: a first kernel finds the token of
each position in every image, and a second one sums these tokens' gradients image by image.

FLOPs: 2 B T E C P^2 forward, and as many for each of dW and dpixels. Bytes: the embedded pixels are read once, and the
tokens are written once. Where tensor descriptors bring the operands (16 bits, sm_90 and sm_100), the patches are first
laid out as a matrix, which is written and read once in each direction (``matrix.py``); elsewhere one kernel gathers,
converts and multiplies them (``launches.py``).
Method: the patch projection of Dosovitskiy et al. 2021 as an implicit or explicit GEMM; dropped patches as FLIP (Li et
al. 2023).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import planned_op, registered, uses_reference
from ..checks import check_device, check_float, check_integers, check_tensor
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from ..reference import CLIP_MEAN, CLIP_STD
from . import cpu, launches, matrix
from .fold import channel_values, factors_of, unfold_grad
from .launches import num_patches_of


def _check_indices(keep: Tensor | None, num_patches: int) -> None:
    """Refuse an index of no patch, and a patch that is kept twice; accept all indices on a GPU, since the host would
    have to wait for them.
    """
    if keep is None or keep.device.type != "cpu":
        return
    wrong = (keep < 0) | (keep >= num_patches)
    if wrong.any():
        image, place = (int(x) for x in wrong.nonzero()[0])
        raise IndexError(
            f"patch_embed: keep must hold indices of the {num_patches} patches, got {keep[image, place].item()} "
            f"at [{image}, {place}]"
        )
    in_order = keep.sort(1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]).any(1)
    if twice.any():
        raise ValueError(f"patch_embed: keep must hold each patch of an image once, got {keep[twice][0].tolist()}")


@planned_op("patch_embed_fwd")
def _patch_embed_fwd(
    images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Callable[..., Tensor]:  # fmt: skip
    """Return the function that embeds images in tensors with the memory layout of the arguments.

    It returns the tokens in ``dtype``, to which the weight is rounded once, after the normalisation was folded in.
    """
    run: Callable[..., Tensor] = cpu.forward
    if triton_runs_on(images.device):
        path = matrix if matrix.is_laid_out(images, dtype, len(weight)) else launches
        run = path.forward(images, weight, class_embedding, positional_embedding, keep, mean, std, dtype)
    num_patches = len(positional_embedding) - 1

    def compute(
        images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
        *_: Any,
    ) -> Tensor:  # fmt: skip
        """Embed images, for tensors of the planned layout."""
        _check_indices(keep, num_patches)
        return run(images, weight, class_embedding, positional_embedding, keep, mean, std, dtype)

    return compute


@_patch_embed_fwd.register_fake
def _(
    images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, keep: Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens = positional_embedding.shape[0] if keep is None else 1 + keep.shape[1]
    return weight.new_empty(images.shape[0], tokens, weight.shape[0], dtype=dtype)


@planned_op("patch_embed_bwd")
def _patch_embed_bwd(
    grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the gradients of weight and positions in the accumulation dtype, for tensors
    with the memory layout of the arguments. Operands have the dtype of ``grad``.
    """
    num_patches, is_uint8 = num_patches_of(images, weight.shape[-1]), images.dtype == torch.uint8
    on_gpu = triton_runs_on(images.device)
    is_laid_out = on_gpu and matrix.is_laid_out(images, grad.dtype, len(weight))
    of_weight: Callable[..., Tensor] = cpu.backward_weight
    if is_laid_out:
        of_weight = matrix.backward_weight(grad, images, weight, factors_of(images, mean, std), keep)
    elif on_gpu:
        of_weight = launches.backward_weight(grad, images, weight, keep)
    of_positions: Callable[..., Tensor] = functools.partial(cpu.backward_positions, num_patches=num_patches)
    if on_gpu:
        of_positions = launches.backward_positions(grad, keep, num_patches)

    def compute(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the patch embedding's parameters, for tensors of the planned layout."""
        grad_pos = of_positions(grad, keep)
        if is_laid_out:
            bias_grad = grad_pos[1:].sum(0) if is_uint8 else grad_pos[0]
            return of_weight(grad, images, weight, keep, bias_grad), grad_pos
        grad_weight = of_weight(grad, images, weight, keep)
        return unfold_grad(grad_weight, grad_pos[1:].sum(0), mean, std) if is_uint8 else grad_weight, grad_pos

    return compute


@_patch_embed_bwd.register_fake
def _(
    grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, mean: Sequence[float], std: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulate_dtype(weight.dtype)
    positions = 1 + num_patches_of(images, weight.shape[-1])
    return weight.new_empty(weight.shape, dtype=dtype), grad.new_empty(positions, grad.shape[2], dtype=dtype)


@registered("patch_embed_bwd_images")
def _patch_embed_bwd_images(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """Return the gradient of floating images in the patch embedding. This is the registered op."""
    path = launches if triton_runs_on(images.device) else cpu
    return path.backward_images(grad, images, weight.to(grad.dtype), keep)


@_patch_embed_bwd_images.register_fake
def _(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    return images.new_empty(images.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save images, weight and the indices of kept patches for the patch embedding's backward pass."""
    images, weight, class_embedding, positional_embedding, keep, ctx.mean, ctx.std, _ = inputs
    ctx.class_dtype, ctx.pos_dtype = class_embedding.dtype, positional_embedding.dtype
    ctx.save_for_backward(images, weight, keep)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the patch embedding to autograd."""
    images, weight, keep = ctx.saved_tensors
    grad_images = _patch_embed_bwd_images(grad, images, weight, keep) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:4]):
        return grad_images, None, None, None, None, None, None, None
    given, options = (grad, images, weight) if keep is None else (grad, images, weight, keep), (*ctx.mean, *ctx.std)
    bwd, args = _patch_embed_bwd, (grad, images, weight, keep, ctx.mean, ctx.std)
    grad_weight, grad_pos = (bwd.find(options, given) or bwd.learn(options, given, args))(*args)
    # This must be a copy: autograd adds to the gradients that it is given, so two of them must not share memory.
    grad_class = grad_pos[0].to(ctx.class_dtype, copy=True)
    return grad_images, grad_weight.to(weight.dtype), grad_class, grad_pos.to(ctx.pos_dtype), None, None, None, None


_patch_embed_fwd.register_autograd(_backward, setup_context=_setup_context)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    keep: Tensor | None = None,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    backend: str = "auto",
) -> Tensor:
    """Embed images as tokens of a vision transformer: the class token, then the patches, with positions added.

    Args:
        images: [B, C, H, W], uint8 as decoded (normalised here) or floating (taken as already normalised); any
            strides, so that ``hwc.permute(0, 3, 1, 2)`` needs no copy. Gradients flow into floating images.
        weight: projection [E, C, P, P] without a bias, where P divides H and W. Under autocast products are in the
            autocast dtype. The weight is rounded to it after the normalisation of bytes has been folded in, and its
            gradient is not rounded.
        class_embedding: [E].
        positional_embedding: [1 + (H / P)(W / P), E].
        keep: [B, K] int64 or int32, the patches of each image that become tokens (patch dropout: Li et al. 2023), in
            this order and each at most once. Patches are counted from 0, row by row; the class token always stays.
            Pixels and positions of the other patches are not read. The default keeps all patches. A CPU refuses an
            index of no patch and a patch that is kept twice. On a GPU the check would have to wait for the device:
            there the token of a wrong index is NaN, and of a patch that is kept twice, the gradients of its position
            and its pixels may lack one of its tokens.
        mean, std: for each channel, of pixels scaled to [0, 1]; only uint8 images use them. The default is CLIP's.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, 1 + K, E] in the dtype of ``weight`` or the autocast dtype, contiguous; without ``keep``, K is
        (H / P)(W / P).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; on a CPU, a patch that is kept twice.
        IndexError: on a CPU, an index in ``keep`` that belongs to no patch.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "patch_embed"
    tensors = images, weight, class_embedding, positional_embedding
    given = tensors if keep is None else (*tensors, keep)
    if mean.__class__ is std.__class__ is tuple:
        compute = _patch_embed_fwd.find((mean, std, backend), given)
        if compute is not None:
            return compute(*tensors, keep, list(map(float, mean)), list(map(float, std)), None)
    check_tensor(op, "images", images, 4, also=(torch.uint8,))
    check_tensor(op, "weight", weight, 4)
    check_tensor(op, "class_embedding", class_embedding, 1)
    check_tensor(op, "positional_embedding", positional_embedding, 2)
    _check_shapes(images, weight, class_embedding, positional_embedding)
    mean, std = channel_values(op, mean, std, images.shape[1])
    _check_keep(keep, images, weight.shape[-1])
    dtype = autocast_dtype(weight)
    if uses_reference(op, backend, images):
        if not torch.compiler.is_compiling():
            _check_indices(keep, len(positional_embedding) - 1)
        return reference.patch_embed(
            images, weight.to(dtype), class_embedding, positional_embedding, keep=keep, mean=mean, std=std
        )
    check_float(op, weight=weight)
    args = *tensors, keep, mean, std, dtype
    # The call is kept by numbers, since tensors that mean and std came in may change.
    return _patch_embed_fwd.learn((tuple(mean), tuple(std), backend), given, args)(*args)


def _check_shapes(images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor) -> None:
    """Refuse parameters whose shapes or devices do not fit the images."""
    channels, height, width = images.shape[1:]
    embed_dim, patch_size = weight.shape[0], weight.shape[-1]
    if weight.numel() == 0 or weight.shape[1:] != (channels, patch_size, patch_size):
        raise ValueError(
            f"patch_embed: weight must be [E, {channels}, P, P], and not empty, for images {tuple(images.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if height % patch_size or width % patch_size or height * width == 0:
        raise ValueError(
            f"patch_embed: image size {height}x{width} is not a multiple of the patch size {patch_size}: "
            "resize or pad the images"
        )
    tokens = 1 + (height // patch_size) * (width // patch_size)
    if class_embedding.shape != (embed_dim,):
        raise ValueError(f"patch_embed: class_embedding must be [{embed_dim}], got {tuple(class_embedding.shape)}")
    if positional_embedding.shape != (tokens, embed_dim):
        raise ValueError(
            f"patch_embed: positional_embedding must be [{tokens}, {embed_dim}] "
            f"for {height}x{width} images and patch size {patch_size}, got {tuple(positional_embedding.shape)}"
        )
    parameters = {"weight": weight, "class_embedding": class_embedding, "positional_embedding": positional_embedding}
    for name, tensor in parameters.items():
        check_device("patch_embed", name, tensor, "images", images)


def _check_keep(keep: Tensor | None, images: Tensor, patch_size: int) -> None:
    """Refuse patches to keep whose type, shape or device does not fit the images."""
    if keep is None:
        return
    check_integers("patch_embed", "keep", keep)
    num_patches = num_patches_of(images, patch_size)
    if keep.ndim != 2 or keep.shape[0] != images.shape[0] or keep.shape[1] > num_patches:
        raise ValueError(
            f"patch_embed: keep must be [{images.shape[0]}, K], K at most the {num_patches} patches of an image, "
            f"got {tuple(keep.shape)}"
        )
    check_device("patch_embed", "keep", keep, "images", images)
