"""The GPUs that have numbers of 8 bits, and the check of an op for them."""

import torch
from torch import Tensor

from ..hardware import AMD, LEAST_FP8, has_fp8
from ..launch import arch_of, triton_runs_on
from .launches import MAX_WIDTH


def check_fp8(op: str, x: Tensor, width: int = 1) -> None:
    """Refuse a GPU that has no e4m3, and rows that are wider than a kernel's tile.

    Raises:
        RuntimeError: another GPU; the message names its compute capability.
        ValueError: rows of width 0, or too wide ones.
    """
    if not triton_runs_on(x.device):
        return
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{op}: rows must be 1 to {MAX_WIDTH} wide, got {width}: use backend='torch'")
    arch = arch_of(x.device)
    if has_fp8(arch) or x.device.type == "cpu":
        return
    has = f"{torch.cuda.get_device_name(x.device)} " + ("is a GPU of AMD" if arch in AMD else f"has {arch / 10}")
    raise RuntimeError(
        f"{op}: numbers of 8 bits (e4m3) need compute capability {LEAST_FP8 / 10} or newer, "
        f"{has}: compute in 16 bits, or use backend='torch', which emulates 8 bits"
    )
