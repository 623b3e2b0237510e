"""Compare the arguments that the stub driver received in each launch with those that the kernel was called with."""

import contextlib
import dataclasses
import functools
import struct
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.launch import Plan, Start

from .driver import Stub, TensorMap, tensors_of

# The struct format in which the launcher packs a scalar, by the scalar's type in the kernel's signature.
_FORMATS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
_SCRATCH = 2  # pointers that the launcher adds at the end: scratch memory for the kernel and for a profiler


@dataclasses.dataclass(frozen=True)
class CheckedLaunch:
    """One checked launch: the kernel, its grid and threads, and the number of tensor maps among its arguments."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    maps: int


class PackingError(Exception):
    """The error for a stub driver that received other arguments than the kernel was called with."""


@contextlib.contextmanager
def checked_launches(stub: Stub, device: int = 0, *, emptied: bool = False) -> Iterator[list[CheckedLaunch]]:
    """Check the arguments of every launch in the context, whose tensors are those of ``device``; yield the launches.

    If a plan can start its kernel without Triton, or by addresses alone, the kernel is started in each of these ways.
    With ``emptied``, kernels are compiled without their bodies.

    Raises:
        PackingError: an argument reached the driver with another value than the kernel was called with, or than
            Triton's own launch passes, or with less alignment than the kernel was compiled for.
    """
    seen: list[CheckedLaunch] = []
    run, remember = JITFunction.run, Start.remember

    def run_and_check(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """Start a kernel on the stub, and check the arguments that its driver received."""
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        stub.own(tensors_of(named.values()), device)
        before = stub.counts.launches
        compiled = run(without_body(kernel) if emptied else kernel, *args, grid=grid, warmup=warmup, **options)
        if stub.counts.launches != before + 1:
            raise PackingError(f"{kernel.__name__}: the driver saw {stub.counts.launches - before} launches of one")
        signature = {name: str(kind) for name, kind in compiled.src.signature.items()}
        _check_alignment(kernel.__name__, compiled.src.attrs, kernel.arg_names, named)
        maps = _check_parameters(kernel.__name__, signature, named, stub.last.parameters())
        last = stub.last
        seen.append(CheckedLaunch(last.name.decode(), tuple(last.grid), last.block[0], maps))
        return compiled

    def start_in_all_ways(plan: Plan, *tensors: Any) -> None:
        """Start a kernel by its plan, by addresses and by Triton; check that the driver receives the same."""
        before, known = stub.counts.launches, dict(plan.compiled)
        plan.start_by_triton(tensors)
        if stub.counts.launches == before:
            return  # the grid is empty, so no kernel was started
        for key, compiled in known.items():
            if plan.compiled[key].kernel.function != compiled.kernel.function:
                raise PackingError(f"a plan has two kernels for {key}")
        expected = _received(stub)
        with torch.cuda.device(device):
            if plan.start_compiled(tensors) and _received(stub) != expected:
                raise PackingError(f"a plan started {expected[0]} with {_received(stub)}, Triton with {expected}")
            start = Start(plan)
            remember(start, tensors)
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in tensors]
            if start.at(*addresses) and _received(stub) != expected:
                raise PackingError(f"a start passed {_received(stub)}, Triton {expected}")

    with (
        mock.patch.object(JITFunction, "run", run_and_check),
        mock.patch.object(Plan, "start", start_in_all_ways),
        mock.patch.object(Start, "remember"),  # makes every Start call Plan.start, which is checked
    ):
        yield seen


def _received(stub: Stub) -> tuple[Any, ...]:
    """Return everything that the stub's driver received with the last launch."""
    last = stub.last
    return last.name, *last.grid, *last.block, last.shared, last.device, last.stream, *last.parameters()


