"""Functions that all contrastive losses share: checks of arguments, choice of the implementation, and gradients.

A block is the logits of features x [M, D] against features y [N, D]; a pair is (i, i + offset), where both exist.
:mod:`.launches` computes blocks by Triton kernels and describes its functions; :mod:`.cpu` has the same functions in
PyTorch.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import Op
from ..checks import check_device, check_float, check_like, check_tensor
from ..dtypes import FLOATS, autocast_dtype, dtype_name
from ..launch import triton_runs_on
from ..replay import Pass
from . import cpu, launches, operands
from .small_batch import MOST_LOGITS
from .stats import Features, new_accumulator


def call_planned(op: Op, options: tuple[Any, ...], tensors: tuple[Tensor, ...], args: tuple[Any, ...]) -> Any:
    """Return the results of an op of a loss for checked arguments, by a kept plan where kernels compute it.

    ``options`` and ``tensors`` are as :meth:`.backends.Op.learn` gets them.
    """
    if not triton_runs_on(tensors[0].device):
        return op(*args)
    return (op.find(options, tensors) or op.learn(options, tensors, args))(*args)


def features_pass(
    function: Callable[..., tuple[Tensor, ...]], like: Sequence[Tensor | None], dtype: torch.dtype, *, normalize: bool
) -> Callable[..., Any]:
    """Return a :class:`.replay.Pass` of ``function`` as a planner of a loss returns it.

    Args:
        function: gets the tensors of the loss's op, with features as kernels take them.
        like: for each tensor among the arguments of the op, which come first: features of its layout, or None for a
            tensor that is no features. The pass ignores the other arguments.
        dtype, normalize: see :func:`.operands.prepare_both`.
    """
    count, replay = len(like), Pass(function)
    copies = [None if x is None else operands.copy_of(x, dtype, normalize=normalize) for x in like]
    if not any(copies):
        return lambda *args: replay(*args[:count])
    return lambda *args: replay(*[copy(x) if copy else x for x, copy in zip(args[:count], copies, strict=True)])


def logit_blocks(device: torch.device) -> ModuleType:
    """Return the module that computes blocks of logits on ``device``: the Triton launches, or the CPU path."""
    return launches if triton_runs_on(device) else cpu


def prepare_both(x: Tensor, y: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Features, Features]:
    """Return both features, x and y, in the form that the products of the contrastive losses take."""
    if triton_runs_on(x.device):
        return operands.prepare_both(x, y, dtype, normalize=normalize)
    return cpu.prepare(x, dtype, normalize=normalize), cpu.prepare(y, dtype, normalize=normalize)


def is_one_block(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Return whether kernels compute the gradients from one block of G, without accumulators."""
    return triton_runs_on(x.device) and launches.is_one_block(x.device, dtype, *x.shape[:1], *y.shape)


