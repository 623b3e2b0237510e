"""Checks of an op's input. Each error names the op, the argument, the expected value and the value that was given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .dtypes import FLOATS, dtype_name

INTEGERS = (torch.int32, torch.int64)
# Triton's interpreter does not support bfloat16, and only the CPU path supports float64.
NOT_EVERYWHERE = (torch.bfloat16, torch.float64)


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Refuse a tensor whose floating dtype the op's kernels do not support on its device.

    Args:
        op: the name of the op.
        **tensors: its arguments by their names; None for one that is not given.

    Raises:
        TypeError: bfloat16 under Triton's interpreter, or float64 anywhere but on the CPU path.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype not in NOT_EVERYWHERE:
            continue
        if launch.INTERPRET and tensor.dtype == torch.bfloat16:
            raise TypeError(
                f"{op}: {name} is bfloat16, which Triton's interpreter multiplies as raw bits: use float32 or float16"
            )
        if tensor.dtype == torch.float64 and (tensor.device.type not in ("cpu", "meta") or launch.executes_on_cpu()):
            raise TypeError(f"{op}: {name} is float64, which only the CPU path and backend='torch' compute in")


def check_tensor(op: str, name: str, tensor: Tensor, ndim: int | None, *, also: tuple[torch.dtype, ...] = ()) -> None:
    """Refuse anything but a tensor with ``ndim`` dimensions (None: one or more) whose dtype is floating or in ``also``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions.
    """
    if isinstance(tensor, Tensor) and (tensor.dtype in FLOATS or tensor.dtype in also):
        if tensor.ndim == ndim or (ndim is None and tensor.ndim > 0):
            return
        expected = "one dimension or more" if ndim is None else f"{ndim} dimensions"
        raise ValueError(f"{op}: {name} must have {expected}, got shape {tuple(tensor.shape)}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    allowed = ", ".join(map(dtype_name, (*FLOATS, *also)))
    raise TypeError(f"{op}: {name} must be one of {allowed}, got {dtype_name(tensor.dtype)}")


def check_bool(op: str, name: str, value: bool) -> None:
    """Refuse anything but a bool, with a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_integers(op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = INTEGERS) -> None:
    """Refuse anything but a tensor of integers, with a TypeError."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = dtype_name(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be an {' or '.join(map(dtype_name, dtypes))} tensor, got {got}")


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device than that of ``other``, with a ValueError."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but {other_name} is on {other.device}")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor whose device or dtype differs from that of ``other``.

    Raises:
        ValueError: another device.
        TypeError: another dtype.
    """
    check_device(op, name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} is {dtype_name(tensor.dtype)}, but {other_name} is {dtype_name(other.dtype)}")


def check_parameter(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse anything but a floating vector with one value for each element of the last dimension of ``x``.

    Raises:
        TypeError: not a tensor, or not floating.
        ValueError: another size or another device.
    """
    is_float = isinstance(tensor, Tensor) and tensor.dtype in FLOATS
    if is_float and tensor.shape == x.shape[-1:] and tensor.device == x.device:
        return  # The rest of the function only finds out which error to raise.
    check_tensor(op, name, tensor, 1)
    raise ValueError(
        f"{op}: {name} must be [{x.shape[-1]}] on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
    )


def check_seqlens(op: str, seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    """Return an op's lengths, one for each sequence of ``like`` [B, ...], as contiguous int32 in which no length is
    negative; None stays None.

    Raises:
        TypeError: ``seqlens`` is no tensor of integers.
        ValueError: its shape is not [B], or it is on another device.
    """
    if seqlens is None:
        return None
    check_integers(op, "seqlens", seqlens)
    if seqlens.shape != like.shape[:1] or seqlens.device != like.device:
        raise ValueError(
            f"{op}: seqlens must be [{like.shape[0]}] on {like.device}, got {tuple(seqlens.shape)} on {seqlens.device}"
        )
    return seqlens.clamp(0, 2**31 - 1).to(torch.int32).contiguous()
