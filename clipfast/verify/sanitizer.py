"""Sessions of ttsem, which executes Triton's IR on a CPU, and finds races and accesses out of bounds."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def lacks() -> str:
    """Return why ttsem cannot execute kernels here, or "" if it can."""
    if TRITON < (3, 8):
        return f"ttsem knows Triton 3.8 and newer, not {triton.__version__}: races and bounds are UNCHECKED"
    if importlib.util.find_spec("ttsem") is None:
        return "ttsem is not installed (pip install --no-deps ttsem): races and bounds are UNCHECKED"
    return ""


@contextlib.contextmanager
def sanitizer_session(**options: Any) -> Iterator[Any]:
    """Yield a session of ttsem, which executes kernels for sm_90; its patches of torch.cuda are undone at the end."""
    from ttsem import harness, mlir, sanitize

    before, write_back = dict(vars(torch.cuda)), sanitize._write_back

    def write_all_back(record: Any, execution: Any) -> None:
        """Copy the values that a kernel has stored into its tensors; ttsem itself leaves out those of descriptors."""
        bound = {
            name: value.base if isinstance(value, TensorDescriptor) else value for name, value in record.bound.items()
        }
        write_back(dataclasses.replace(record, bound=bound), execution)

    def ir_for_launch(record: Any, stage: str, target: Any) -> str:
        """Compile a kernel only down to the IR that ttsem executes; ttsem itself would go on to an assembled binary."""
        mlir.enable_generic_printing()
        return mlir.to_generic(harness._stage_text(record, stage, target), None)

    try:
        with (
            mock.patch.object(harness, "ir_for_launch", ir_for_launch),
            mock.patch.object(sanitize, "_write_back", write_all_back),
            sanitize.session(cc=90, **options) as running,
        ):
            yield running
    finally:
        for name, value in before.items():
            setattr(torch.cuda, name, value)
