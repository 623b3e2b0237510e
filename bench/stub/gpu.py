"""Environment variables with which a process uses the stub as its GPU, under a CUDA build of PyTorch.

PyTorch's allocator, streams, events, graphs and device guards are then the real ones, and so is all code that measures
with them. No kernel runs, not even PyTorch's own, and the memory of the GPU always reads as zero. So results agree with
each other, but have no meaning. Times are those of the host.
"""

import importlib.util
import os
from pathlib import Path

import torch

from clipfast.kernels.hardware import CARDS

from .build import GPU, build
from .driver import VARIABLE, gpu_numbers

# MARK is part of the name of the stub's card, so that a result file can be distinguished from one of a real GPU.
MARK = "stub driver, nothing runs"
NAME_VARIABLE = "CLIPFAST_STUB_NAME"
CARD = CARDS["h100"]


def gpu_environment() -> dict[str, str]:
    """Return the variables for a process that uses the stub as its only GPU, an H100.

    Raises:
        RuntimeError: PyTorch is built without CUDA, or gcc is missing.
    """
    if torch.version.cuda is None:
        raise RuntimeError(
            f"PyTorch {torch.__version__} is built without CUDA: the stub stands in for the GPU of a CUDA build"
        )
    folder = build(GPU, _headers())
    preload = ":".join([*(str(folder / name) for name in GPU), *filter(None, [os.environ.get("LD_PRELOAD")])])
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "TRITON_LIBCUDA_PATH": str(folder),
        VARIABLE: gpu_numbers(CARD.arch, 1),
        NAME_VARIABLE: f"NVIDIA {CARD.name} ({MARK})",
    }


def _headers() -> list[Path]:
    """Return the folders of the CUDA runtime's headers for the build of the stub."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(path) for path in found.submodule_search_locations or ()] if found else []
    folders = [path.parent for root in roots for path in sorted(root.glob("*/include/cuda_runtime_api.h"))]
    if not folders:
        raise RuntimeError("the headers of the CUDA runtime are missing: pip install nvidia-cuda-runtime")
    return folders
