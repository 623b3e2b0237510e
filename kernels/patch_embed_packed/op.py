"""Patch embedding of packed images: images of several heights and widths, patchified, behind one another.

A token t of an image with h x w patches is one of R prefix tokens, or the patch in row y and column x:

    token_t = prefix_r        or        token_t = W p_t + b + sum_ij a_yi a_xj P_ij

P is a table of positions [GH, GW, E], and a_yi, a_xj are the weights with which the table is resized to h x w. For an
axis on which G rows become n, they are those of a filter that is as wide as a step of the table or of the image,
whichever is larger (antialiasing):

    a_yi = f(((i + 1/2) - (y + 1/2) G/n) / max(G/n, 1)), divided by its sum over i

with f the triangle (bilinear), or Keys' cubic with a = -1/2 (bicubic). So the table enters as linearly as the pixels,
and a token is one product of a row of numbers, which no parameter changes, and of all the parameters:

    token_t = [W' | P | b' | prefix] [v_t ; a_y x a_x ; 1 ; 0]      or      [W' | P | b' | prefix] [0 ; 0 ; 0 ; e_r]

One kernel lays out these rows as a matrix [T, K + GH GW + 1 + R], and PyTorch multiplies. The normalisation of bytes is
folded into W' and b' as ``patch_embed`` does it. Backward needs one product: the gradients of all parameters are
columns of g^T [the matrix], summed over tokens in a fixed order, without atomics.

The table adds GH GW columns (256) to the K of the pixels (768). An addition of resized positions would read and write
all tokens once more, which takes longer than this part of the product, and its gradient would need a sum by rows.

FLOPs: 2 T (K + GH GW) E in each direction. Bytes: the pixels are read once, the matrix is written once and read in
both directions, and the tokens are written once.
Method: Beyer et al. 2023 (resized positions), Dehghani et al. 2023 (packed images), Tschannen et al. 2025 (NaFlex).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_bool, check_device, check_float, check_integers, check_parameter, check_tensor
from ..common import cdiv
from ..dtypes import accumulate_dtype, autocast_dtype
from ..grids import places_of
from ..launch import triton_runs_on
from ..packing import Packing, packing_for
from ..patch_embed.fold import channel_values, fold, unfold_grad
from ..reference import CLIP_MEAN, CLIP_STD
from . import cpu, launches

INTERPOLATIONS = ("bilinear", "bicubic")


def num_columns(weight: Tensor, table: Tensor, prefix: Tensor) -> int:
    """Return the number of columns of the matrix of packed patches; products are fastest if it is a multiple of 8."""
    return cdiv(weight.shape[1] + table.shape[0] * table.shape[1] + 1 + len(prefix), 8) * 8


@registered("patch_embed_packed_fwd")
def _patch_embed_packed_fwd(
    patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, weight: Tensor, bias: Tensor | None,
    table: Tensor, prefix: Tensor, mean: Sequence[float], std: Sequence[float], interpolation: str, keep_aspect: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the tokens in ``dtype``, and the matrix of packed patches for the backward pass."""
    on_triton = triton_runs_on(patches.device)
    product_dtype = dtype if on_triton else accumulate_dtype(dtype)
    columns = num_columns(weight, table, prefix)
    matrix = (launches if on_triton else cpu).lay_out(
        patches, grids, bounds, sequence, table.shape[:2], len(prefix), columns, interpolation, keep_aspect,
        product_dtype,
    )  # fmt: skip
    if patches.dtype == torch.uint8:
        folded, shift = fold(_by_channel(weight, len(mean)), mean, std)
        bias = shift if bias is None else shift + bias
        weight = folded.transpose(1, 2).reshape(weight.shape)
    elif bias is None:
        bias = weight.new_zeros(len(weight))
    of_table = table.flatten(0, 1).T
    parameters = torch.cat([x.to(dtype) for x in (weight, of_table, bias[:, None], prefix.T)], 1)
    parameters = F.pad(parameters, (0, columns - parameters.shape[1]))
    return F.linear(matrix, parameters.to(product_dtype)).to(dtype), matrix


