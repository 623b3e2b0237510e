"""The checks of a loss's arguments. Every error names the loss and the argument as its caller knows them."""

import torch
from torch import Tensor

from ..checks import check_device, check_float, check_like, check_tensor
from ..dtypes import FLOATS, autocast_dtype, dtype_name


def check_pairs(op: str, names: tuple[str, str], first: Tensor, second: Tensor, offset: int | None = None) -> None:
    """Refuse features that are not [M, D] and [N, D], of one dtype on one device, with M = N.

    ``names`` are what the loss ``op`` calls ``first`` and ``second``. Where it takes an ``offset``, M and N may differ
    if that is not 0.

    Raises:
        TypeError: not tensors, or dtypes that are not floating or not the same.
        ValueError: shapes or devices that do not fit together.
    """
    is_usual = isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == 2
    if is_usual and first.shape == second.shape and first.dtype == second.dtype and first.dtype in FLOATS:
        check_device(op, names[1], second, names[0], first)
        return  # All that follows is about errors.
    for name, features in zip(names, (first, second), strict=True):
        check_tensor(op, name, features, 2)
    sides = f"{names[0]} and {names[1]}"
    if not offset and first.shape != second.shape:
        hint = "" if offset is None else "; with offset=..., they may have other numbers of rows"
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"{op}: {sides} must have the same shape, got {shapes}{hint}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{op}: {sides} must have the same width, got {first.shape[1]} and {second.shape[1]}")
    check_like(op, names[1], second, names[0], first)


def scale_tensor(
    op: str, logit_scale: Tensor | float, like: Tensor, *, name: str = "logit_scale", like_name: str = "image"
) -> Tensor:
    """Return a number, or a tensor of one element, as a tensor without dimensions on the device of ``like``.

    ``name`` and ``like_name`` are what the loss ``op`` calls ``logit_scale`` and ``like``.

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
        TypeError: the kernels cannot compute in it where they would run.
    """
    dtype = autocast_dtype(features)
    check_float(op, name, features if dtype == features.dtype else features.new_empty(0, dtype=dtype))
    return dtype
