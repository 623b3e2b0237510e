"""Settings of PyTorch and Triton for verification: exact float32, NaN in new memory, and a faster interpreter."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products and convolutions of the verification in float32 while the context is open.

    cuDNN uses TF32 by default. The rule for errors allows a multiple of the error of PyTorch's own results, which in
    TF32 is a thousand times larger than in float32. PyTorch has an old and a new setting for this. Both are set here,
    because TorchInductor reads the old one, and reading it raises an error if the two disagree.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    settings = (matmul, cudnn.conv, cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before[0] == "tf32", before[1:] == ["tf32", "tf32"]
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN while the context is open, so that the verification sees unwritten values.

    A value that a kernel forgets to write is then NaN, and not the right result that an earlier call has left there.
    """
    settings: Any = torch.utils.deterministic
    fill, mode = settings.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    settings.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        # PyTorch fills new memory only in its deterministic mode, in which it warns of ops that are not deterministic.
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = fill


def speed_up_interpreter() -> None:
    """Let Triton's interpreter leave out work that changes no result: two thirds of the verification's time.

    By itself, the interpreter patches all of ``triton.language`` again in each call of a device function. Only Triton's
    own device functions need it, in the first call: they use ``triton.language.core``, which no launch patches.
    It also computes whether sums and products of integers overflow, and drops the answer outside of its debug mode.
    """

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a device function in an interpreted kernel of the verification."""
        if tl.core.is_builtin(function.fn.__globals__.get("tl", tl.core).full):
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
