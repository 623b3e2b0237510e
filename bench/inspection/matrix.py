"""The matrix instructions of a kernel: their names, shapes and operand types."""

import dataclasses
import re
from collections.abc import Iterable

from .sass import Graph, Instruction, UnknownControlFlow

_WARP_MMA = ("HMMA", "QMMA")
_GROUP_MMA = ("HGMMA", "QGMMA")
_TENSOR_MMA = ("UTCHMMA", "UTCQMMA")
_ANY_MMA = re.compile(r"(UTC)?[A-Z]G?MMA$")
# The sizes of mma.sync by the first modifier of its instruction.
WARP_SHAPES = {"1688": (16, 8, 8), "1684": (16, 8, 4), "16816": (16, 8, 16), "16832": (16, 8, 32)}


@dataclasses.dataclass(frozen=True)
class Mma:
    """A matrix instruction: its name, its shape (None: unknown) and the type of its operands."""

    name: str
    shape: tuple[int, int, int] | None
    operand: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.shape else "?"
        return f"{self.name} {shape} {self.operand}"


def is_mma(instruction: Instruction) -> bool:
    """Return whether an instruction runs on the matrix unit (HFMA2.MMA does not)."""
    return _ANY_MMA.match(instruction.name) is not None


def mma_kinds(instructions: list[Instruction]) -> tuple[str, ...]:
    """Return the kinds of matrix instructions in a kernel, such as "HGMMA 64x128x16 bf16", each once."""
    try:
        graph = Graph(instructions)
    except UnknownControlFlow:
        return tuple(sorted({instruction.name for instruction in instructions if is_mma(instruction)}))
    return tuple(sorted({str(mma) for mma in _products(graph, graph.order)}))


def _products(graph: Graph, body: Iterable[int]) -> list[Mma]:
    """Return the matrix instructions in ``body``."""
    return [
        _describe(graph, block, position)
        for block in body
        for position, instruction in enumerate(graph.blocks[block])
        if is_mma(instruction)
    ]


def _describe(graph: Graph, block: int, position: int) -> Mma:
    instruction = graph.blocks[block][position]
    if instruction.name in _TENSOR_MMA:
        return _tensor_memory_mma(graph, block, position)
    shape_text = instruction.modifiers[0] if instruction.modifiers else ""
    operand = next((kind.lower() for kind in ("TF32", "BF16") if kind in instruction.modifiers), "fp16")
    if instruction.name.startswith("Q"):
        operand = "fp8"
    if "SP" in instruction.modifiers or instruction.name not in (*_WARP_MMA, *_GROUP_MMA):
        return Mma(instruction.name, None, "unknown")
    if instruction.name in _WARP_MMA:
        return Mma(instruction.name, WARP_SHAPES.get(shape_text), operand)
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape_text)
    shape = (int(match[1]), int(match[2]), int(match[3])) if match else None
    return Mma(instruction.name, shape, operand)


def _tensor_memory_mma(graph: Graph, block: int, position: int) -> Mma:
    """Describe a tcgen05.mma. M, N and operand type are fields of a descriptor (PTX ISA, "Instruction descriptor").

    The descriptor is a constant in a uniform register, so search the code that certainly ran before for that constant.
    """
    instruction = graph.blocks[block][position]
    unknown = Mma(instruction.name, None, "unknown")
    register = re.search(r"idesc\[UR(\d+)\]", instruction.operands)
    if register is None or instruction.modifiers:
        return unknown
    writers = (step for step in graph.above(block, position) if _writes(step, int(register[1])))
    writer = next(writers, None)
    value = re.fullmatch(r"UR\d+, 0x([0-9a-f]+)", writer.operands) if writer else None
    if writer is None or value is None or writer.opcode != "UMOV" or writer.guard:
        return unknown
    descriptor = int(value[1], 16)
    m, n, kind = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3, descriptor >> 7 & 7
    if m not in (64, 128) or not 8 <= n <= 256:
        return unknown
    operand = "fp8" if instruction.name == "UTCQMMA" else {0: "fp16", 1: "bf16", 2: "tf32"}.get(kind, "unknown")
    return Mma(instruction.name, (m, n, {"tf32": 8, "fp8": 32}.get(operand, 16)), operand)


def _writes(instruction: Instruction, register: int) -> bool:
    """Return whether the first operand, which is the result, covers a uniform register."""
    first = re.match(r"UR(\d+)\b", instruction.operands)
    wide = {"64": 2, "WIDE": 2, "128": 4}
    width = max((wide.get(modifier, 1) for modifier in instruction.modifiers), default=1)
    return first is not None and 0 <= register - int(first[1]) < width
