"""Compile the kernels that an op launches for a GPU that need not be there, and read what they take of it.

The launches are recorded from the op itself, so the compiled kernels are those that would run: with the same constants
and the same specialisation of the arguments.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import Launch, record_launches

MATRIX_UNITS = tuple(dict.fromkeys(architecture.matrix_unit for architecture in ARCHITECTURES.values()))
# Triton's names of dtypes.
_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor (registers: per thread), and which matrix unit it uses."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int
    mma: str


def problems(resources: Resources, arch: int, *, half: bool, multiplies: bool) -> list[str]:
    """Return what is wrong with a compiled kernel: it spills, exceeds a limit, or multiplies with the wrong unit.

    A kernel that ``multiplies`` operands of 16 bits (``half``) must use the tensor cores. Float32 must stay exact, and
    so must not use them.
    """
    limits = ARCHITECTURES[arch]
    found = []
    if resources.spill_bytes:
        found.append(f"spills {resources.spill_bytes} bytes")
    if resources.shared_bytes > limits.block_shared_bytes:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory, {limits.block_shared_bytes} are allowed")
    if resources.tmem_columns > limits.tensor_columns:
        # Triton compiles such a kernel to an empty body, without a message
        found.append(f"needs {resources.tmem_columns} columns of tensor memory, {limits.tensor_columns} exist")
    expected = limits.matrix_unit if half and multiplies else "none"
    if resources.mma != expected:
        found.append(f"multiplies with {resources.mma}, expected {expected}")
    return found


def tensors(launch: Launch) -> list[torch.Tensor]:
    """Return the tensor arguments of a launch, including those behind descriptors."""
    values = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in launch.args.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def record(arch: int, op: Callable[[], object]) -> list[Launch]:
    """Record the launches that ``op`` would make on compute capability ``arch``, each distinct one once."""
    with record_launches(arch) as launches:
        op()
    return list({(launch.kernel.__name__, str(_specialise(launch))): launch for launch in launches}.values())


def named(launches: list[Launch]) -> dict[str, Launch]:
    """Return launches by kernel name and number: one kernel may be launched in several ways, as with other strides."""
    keys: dict[str, Launch] = {}
    for launch in launches:
        name = launch.kernel.__name__
        keys[f"{name} {sum(key.split()[0] == name for key in keys)}"] = launch
    return keys


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Compile one recorded launch for compute capability ``arch`` into Triton's compiled kernel, with all its code."""
    signature, constants, attrs = _specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(kernel: Any, sass: str | None = None) -> Resources:
    """Return what a compiled kernel takes, read from the machine code that would run; ``sass`` is its text, if known.

    Assembling its PTX again would describe another kernel, because Triton gives the assembler options that change
    registers and spills.
    """
    usage = _cuobjdump(kernel, "-res-usage")
    # spills are in the stack frame: without one there are none to count
    spills = _number(r"STACK:(\d+)", usage) and _stored_bytes(sass or disassemble(kernel))
    ptx = kernel.asm["ptx"]
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        spill_bytes=spills,
        shared_bytes=kernel.metadata.shared,
        tmem_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        mma="+".join(unit for unit in MATRIX_UNITS if re.search(rf"\b{re.escape(unit)}", ptx)) or "none",
    )


def multiplies(kernel: Any) -> bool:
    """Return whether a compiled kernel has a matrix product."""
    return "tt.dot" in kernel.asm["ttir"]


def threads(kernel: Any) -> int:
    """Return the threads of one block, including the helper warps of a warp-specialised kernel."""
    return _number(r"\.reqntid\s+(\d+)", kernel.asm["ptx"])


def disassemble(kernel: Any) -> str:
    """Return the machine code of a compiled kernel as text."""
    return _cuobjdump(kernel, "-sass")


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


def _cuobjdump(kernel: Any, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _stored_bytes(sass: str) -> int:
    """Return the bytes per thread that are stored to local memory, which is where spills go. Each store counts once."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.[A-Z]+)*(?:\.(\d+))?\b", sass))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[:1000]}")
    return int(match.group(1))
