"""Compile the kernels that an op launches for a GPU that this machine may lack, and read the resources that they take.

The launches are recorded from calls of the op, so the compiled kernels are exactly those that would run: they have the
same constants and the same specialisation of the arguments.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import AMD, ARCHITECTURES, architecture, target_name
from clipfast.kernels.launch import Launch, record_launches

MATRIX_UNITS = tuple(dict.fromkeys(architecture.matrix_unit for architecture in ARCHITECTURES.values()))
# Units in which resources are allocated, from cuda_occupancy.h. Registers are allocated warp by warp, in one of four
# sub-partitions.
REGISTER_UNIT = 256
SUB_PARTITIONS = 4
SHARED_RESERVED = 1024  # bytes of shared memory that the system reserves in each block
SHARED_UNIT = 128
TENSOR_UNIT = 32  # columns of tensor memory; their number must also be a power of two
# Triton's names of dtypes.
_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
# The assembler's messages about each kernel that this process compiled, by the kernel's hash.
_logs: dict[str, str] = {}
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources of a multiprocessor that one compiled kernel takes, and the warnings of the assembler.

    Attributes:
        registers: registers of a thread.
        spill_bytes: bytes of a thread that are spilled from registers to local memory.
        shared_bytes: shared memory of a block.
        tmem_columns: columns of tensor memory of a block.
        mma: the matrix units that the kernel uses, by their instruction.
        warnings: codes of the assembler's warnings, such as C7515.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int
    mma: str
    warnings: tuple[str, ...] = ()


def problems(resources: Resources, arch: int, *, half: bool, multiplies: bool) -> list[str]:
    """Return the faults of a compiled kernel.

    It may spill registers, exceed a limit, or multiply with the wrong unit. The assembler may warn that it serialises
    the products of an asynchronous matrix unit, which costs up to half of their rate. A kernel that ``multiplies``
    operands of 16 bits (``half``) must use the tensor cores. Float32 products must stay exact, so they must not use
    the tensor cores; on AMD they must use the matrix units, which multiply float32 exactly.
    """
    limits = architecture(arch)
    found = []
    if resources.spill_bytes:
        found.append(f"spills {resources.spill_bytes} bytes")
    if resources.shared_bytes > limits.block_shared_bytes:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory, {limits.block_shared_bytes} are allowed")
    if resources.tmem_columns > limits.tensor_columns:
        # Triton silently compiles a kernel that needs too much tensor memory to an empty body.
        found.append(f"needs {resources.tmem_columns} columns of tensor memory, {limits.tensor_columns} exist")
    expected = limits.matrix_unit if multiplies and (half or arch in AMD) else "none"
    if resources.mma != expected:
        found.append(f"multiplies with {resources.mma}, expected {expected}")
    return found + [f"the assembler warns of {code}" for code in resources.warnings]


def tensors(launch: Launch) -> list[torch.Tensor]:
    """Return the tensor arguments of a recorded launch, including the tensors that descriptors describe."""
    values = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in launch.args.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def record(arch: int, op: Callable[[], object]) -> list[Launch]:
    """Record the launches that ``op`` would make on compute capability ``arch``, each distinct one once."""
    with record_launches(arch) as launches:
        op()
    return distinct(launches)


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """Return the launches without those that compile to the same kernel as an earlier one."""
    return list({identity(launch): launch for launch in launches}.values())


def identity(launch: Launch) -> str:
    """Return a key that is equal for launches that compile to the same kernel."""
    return f"{launch.kernel.__name__} {_specialise(launch)} {launch.options}"


def named(launches: list[Launch]) -> dict[str, Launch]:
    """Return launches by kernel name and number: one kernel may be launched with several layouts."""
    keys: dict[str, Launch] = {}
    for launch in launches:
        name = launch.kernel.__name__
        keys[f"{name} {sum(key.split()[0] == name for key in keys)}"] = launch
    return keys


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Compile one recorded launch for an architecture into Triton's compiled kernel, with all its code."""
    signature, constants, attrs = _specialise(launch)
    target = GPUTarget("cuda", arch, 32)
    if arch in AMD:
        target = GPUTarget("hip", target_name(arch), 64)
        for index, name in enumerate(launch.kernel.arg_names):
            value = launch.args.get(name)
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() < 2**31:
                attrs.setdefault((index,), []).append(["tt.pointer_range", 32])
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    with _logged() as log:
        kernel = triton.compile(source, target=target, options=launch.options)
    if log.getvalue():  # the log is empty if the kernel comes from Triton's cache
        _logs[kernel.hash] = log.getvalue()
    return kernel


def assembler_log(kernel: Any) -> str:
    """Return the assembler's messages about a compiled kernel, which Triton discards.

    Triton's own function assembles a kernel from Triton's cache again, with the options of its compilation.
    """
    if kernel.hash not in _logs:
        target = kernel.metadata.target
        backend = make_backend(target)
        with _logged() as log:
            backend.make_cubin(kernel.asm["ptx"], {}, backend.parse_options(kernel.metadata._asdict()), target.arch)
        _logs[kernel.hash] = log.getvalue()
    return _logs[kernel.hash]


