"""How a compiled kernel of Triton is started directly, without Triton's binding of arguments."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


class Compiled(NamedTuple):
    """A kernel that a plan starts by itself.

    Attributes:
        start: starts the kernel, given a stream and its tensors' addresses or descriptors.
        kernel: Triton's object, which is kept because Triton unloads the kernel when it is freed.
        launch: starts the kernel like ``start``, but gets a tensor map, the sizes and the strides in place of each
            descriptor; None if only ``start`` can start it.
        map_makers: functions, one for each descriptor, that return its tensor map, sizes and strides.
    """

    start: Callable[[int, Sequence[Any]], None]
    kernel: CompiledKernel
    launch: Callable[[int, Sequence[Any]], None] | None = None
    map_makers: Sequence[Callable[[TensorDescriptor], list[Any]]] = ()


def ready(compiled: CompiledKernel, grid: tuple[int, ...], rest: tuple[Any, ...]) -> Compiled:
    """Return a compiled kernel with the functions that start it; ``rest`` are the arguments after its tensors.

    A kernel without scratch memory is passed directly to the function in C that Triton's launcher calls, since the
    launcher's Python code has nothing to allocate for it.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        head = function, metadata, None, None, None
        return Compiled(lambda stream, at: run(*grid, stream, *head, *at, *rest), compiled)
    start = _starts(compiled, run.launch, grid, rest)
    code = getattr(run.launch, "__code__", None)
    if code is None:  # a function in C, which takes no descriptors
        return Compiled(start, compiled, start)
    # Triton wraps the function in C by a function that makes tensor maps of descriptors.
    launch = dict(zip(code.co_freevars, run.launch.__closure__, strict=True))["launcher"].cell_contents
    make = sys.modules[run.__class__.__module__].make_tensordesc_arg
    more = (None,) * (make.__code__.co_argcount - 2)  # Triton 3.9 passes it one argument more, which it ignores
    makers = [lambda x, meta=meta: make(x, meta, *more) for meta in compiled.metadata.tensordesc_meta or ()]
    return Compiled(start, compiled, _starts(compiled, launch, grid, rest) if makers else None, makers)


def _starts(
    compiled: CompiledKernel, launch: Callable[..., None], grid: tuple[int, ...], rest: tuple[Any, ...]
) -> Callable[..., None]:
    """Return the function that starts a compiled kernel by ``launch``; the others are as in :func:`ready`."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    head = function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "kernel_signature"):  # Triton 3.9 takes the arguments as one tuple
        tail = metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature
        return lambda stream, at: launch(*grid, stream, *head, *tail, (*at, *rest))
    return lambda stream, at: launch(*grid, stream, *head, None, None, metadata, None, None, None, *at, *rest)
