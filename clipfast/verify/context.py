"""Settings of PyTorch while something is verified."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 means float32: a yardstick in TF32, cuDNN's default, would allow a thousand times the error."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel forgets to write is NaN, not the right answer left over from another call."""
    settings: Any = torch.utils.deterministic
    fill, mode = settings.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    settings.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        # the filling comes with deterministic algorithms; where PyTorch has none it warns and goes on
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = fill
