"""An upper bound on how busy a kernel can keep its matrix unit, from its machine code.

For one iteration of the loop that holds the matrix products, count the clock cycles for which a block uses each unit of
a multiprocessor: the matrix unit, the exponential unit, the float32 lanes and the four issue slots. The units work side
by side, so an iteration takes at least as long as the busiest of them, and

    bound = cycles of the products at the peak rate of the architecture / cycles of the busiest unit.

This is a bound and not an estimate: it leaves out memory latency and bandwidth, shared memory and its bank conflicts,
barriers, dependencies between instructions, and the code around the loop. Besides the products, only code that runs in
every iteration is counted. A low bound is a fact about the kernel; a high one promises nothing. A bound is a share of
the peak for the operands' own type: at 100%, tf32 has half the speed of bf16.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable

from clipfast.kernels.hardware import ARCHITECTURES

from .occupancy import SUB_PARTITIONS
from .sass import Graph, Instruction, Loop, UnknownControlFlow

WARP = 32

_WARP_MMA = ("HMMA", "QMMA")
_GROUP_MMA = ("HGMMA", "QGMMA")
_TENSOR_MMA = ("UTCHMMA", "UTCQMMA")
_OTHER_MMA = re.compile(r"(UTC)?[A-Z]G?MMA$")
_WARP_SHAPES = {"1688": (16, 8, 8), "1684": (16, 8, 4), "16816": (16, 8, 16), "16832": (16, 8, 32)}
_FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}


@dataclasses.dataclass(frozen=True)
class Mma:
    """A matrix instruction: its issuer ("warp", "warpgroup" or "block"), its shape (None: unknown) and operand type."""

    name: str
    issuer: str
    shape: tuple[int, int, int] | None
    operand: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.shape else "?"
        return f"{self.name} {shape} {self.operand}"


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Clock cycles per block for which a piece of code uses each unit of a multiprocessor."""

    peak: float  # of its products at the peak rate, on the matrix unit or as multiply-adds on the float32 lanes
    mma: float  # of the matrix unit, more than ``peak`` for instructions that do not reach the peak
    exp: float  # of the exponential unit (all special functions)
    fp32: float  # of the float32 lanes
    issue: float  # of the issue slots

    @property
    def limit(self) -> str:
        """Return the busiest unit."""
        return max(("mma", "exp", "fp32", "issue"), key=lambda unit: getattr(self, unit))

    @property
    def share(self) -> float:
        """Return the cycles at peak rate for each cycle of the busiest unit."""
        return self.peak / max(self.mma, self.exp, self.fp32, self.issue)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of a kernel."""

    unit: str  # of the products: "tensor", or "fp32" for products that must stay exact
    region: str  # addresses of the hottest loop, or "kernel" if the products are in straight-line code
    loop: Cycles  # of one iteration of that loop
    outside: Cycles  # of one iteration of the loop around it, or of the kernel, without the loop itself

    @property
    def share(self) -> float:
        """Return the bound, from 0 to 1, of a loop that never ends."""
        return self.loop.share

    @property
    def overhead(self) -> float:
        """Return the cycles of the busiest other unit for each cycle of the products: less is better."""
        others = (self.loop.exp, self.loop.issue, self.loop.fp32 if self.unit == "tensor" else 0.0)
        return max(others) / self.loop.peak


def bound(
    instructions: list[Instruction], arch: int, warps: int, *, multiplies: bool = True, specialised: bool = False
) -> Bound | str:
    """Compute the bound of a kernel, or return the reason why there is none.

    It is assumed that all ``warps`` of a block run the loop. Where they are ``specialised``, the code of one says
    nothing about the others. A kernel that ``multiplies`` without matrix instructions does so in the float32 lanes.
    """
    if specialised or any(instruction.name == "USETMAXREG" for instruction in instructions):
        return "warp-specialised: its warps run different code"
    try:
        graph = Graph(instructions)
    except UnknownControlFlow as error:
        return f"unknown control flow: {error}"
    has_mma = any(is_mma(instruction) for instruction in instructions)
    if not has_mma and not multiplies:
        return "no matrix product"
    return _hottest(graph, "tensor" if has_mma else "fp32", arch, warps)


def is_mma(instruction: Instruction) -> bool:
    """Return whether an instruction runs on the matrix unit (HFMA2.MMA does not)."""
    return _OTHER_MMA.match(instruction.name) is not None


def mma_kinds(instructions: list[Instruction]) -> tuple[str, ...]:
    """Return the kinds of matrix instructions in a kernel, such as "HGMMA 64x128x16 bf16", each once."""
    try:
        graph = Graph(instructions)
    except UnknownControlFlow:
        return tuple(sorted({instruction.name for instruction in instructions if is_mma(instruction)}))
    return tuple(sorted({str(mma) for mma in _products(graph, graph.order)}))


def _hottest(graph: Graph, unit: str, arch: int, warps: int) -> Bound | str:
    """Compute the bound from the innermost loop with products; of several, from the one with most work."""
    counts = is_mma if unit == "tensor" else _is_fma
    holds = {block for block in graph.order if any(map(counts, graph.blocks[block]))}
    if not holds:
        return "its products are in a subroutine, or there are none"
    kernel = Loop(frozenset(graph.order), graph.exits)
    loops = [loop for loop in graph.loops if loop.body & holds]
    found = []
    for loop in [loop for loop in loops if not any(other.body < loop.body for other in loops)] or [kernel]:
        # the loop around it is the smallest one that contains it
        around = min((o for o in loops if loop.body < o.body), key=lambda o: len(o.body), default=kernel)
        cycles = _cycles(graph, loop.body, loop.latches, unit, arch, warps)
        outside = _cycles(graph, around.body - loop.body, around.latches, unit, arch, warps)
        if isinstance(cycles, str) or isinstance(outside, str):
            return cycles if isinstance(cycles, str) else str(outside)
        found.append(Bound(unit, _region(graph, loop.body), cycles, outside))
    return max(found, key=lambda result: (result.loop.peak, result.loop.issue))


def _cycles(graph: Graph, body: frozenset[int], ends: frozenset[int], unit: str, arch: int, warps: int) -> Cycles | str:
    """Count the cycles of the blocks ``body``: all products, and other code that runs before each of ``ends``."""
    peak = busy = 0.0
    for mma in _products(graph, body):
        rate = ARCHITECTURES[arch].matrix_rate.get(mma.operand)
        if mma.shape is None or rate is None:
            return f"unknown matrix instruction: {mma}"
        share = ARCHITECTURES[arch].warp_matrix_share if mma.issuer == "warp" else 1.0
        if share is None:
            return f"no rate is published for mma.sync on sm_{arch}"
        m, n, k = mma.shape
        issuers = {"warp": warps, "warpgroup": warps / SUB_PARTITIONS, "block": 1}[mma.issuer]
        cycles = issuers * m * n * k / rate
        peak += cycles
        busy += cycles / share
    always = _always(graph, body, ends, is_mma if unit == "tensor" else _is_fma)
    lanes, fp32_rate = warps * WARP, ARCHITECTURES[arch].fp32_rate
    exp = sum(step.name == "MUFU" for step in always) * lanes / ARCHITECTURES[arch].exp_rate
    fp32 = sum(_FP32.get(step.name, 0) for step in always) * lanes / fp32_rate
    if unit == "fp32":
        peak = sum(_FP32[step.name] for step in always if _is_fma(step)) * lanes / fp32_rate
    return Cycles(peak, busy, exp, fp32, issue=len(always) * warps / SUB_PARTITIONS)


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
        return Mma(instruction.name, "warp", None, "unknown")
    if instruction.name in _WARP_MMA:
        return Mma(instruction.name, "warp", _WARP_SHAPES.get(shape_text), operand)
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape_text)
    shape = (int(match[1]), int(match[2]), int(match[3])) if match else None
    return Mma(instruction.name, "warpgroup", shape, operand)


def _tensor_memory_mma(graph: Graph, block: int, position: int) -> Mma:
    """Describe a tcgen05.mma. M, N and operand type are fields of a descriptor (PTX ISA, "Instruction descriptor").

    The descriptor is a constant in a uniform register, so search the code that certainly ran before for that constant.
    """
    instruction = graph.blocks[block][position]
    unknown = Mma(instruction.name, "block", None, "unknown")
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
    return Mma(instruction.name, "block", (m, n, {"tf32": 8, "fp8": 32}.get(operand, 16)), operand)


def _writes(instruction: Instruction, register: int) -> bool:
    """Return whether the first operand, which is the result, covers a uniform register."""
    first = re.match(r"UR(\d+)\b", instruction.operands)
    wide = {"64": 2, "WIDE": 2, "128": 4}
    width = max((wide.get(modifier, 1) for modifier in instruction.modifiers), default=1)
    return first is not None and 0 <= register - int(first[1]) < width


def _always(
    graph: Graph, body: frozenset[int], ends: frozenset[int], counts: Callable[[Instruction], bool]
) -> list[Instruction]:
    """Return the code of ``body`` that runs in every iteration, or whenever a product does."""
    products = [block for block in body if any(map(counts, graph.blocks[block]))]
    return [
        instruction
        for block in sorted(body)
        if all(graph.dominates(block, end) for end in ends)
        or (products and all(graph.dominates(block, product) for product in products))
        for instruction in graph.blocks[block]
    ]


def _is_fma(instruction: Instruction) -> bool:
    return instruction.name in ("FFMA", "FFMA2")


def _region(graph: Graph, body: frozenset[int]) -> str:
    if len(body) == len(graph.order):
        return "kernel"
    addresses = [instruction.address for block in body for instruction in graph.blocks[block]]
    return f"{min(addresses):#x}-{max(addresses):#x}"