def resources(kernel: Any) -> Resources:
    """Return the resources of a compiled kernel, read from the machine code that would run."""
    if "amdgcn" in kernel.asm:
        return _resources_on_amd(kernel)
    usage = _cuobjdump(kernel.asm["cubin"], "-res-usage")
    # Spilled registers are in the stack frame, so a kernel without a stack frame has no spills.
    spills = _number(r"STACK:(\d+)", usage) and _stored_bytes(disassemble(kernel))
    ptx = kernel.asm["ptx"]
    # The assembler only has warnings about the products of wgmma, so its log is read for kernels with wgmma only.
    warnings = re.findall(r"\((C7\d+)\)", assembler_log(kernel)) if "wgmma.mma_async" in ptx else []
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=spills,
        shared_bytes=kernel.metadata.shared,
        tmem_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        mma="+".join(unit for unit in MATRIX_UNITS if re.search(rf"\b{re.escape(unit)}", ptx)) or "none",
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _resources_on_amd(kernel: Any) -> Resources:
    """Return the resources of a kernel that was compiled for AMD: vector registers, and the local data share."""
    assembly = kernel.asm["amdgcn"]
    products = re.findall(r"\bv_mfma_\w+", assembly)
    units = sorted({"xf32" if product.endswith("xf32") else "v_mfma" for product in products})
    return Resources(
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        spill_bytes=4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        shared_bytes=kernel.metadata.shared,
        tmem_columns=0,
        mma="+".join(units) or "none",
    )


def multiplies(kernel: Any) -> bool:
    """Return whether a compiled kernel has a matrix product."""
    return "tt.dot" in kernel.asm["ttir"]


def narrow_products(kernel: Any) -> list[str]:
    """Return the 32-bit integer products of a compiled kernel that may overflow: those of two sizes, strides or
    indices.

    Products with a constant or with a quotient are left out, because a quotient is a number of tiles.
    """
    ttir = kernel.asm["ttir"]
    # MLIR writes either arith.muli %a, %b : i32 or "arith.muli"(%a, %b) ... : (i32, i32)
    small = set(re.findall(r'(%\w+) = "?arith\.(?:constant|divsi)\b', ttir))
    products = re.findall(r'(arith\.muli"?[ (](%\w+), (%\w+).*: \(?(?:tensor<[0-9x]+)?i32\b)', ttir)
    return [text for text, *factors in products if small.isdisjoint(factors)]


def threads(kernel: Any) -> int:
    """Return the threads of one block of a compiled kernel, including the helper warps of warp specialisation."""
    return _number(r"\.reqntid\s+(\d+)", kernel.asm["ptx"])


def disassemble(kernel: Any) -> str:
    """Return the machine code of a compiled kernel as text."""
    return _cuobjdump(kernel.asm["cubin"], "-sass")


@contextlib.contextmanager
def _logged() -> Iterator[io.StringIO]:
    """Collect the output of Triton in this context, which includes the log of the assembler."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        yield log


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Return signature, constants and divisibility of a launch, as Triton's own launcher would derive them."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constexprs)
    attrs: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value: Any = launch.args.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif name in launch.constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


@functools.lru_cache(maxsize=8)
def _cuobjdump(cubin: bytes, option: str) -> str:
    """Return the output of Triton's cuobjdump, cached: several functions read it, and one run takes 0.3 s."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks per multiprocessor, the resources that allow no more, and the resident share of the possible warps."""

    blocks: int
    limits: tuple[str, ...]
    warps: float


def occupancy(arch: int, *, registers: int, warps: int, shared_bytes: int, tmem_columns: int = 0) -> Occupancy:
    """Compute the occupancy of a kernel.

    ``registers`` is the number for a thread. Warps, shared memory (static and dynamic) and columns of tensor memory are
    given for a block. Tensor memory limits the occupancy, because a block waits for free columns.
    """
    limits = ARCHITECTURES[arch]
    per_warp = triton.cdiv(max(registers, 1) * 32, REGISTER_UNIT) * REGISTER_UNIT
    per_block = triton.cdiv(shared_bytes + SHARED_RESERVED, SHARED_UNIT) * SHARED_UNIT
    allowed = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": limits.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS // warps,
        "shared": limits.shared_bytes // per_block,
    }
    if tmem_columns:
        allowed["tmem"] = limits.tensor_columns // max(TENSOR_UNIT, triton.next_power_of_2(tmem_columns))
    blocks = min(allowed.values())
    binding = tuple(resource for resource, number in allowed.items() if number == blocks)
    return Occupancy(blocks, binding, blocks * warps / limits.warps)


def occupancy_of(kernel: Any, found: Resources) -> Occupancy:
    """Return the occupancy of a compiled kernel with these resources on the architecture that it was compiled for."""
    return occupancy(
        kernel.metadata.target.arch, registers=found.registers, warps=threads(kernel) // 32,
        shared_bytes=found.shared_bytes, tmem_columns=found.tmem_columns,
    )  # fmt: skip


def _stored_bytes(sass: str) -> int:
    """Return the bytes per thread that a compiled kernel spills, or stores to local memory. Each store counts once."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.[A-Z]+)*(?:\.(\d+))?\b", sass))


def _number(pattern: str, text: str) -> int:
    """Return the number that ``pattern`` finds in the disassembler's output."""
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[:1000]}")
    return int(match.group(1))


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Start ``jobs`` processes that compile kernels. Tasks that still wait when the context ends are dropped."""
    # A fork server imports all modules once, for all of its child processes. These inherit neither the threads nor the
    # GPU of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.command"])
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def spread(function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int | None = None) -> Iterator[Result]:
    """Yield the results of tasks that compile kernels, in order, by as many processes as there are cores.

    ``jobs`` sets another number of processes. If it is 1, the work is done in this process.
    """
    wanted = min(jobs or os.cpu_count() or 1, len(tasks))
    if wanted <= 1:
        yield from map(function, tasks)
        return
    with compilers(wanted) as pool:
        yield from pool.map(function, tasks)