def _check_parameters(
    kernel: str, signature: Mapping[str, str], named: Mapping[str, Any], received: list[bytes]
) -> int:
    """Compare the parameters of a launch on the stub one by one, and return how many are tensor maps."""
    place = maps = 0

    def take(name: str, size: int) -> bytes:
        """Return the next parameter that the stub's driver received, which must have this size."""
        nonlocal place
        if place >= len(received):
            raise PackingError(f"{kernel}: {name} is parameter {place}, and the kernel has {len(received)}")
        found, place = received[place], place + 1
        if len(found) != size:
            raise PackingError(f"{kernel}: {name} has {len(found)} bytes in the kernel, expected {size}")
        return found

    def expect(name: str, layout: str, value: Any) -> None:
        """Check that the next parameter reached the stub's driver as ``value``."""
        packed = struct.pack(layout, value)
        found = take(name, len(packed))
        if found != packed:
            raise PackingError(f"{kernel}: {name} reached the driver as {found.hex()}, expected {packed.hex()}")

    for name, kind in signature.items():
        value = named.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, TensorDescriptor):
            maps += 1
            _check_map(kernel, name, TensorMap.from_buffer_copy(take(name, 128)), value)
            for size in value.shape:
                expect(f"a size of {name}", "<i", size)
            for stride in value.strides:
                expect(f"a stride of {name}", "<q", stride)
        elif kind.startswith("*"):
            expect(name, "<Q", value.data_ptr() if isinstance(value, torch.Tensor) else value)
        else:
            expect(name, _FORMATS[kind], value)
    if place + _SCRATCH != len(received):
        raise PackingError(f"{kernel}: {place} arguments and {_SCRATCH} of scratch, the kernel has {len(received)}")
    return maps


def _check_map(kernel: str, name: str, found: TensorMap, expected: TensorDescriptor) -> None:
    """Compare a tensor map that the stub received, with dimensions in reverse order, with its descriptor."""
    base: Any = expected.base
    rank, bytes_each = len(expected.shape), base.dtype.itemsize
    sizes = [last + 1 for last in found.last[:rank]][::-1]
    strides = [*(stride // bytes_each for stride in found.strides[: rank - 1][::-1]), 1]
    wanted = [base.data_ptr(), list(expected.shape), list(expected.strides), bytes_each]
    if [found.base, sizes, strides, found.element_bytes] != wanted or found.rank != rank:
        raise PackingError(f"{kernel}: the tensor map of {name} has {sizes} and {strides}, expected {wanted}")
    box = list(found.box[:rank])[::-1]
    block = list(expected.block_shape)
    if any(inner > outer or outer % inner for inner, outer in zip(box, block, strict=True)):
        raise PackingError(f"{kernel}: boxes {box} of the tensor map of {name} do not fill a block of {block}")


def _check_alignment(kernel: str, attributes: Any, names: list[str], named: Mapping[str, Any]) -> None:
    """Refuse a launch on the stub whose arguments are not as divisible as the compiled kernel assumes."""
    for path, found in attributes.items():
        value = named.get(names[path[0]])
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        for attribute, divisor in found:
            if attribute == "tt.divisibility" and isinstance(number, int) and number % divisor:
                raise PackingError(f"{kernel}: {names[path[0]]} is {number}, compiled for multiples of {divisor}")


@functools.cache
def without_body(kernel: Any) -> Any:
    """Return a kernel for the stub with the name and the parameters of ``kernel`` that does nothing.

    The launcher packs arguments by the kernel's signature, its configuration and the specialisation of its arguments;
    the body of the kernel does not matter for this. Without a body a kernel compiles in a tenth of the time, so that
    all odd shapes and layouts of all ops can be launched. The box and the swizzle of a tensor map do depend on the
    body. Therefore the shipped shapes are launched with bodies.
    """
    copy: Any = JITFunction(kernel.fn)
    copy.params = kernel.params
    parameters = [f"{p.name}: tl.constexpr" if p.is_constexpr else p.name for p in kernel.params]
    copy._unsafe_update_src(f"def {kernel.__name__}({', '.join(parameters)}):\n    return\n")
    return copy
