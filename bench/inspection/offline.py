"""Compile what an op launches for a GPU that is not there, and report what the compiler made of it.

The launches are recorded from the op itself, so what is compiled here is what would run: the same kernel, the same
constants, the same specialisation of its arguments.
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

from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import Launch, record_launches

MATRIX_UNITS = tuple(architecture.matrix_unit for architecture in ARCHITECTURES.values())
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor, registers per thread, and which matrix unit it uses."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int
    mma: str


def problems(resources: Resources, arch: int, *, half: bool, multiplies: bool) -> list[str]:
    """What is wrong with a compiled kernel: spills, limits passed, or a product that misses the tensor cores or should
    not use them.

    Args:
        resources: of the kernel.
        arch: compute capability, 80, 90 or 100.
        half: whether its operands are 16-bit; float32 must stay exact, so it must not use them.
        multiplies: whether it has a matrix product.
    """
    limits = ARCHITECTURES[arch]
    found = []
    if resources.spill_bytes:
        found.append(f"spills {resources.spill_bytes} bytes")
    if resources.shared_bytes > limits.block_shared_bytes:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory, {limits.block_shared_bytes} are allowed")
    if resources.tmem_columns > limits.tensor_columns:
        # Triton compiles such a kernel to an empty body and says nothing.
        found.append(f"needs {resources.tmem_columns} columns of tensor memory, {limits.tensor_columns} exist")
    expected = limits.matrix_unit if half and multiplies else "none"
    if resources.mma != expected:
        found.append(f"multiplies with {resources.mma}, expected {expected}")
    return found


def tensors(launch: Launch) -> list[torch.Tensor]:
    """The tensors that a launch is given, those behind descriptors too."""
    values = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in launch.args.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def record(arch: int, op: Callable[[], object]) -> list[Launch]:
    """The launches that ``op`` would make on compute capability ``arch``, each distinct one once."""
    with record_launches(arch) as launches:
        op()
    distinct = {
        (launch.kernel.__name__, str(_specialise(launch)), str(launch.constexprs)): launch for launch in launches
    }
    return list(distinct.values())


def named(launches: list[Launch]) -> dict[str, Launch]:
    """Launches by kernel name and number: one kernel may be launched in several ways, with other strides, or adding."""
    keys: dict[str, Launch] = {}
    for launch in launches:
        name = launch.kernel.__name__
        keys[f"{name} {sum(key.split()[0] == name for key in keys)}"] = launch
    return keys


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile one recorded launch for NVIDIA compute capability ``arch`` (90 for sm_90)."""
    return resources(compile_kernel(launch, arch))


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Compile one recorded launch; the result is Triton's compiled kernel, with everything it went through."""
    signature, constants, attrs = _specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(kernel: Any, sass: str | None = None) -> Resources:
    """What a compiled kernel takes, read off the machine code that would run.

    Assembling its PTX again would tell of another kernel: Triton gives the assembler options that change registers and
    spills.

    Args:
        kernel: compiled.
        sass: its disassembly, where the caller has it already.
    """
    usage = _cuobjdump(kernel, "-res-usage")
    # Spills live in the stack frame: without one there is nothing to count.
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
    """Threads of one block, helper warps of a warp-specialised kernel included."""
    return _number(r"\.reqntid\s+(\d+)", kernel.asm["ptx"])


def disassemble(kernel: Any) -> str:
    """The machine code of a compiled kernel as text."""
    return _cuobjdump(kernel, "-sass")


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Signature, constants and divisibility of a launch, as Triton's own launcher would derive them."""
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
    """Bytes per thread that are stored to local memory, which is where spills go: each store in the text once."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.[A-Z]+)*(?:\.(\d+))?\b", sass))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[:1000]}")
    return int(match.group(1))