def is_small_block(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Return whether kernels compute one block of G, which is so small that memory need not be reused after it."""
    return is_one_block(x, y, dtype) and x.shape[0] * y.shape[0] <= MOST_LOGITS


def check_pairs(op: str, names: tuple[str, str], first: Tensor, second: Tensor, offset: int = 0) -> None:
    """Refuse features that are not [M, D] and [N, D], of one dtype on one device, with M = N.

    ``names`` are the names that the loss ``op`` gives to ``first`` and ``second``. M and N may differ if the loss has
    an ``offset`` that is not 0.

    Raises:
        TypeError: not tensors, or dtypes that are not floating or not the same.
        ValueError: shapes or devices that do not fit together.
    """
    is_usual = isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == 2
    if is_usual and first.shape == second.shape and first.dtype == second.dtype and first.dtype in FLOATS:
        check_device(op, names[1], second, names[0], first)
        return  # The rest of the function only finds out which error to raise.
    for name, features in zip(names, (first, second), strict=True):
        check_tensor(op, name, features, 2)
    sides = f"{names[0]} and {names[1]}"
    if not offset and first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"{op}: {sides} must have the same shape, got {shapes}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{op}: {sides} must have the same width, got {first.shape[1]} and {second.shape[1]}")
    check_like(op, names[1], second, names[0], first)


def scale_tensor(
    op: str, logit_scale: Tensor | float, like: Tensor, *, name: str = "logit_scale", like_name: str = "image"
) -> Tensor:
    """Return the scale of the logits, a number or a tensor of one element, as a 0-dim tensor on the device of ``like``.

    ``name`` and ``like_name`` are the names that the loss ``op`` gives to ``logit_scale`` and ``like``.

    Raises:
        TypeError: neither a number nor a floating tensor.
        ValueError: several elements, or another device.
    """
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
    return logit_scale.reshape(()) if logit_scale.ndim else logit_scale


def operand_dtype(op: str, name: str, features: Tensor) -> torch.dtype:
    """Return the dtype that ``features`` are multiplied in: their own, or under autocast the autocast dtype.

    Raises:
        TypeError: the kernels cannot compute in this dtype on the features' device.
    """
    dtype = autocast_dtype(features)
    check_float(op, **{name: features if dtype == features.dtype else features.new_empty(0, dtype=dtype)})
    return dtype


def new_gradient(features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised gradient, contiguous, with the shape of the features, in their dtype or in ``dtype``.

    A gradient that is written after the last block of G should be allocated after it: it can then reuse G's memory.
    """
    return torch.empty_like(features, dtype=dtype, memory_format=torch.contiguous_format)


def gradients_in_strips(
    blocks: ModuleType, own: Features, other: Tensor, offset: int, one_minus_p: Tensor, factor: Tensor, out: Tensor,
    add: Callable[[slice, Tensor], list[Tensor | None]], columns: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Compute the gradient of features in strips of rows, so that only a strip at a time is held in float32.

    ``add(strip, acc)`` writes G times features to the new accumulator ``acc`` of the rows ``strip``, and returns the
    results of its calls of :func:`.launches.add_gradients`. ``columns`` are those of the logits, if they may be so many
    beside the rows that an accumulator has parts for them. The other arguments are those of :func:`.launches.finish`.

    Returns:
        The terms of the gradient of the scale, for :func:`scale_gradient`: the results of ``finish`` and ``add``.
    """
    parts = []
    for strip in blocks.strips(own.rows, other):
        rows = own.rows[strip]
        acc = new_accumulator(rows) if columns is None else blocks.strip_accumulator(rows, columns)
        parts += add(strip, acc)
        parts.append(
            blocks.finish(acc, own.part(strip), other, offset + strip.start, one_minus_p[strip], factor, out[strip])
        )
    return parts


def many_columns(x: Tensor, y: Tensor) -> Tensor | None:
    """Return y, the columns of logits, if they are so many beside the rows x that their product with G needs parts.

    Otherwise G y and G^T x together have enough tiles, and parts would only have to be added up.
    """
    return y if len(y) >= max(launches.LONGEST_LOOP, 8 * len(x)) else None


def scale_gradient(parts: Sequence[Tensor | None], coefficient: Tensor) -> Tensor:
    """Return the gradient of the scale: ``coefficient`` times the sum of all numbers in ``parts``, added in float64.

    Args:
        parts: the results of :func:`.launches.finish` for the rows, and of :func:`.launches.add_gradients` for each
            block.
        coefficient: [], the gradient of the loss divided by the number of terms in its mean.
    """
    numbers = [part for part in parts if part is not None]
    if not numbers:
        return torch.zeros_like(coefficient)
    total = torch.cat(numbers).sum(dtype=torch.float64)
    return torch.mul(total, coefficient, out=torch.empty_like(coefficient))


def register_gradients(forward: Op, backward: Op, *, optional: Sequence[int] = ()) -> None:
    """Register ``backward`` as the gradient of the loss ``forward``, with a fake that returns the right shapes.

    Args:
        forward: an op ``(*tensors, *options) -> (loss, *saved)``.
        backward: an op ``(grad_loss, *tensors, *saved, *options, *required) -> gradients``, one for each of
            ``tensors``, contiguous and of the same shape.
        optional: the positions of tensors whose gradient costs work that is left out if nobody requires it.
            ``required`` has a bool for each of them; where it is False, ``backward`` returns a tensor without rows.
    """
    tensor_count = sum(isinstance(argument.type, torch.TensorType) for argument in forward.schema.arguments)

    @backward.register_fake
    def _(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        required = dict(zip(optional, arguments[len(arguments) - len(optional) :], strict=True))
        return tuple(
            x.new_empty(x.shape if required.get(position, True) else (0, *x.shape[1:]))
            for position, x in enumerate(arguments[:tensor_count])
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the tensors and options that the backward pass of a contrastive loss needs."""
        ctx.options = inputs[tensor_count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensor_count], *output[1:])

    def gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of a contrastive loss to autograd, None for those that are not required."""
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        required = [ctx.needs_input_grad[position] for position in optional]
        tensors, options = (grad_loss, *ctx.saved_tensors), (*ctx.options, *required)
        found = [*call_planned(backward, options, tensors, (*tensors, *options))]
        for position, is_required in zip(optional, required, strict=True):
            if not is_required:
                found[position] = None
        return *found, *(None,) * len(ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