@_patch_embed_packed_fwd.register_fake
def _(
    patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, weight: Tensor, bias: Tensor | None,
    table: Tensor, prefix: Tensor, mean: Sequence[float], std: Sequence[float], interpolation: str, keep_aspect: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    product_dtype = dtype if triton_runs_on(patches.device) else accumulate_dtype(dtype)
    total = sequence.shape[0]  # len() would make it a constant of compiled code
    matrix = patches.new_empty(total, num_columns(weight, table, prefix), dtype=product_dtype)
    return weight.new_empty(total, weight.shape[0], dtype=dtype), matrix


@registered("patch_embed_packed_bwd")
def _patch_embed_packed_bwd(
    grad: Tensor, matrix: Tensor, weight: Tensor, is_uint8: bool, table_size: Sequence[int], num_prefix: int,
    mean: Sequence[float], std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of weight, bias, positions and prefix tokens in the accumulation dtype."""
    sizes = weight.shape[1], table_size[0] * table_size[1], 1, num_prefix
    gradients = (grad.to(matrix.dtype).T @ matrix).to(accumulate_dtype(grad.dtype))
    of_weight, of_table, _, of_prefix = gradients[:, : sum(sizes)].split(sizes, 1)
    # PyTorch's sum is more accurate than a product with ones in float32.
    is_patch = matrix[:, sum(sizes[:2]), None].to(grad.dtype)
    of_bias = (grad * is_patch).sum(0, dtype=gradients.dtype)
    if is_uint8:
        unfolded = unfold_grad(_by_channel(of_weight, len(mean)), of_bias, mean, std)
        of_weight = unfolded.transpose(1, 2).flatten(1)
    of_table = of_table.T.unflatten(0, (table_size[0], table_size[1]))
    # These must be copies: autograd adds to the gradients that it is given, so two of them must not share memory.
    of_weight, of_table, of_prefix = (
        x.clone(memory_format=torch.contiguous_format) for x in (of_weight, of_table, of_prefix.T)
    )
    return of_weight, of_bias, of_table, of_prefix


@_patch_embed_packed_bwd.register_fake
def _(
    grad: Tensor, matrix: Tensor, weight: Tensor, is_uint8: bool, table_size: Sequence[int], num_prefix: int,
    mean: Sequence[float], std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    embed_dim, dtype = grad.shape[1], accumulate_dtype(grad.dtype)
    sizes = weight.shape, (embed_dim,), (*table_size, embed_dim), (num_prefix, embed_dim)
    of_weight, of_bias, of_table, of_prefix = (grad.new_empty(size, dtype=dtype) for size in sizes)
    return of_weight, of_bias, of_table, of_prefix


@registered("patch_embed_packed_bwd_patches")
def _patch_embed_packed_bwd_patches(
    grad: Tensor, weight: Tensor, patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, num_prefix: int
) -> Tensor:
    """Return the gradient of floating patches, zero for patches that belong to no image."""
    places = places_of(bounds, sequence, grids, len(patches), num_prefix)
    out = patches.new_zeros(len(patches) + 1, patches.shape[1])
    out[places.row] = (grad @ weight.to(grad.dtype)).to(out.dtype)  # tokens without a patch write to an extra last row
    return out[:-1].clone()


@_patch_embed_packed_bwd_patches.register_fake
def _(
    grad: Tensor, weight: Tensor, patches: Tensor, grids: Tensor, bounds: Tensor, sequence: Tensor, num_prefix: int
) -> Tensor:
    return patches.new_empty(patches.shape)


def _by_channel(weight: Tensor, channels: int) -> Tensor:
    """View a projection [E, P P C], in which the channels of a pixel lie together, as [E, C, P P, 1]."""
    return weight.unflatten(1, (-1, channels)).transpose(1, 2)[..., None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the matrix of packed patches for the backward pass."""
    patches, grids, bounds, sequence, weight, bias, table, prefix, *ctx.options = inputs
    ctx.dtypes = [weight.dtype, None if bias is None else bias.dtype, table.dtype, prefix.dtype]
    ctx.table_size, ctx.num_prefix = list(table.shape[:2]), len(prefix)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(patches, grids, bounds, sequence, weight, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the patch embedding of packed images to autograd."""
    if grad is None:
        return (None,) * 13
    *places, weight, matrix = ctx.saved_tensors
    patches, (mean, std) = places[0], ctx.options[:2]
    of_patches: Tensor | None = None
    if ctx.needs_input_grad[0]:
        of_patches = _patch_embed_packed_bwd_patches(grad, weight, *places, ctx.num_prefix)
    if not any(ctx.needs_input_grad[4:8]):
        return of_patches, *(None,) * 12
    found = _patch_embed_packed_bwd(
        grad, matrix, weight, patches.dtype == torch.uint8, ctx.table_size, ctx.num_prefix, mean, std
    )
    gradients = [
        x.to(dtype) if needed else None
        for x, dtype, needed in zip(found, ctx.dtypes, ctx.needs_input_grad[4:8], strict=True)
    ]
    return of_patches, None, None, None, *gradients, None, None, None, None, None


# The matrix is a result too, so that autograd finds a second derivative with respect to patches, and refuses it.
_patch_embed_packed_fwd.register_autograd(_backward, setup_context=_setup_context, results=lambda *_: 2)


def patch_embed_packed(
    patches: Tensor,
    grids: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    *,
    cu_seqlens: Tensor | Packing,
    bias: Tensor | None = None,
    prefix: Tensor | None = None,
    interpolation: str = "bilinear",
    keep_aspect: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    backend: str = "auto",
) -> Tensor:
    """Embed the patches of images of several sizes as tokens of a vision transformer, with positions added.

    Args:
        patches: [N, P P C], the patches of each image row by row, image behind image; the pixels of a patch row by row,
            their channels together, as timm's and transformers' NaFlex have them. uint8 as decoded (normalised here) or
            floating (taken as already normalised); any strides. Gradients flow into floating patches. Patches after
            those of the last image belong to no image, and are not read.
        grids: int32 [B, 2], the rows and columns of patches of each image.
        weight: projection [E, P P C]. Under autocast the product is in the autocast dtype.
        positional_embedding: [GH, GW, E], the positions of a grid; they are resized to the grid of each image.
        cu_seqlens: int32 [B + 1], the cumulative numbers of tokens of the images, prefix tokens included; or a
            :class:`Packing` of N + B R tokens.
        bias: [E], added to the tokens of patches.
        prefix: [R, E], tokens that stand before those of every image, such as a class token or registers.
        interpolation: "bilinear" or "bicubic", both antialiased, as ``F.interpolate(antialias=True)`` resizes.
        keep_aspect: resize the positions to a square with the longer side of an image, and cut the square to the image.
        mean, std: for each channel, of pixels scaled to [0, 1]; only uint8 patches use them. The default is CLIP's.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [N + B R, E] in the dtype of ``weight`` or the autocast dtype, contiguous. Tokens that belong to no image are
        zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit together. On a GPU, ``grids`` and
            ``cu_seqlens`` that do not fit are not found, since the host would have to wait for them; tokens are wrong
            then, but nothing outside of tensors is read or written.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "patch_embed_packed"
    check_tensor(op, "patches", patches, 2, also=(torch.uint8,))
    check_tensor(op, "weight", weight, 2)
    prefix = weight.new_empty(0, len(weight)) if prefix is None else prefix
    _check_parameters(op, patches, weight, positional_embedding, bias, prefix)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"{op}: interpolation must be {' or '.join(INTERPOLATIONS)}, got {interpolation!r}")
    check_bool(op, "keep_aspect", keep_aspect)
    if not isinstance(mean, Sequence) or not mean:
        raise TypeError(f"{op}: mean must have a number for each channel, got {mean!r}")
    mean, std = channel_values(op, mean, std, len(mean))
    if weight.shape[1] % len(mean):
        raise ValueError(f"{op}: a patch of {weight.shape[1]} numbers has not {len(mean)} channels, as mean has")
    packing = _packing_of(op, patches, grids, cu_seqlens, len(prefix))
    dtype = autocast_dtype(weight)
    if uses_reference(op, backend, patches):
        return reference.patch_embed_packed(
            patches, grids, weight.to(dtype), positional_embedding, cu_seqlens=packing, bias=bias, prefix=prefix,
            interpolation=interpolation, keep_aspect=keep_aspect, mean=mean, std=std,
        )  # fmt: skip
    check_float(op, weight=weight)
    tokens: Tensor = _patch_embed_packed_fwd(
        patches, grids, packing.bounds, packing.sequence, weight, bias, positional_embedding, prefix, mean, std,
        interpolation, keep_aspect, dtype,
    )[0]  # fmt: skip
    return tokens


def _check_parameters(
    op: str, patches: Tensor, weight: Tensor, table: Tensor, bias: Tensor | None, prefix: Tensor
) -> None:
    """Refuse parameters whose shapes or devices do not fit the patches."""
    check_tensor(op, "positional_embedding", table, 3)
    check_tensor(op, "prefix", prefix, 2)
    embed_dim = len(weight)
    if weight.numel() == 0 or weight.shape[1] != patches.shape[1]:
        raise ValueError(
            f"{op}: weight must be [E, {patches.shape[1]}], and not empty, for patches {tuple(patches.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    for name, tensor in (("positional_embedding", table), ("prefix", prefix)):
        if tensor.shape[-1] != embed_dim or (tensor is table and table.numel() == 0):
            sizes = "GH, GW" if tensor is table else "R"
            raise ValueError(
                f"{op}: {name} must be [{sizes}, {embed_dim}] for weight {tuple(weight.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if bias is not None:
        check_parameter(op, "bias", bias, weight.T)
    for name, tensor in (("weight", weight), ("positional_embedding", table), ("prefix", prefix)):
        check_device(op, name, tensor, "patches", patches)


def _packing_of(op: str, patches: Tensor, grids: Tensor, cu_seqlens: Tensor | Packing, num_prefix: int) -> Packing:
    """Return the packing of the tokens of images; refuse ``grids`` that do not fit it."""
    check_integers(op, "grids", grids, (torch.int32,))
    if grids.ndim != 2 or grids.shape[1] != 2:
        raise ValueError(f"{op}: grids must be [B, 2], got shape {tuple(grids.shape)}")
    check_device(op, "grids", grids, "patches", patches)
    packing = packing_for(op, cu_seqlens, patches.new_empty(len(patches) + num_prefix * len(grids), 0))
    if len(packing.cu_seqlens) != len(grids) + 1:
        raise ValueError(f"{op}: cu_seqlens are of {len(packing.cu_seqlens) - 1} images, but grids of {len(grids)}")
    if not triton_runs_on(grids.device) and not grids.is_meta and not torch.compiler.is_compiling():
        lengths, (heights, widths) = packing.cu_seqlens.diff(), grids.long().unbind(1)
        wrong = (grids < 1).any(1) | (lengths != heights * widths + num_prefix)
        if wrong.any():
            image = int(wrong.nonzero()[0])
            raise ValueError(
                f"{op}: image {image} has {lengths[image]} tokens by cu_seqlens, but grids say "
                f"{heights[image]} x {widths[image]} patches, and there are {num_prefix} prefix tokens"
            )
    return packing
