"""The check that a GPU can multiply numbers of 8 bits, for ops and for models."""

import torch

from ..hardware import AMD, LEAST_FP8, has_fp8
from ..launch import arch_of, triton_runs_on
from .launches import MAX_WIDTH


def check_fp8(what: str, device: torch.device, width: int = 1) -> None:
    """Refuse a GPU that cannot multiply e4m3 for an op or an option ``what``, and rows wider than a kernel's tile.

    Raises:
        ValueError: the GPU is not one of NVIDIA's with compute capability 8.9 or higher, or it is one with 8.9 under
            PyTorch 2.11, whose products of rows in 8 bits may hang there; or rows of width 0, or too wide ones.
    """
    if not triton_runs_on(device):
        return
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{what}: rows must be 1 to {MAX_WIDTH} wide, got {width}: use backend='torch'")
    if device.type == "cpu":
        return
    arch, name = arch_of(device), torch.cuda.get_device_name(device)
    instead = "compute in 16 bits, or by backend='torch', which emulates 8 bits"
    if not has_fp8(arch):
        has = "is one of AMD" if arch in AMD else f"has {arch / 10}"
        raise ValueError(
            f"{what}: numbers of 8 bits (e4m3) need a GPU of NVIDIA with compute capability {LEAST_FP8 / 10} or newer, "
            f"as RTX 40, L40S and H100 are, and {name} {has}: {instead}"
        )
    # PyTorch 2.12 does not hang here. Neither do its nightly builds, which call themselves 2.12.0.dev or 2.12.0a0.
    if arch == LEAST_FP8 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        raise ValueError(
            f"{what}: products in 8 bits on a {name} need PyTorch 2.12 or newer: {torch.__version__} starts them "
            f"outside the current CUDA stream, and may hang (pytorch/pytorch#177651): {instead}"
        )
