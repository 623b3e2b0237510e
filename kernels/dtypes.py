"""The dtypes that the ops take, their names, and the dtype that an op computes in."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The dtypes that kernels compute in, by the names that command lines and reports use.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its prefix: ``torch.float32`` becomes ``float32``."""
    return str(dtype).removeprefix("torch.")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float64 for float64 operands, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that autocast would convert ``tensor`` to; without autocast, its own dtype."""
    device_type = tensor.device.type
    if device_type not in ("cuda", "cpu") or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def autocast_to(tensor: Tensor) -> Tensor:
    """Convert ``tensor`` to the autocast dtype where autocast is on; otherwise return it unchanged."""
    return tensor.to(autocast_dtype(tensor))
