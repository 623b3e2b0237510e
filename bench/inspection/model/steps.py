"""Instructions as the simulated multiprocessor sees them: the unit that each uses, for how long, and the moved
bytes.
"""

import enum
import re
from typing import NamedTuple

from ..sass import Instruction
from .machine import WARP

# Cycles that one warp instruction occupies its pipe of a sub-partition: 32 lanes over the lanes of the pipe (CUDA C++
# programming guide, "Throughput of native arithmetic instructions", compute capability 9.0).
PIPES = {
    "alu": (
        2,
        "ISETP SEL LOP3 SHF PRMT FMNMX FSETP FSEL VIADD IADD3 LEA MOV PLOP3 IABS VIMNMX R2UR P2R R2P FCHK CS2R"
        " F2FP LOP IMNMX POPC BREV FLO I2FP SGXT VOTE",
    ),
    "fma": (1, "FFMA FADD FMUL HFMA2 HADD2 HMUL2"),
    "imad": (2, "IMAD"),  # only half of the lanes for multiply-adds can multiply integers
    "special": (8, "MUFU I2F F2F F2I FRND"),
}
_PIPE = {name: (pipe, float(cycles)) for pipe, (cycles, names) in PIPES.items() for name in names.split()}
UNIFORM = "uniform"
_UNIFORM_CYCLES = 2.0
_SPECIAL_LATENCY, _SHARED_LATENCY, _STORE_LATENCY, _CONSTANT_LATENCY, _REGISTER_LATENCY = 24, 30, 12, 30, 40
_LINE = 128  # bytes of shared memory that one access moves at least
# mma.sync reaches two thirds of the rate of wgmma on Hopper: arXiv:2402.13499 measured 63%.
_WARP_PRODUCT = 1.5
# The sizes of mma.sync by the first modifier of its instruction.
_WARP_SHAPES = {"1688": (16, 8, 8), "1684": (16, 8, 4), "16816": (16, 8, 16), "16832": (16, 8, 32)}
PRODUCTS = ("HGMMA", "QGMMA", "HMMA", "QMMA")


class Kind(enum.IntEnum):
    """The kinds of instructions, by the effect that they have in addition to occupying a pipe."""

    PLAIN = 0
    SHARED = 1  # moves data of shared memory, or between lanes
    LOAD = 2
    STORE = 3
    COPY = 4  # copies by cp.async
    COPY_COMMIT = 5
    COPY_WAIT = 6
    PRODUCT = 7
    PRODUCT_WAIT = 8
    TMA_LOAD = 9
    TMA_STORE = 10
    EXPECT = 11  # tells a barrier how many bytes TMA will load
    ARRIVAL = 12  # waits for a barrier of a TMA load
    BARRIER = 13  # waits for the other warps of the block
    FENCE = 14  # waits until earlier accesses to memory are visible to other units


class Step(NamedTuple):
    """One instruction of a warp.

    Attributes:
        kind: the kind of the instruction.
        pipe: the pipe of the sub-partition that it occupies, or None.
        cycles: the cycles for which it occupies the pipe; for a product, the cycles of the matrix unit.
        latency: cycles until its result is available; for a product, 1 if it ends a group.
        amount: bytes that it moves; for a wait, the groups that may stay open.
        stall: cycles until the warp may issue again.
        write: scoreboard that its result sets, or NO_SCOREBOARD.
        read: scoreboard that is set when it has read its operands, or NO_SCOREBOARD.
        wait: scoreboards that it waits for.
    """

    kind: Kind
    pipe: str | None
    cycles: float
    latency: float
    amount: float
    stall: int
    write: int
    read: int
    wait: tuple[int, ...]


def lane_bytes(one: Instruction) -> int:
    """Return the bytes that each lane of a machine instruction loads or stores."""
    modifiers = one.modifiers
    for names, size in ((("128",), 16), (("64",), 8), (("U16", "S16"), 2), (("U8", "S8"), 1)):
        if any(name in modifiers for name in names):
            return size
    return 4


def product(one: Instruction) -> tuple[float, float, float]:
    """Return, for one warp and one matrix instruction, cycles of the matrix unit, bytes of shared memory, and FLOPs.

    A wgmma of 64 x N x 32 bytes takes N / 2 cycles. It reads B from shared memory, 32 N bytes, and A, 2,048 bytes,
    unless A is in registers; the four warps of its group share the reads.
    """
    if one.name in ("HGMMA", "QGMMA"):
        m, n, k = (int(size) for size in one.modifiers[0].split("x"))
        in_registers = re.match(r"R\d+, R\d+, gdesc", one.operands) is not None
        return n / 2, ((0 if in_registers else 2048) + 32 * n) / 4, 2 * m * n * k / 4
    m, n, k = _WARP_SHAPES.get(one.modifiers[0], (16, 8, 16))
    flops = 2 * m * n * k
    return flops / 1024 * _WARP_PRODUCT, 0, flops


def decode(one: Instruction, box: float) -> Step:
    """Decode one instruction for the simulation; ``box`` is the number of bytes that it moves if it uses TMA."""
    name = one.name
    pipe, cycles = _PIPE.get(name, (None, 1.0))
    if pipe is None and name[0] == "U" and not name.startswith("UTMA") and name != "USETMAXREG":
        pipe, cycles = UNIFORM, _UNIFORM_CYCLES
    kind, latency, amount = Kind.PLAIN, 0.0, 0.0
    if pipe == "special":
        latency = cycles + _SPECIAL_LATENCY
    elif name in ("LDC", "ULDC", "LDCU"):
        latency = _CONSTANT_LATENCY
    elif name in ("S2R", "S2UR"):
        latency = _REGISTER_LATENCY
    elif name in PRODUCTS:
        kind, latency = Kind.PRODUCT, float("gsb0" in one.operands)
        cycles, amount, _ = product(one)
    elif pipe is None:
        kind, latency, amount = _memory(one, box)
    control = one.control
    return Step(kind, pipe, cycles, latency, amount, max(1, control.stall), control.write, control.read, control.wait)


# The kind of each instruction that moves data to or from global memory.
_MOVES = {
    "LDG": Kind.LOAD, "LD": Kind.LOAD, "STG": Kind.STORE, "ST": Kind.STORE, "RED": Kind.STORE, "ATOMG": Kind.STORE,
    "LDGSTS": Kind.COPY, "UTMALDG": Kind.TMA_LOAD, "UTMASTG": Kind.TMA_STORE, "UTMAREDG": Kind.TMA_STORE,
}  # fmt: skip
# The kind of each instruction for barriers, fences, and groups of copies or products, by its name and a part of its
# opcode.
_WAITS = {
    ("SYNCS", "ARRIVE"): Kind.EXPECT, ("SYNCS", "TRYWAIT"): Kind.ARRIVAL, ("BAR", "SYNC"): Kind.BARRIER,
    ("MEMBAR", ""): Kind.FENCE, ("FENCE", ""): Kind.FENCE, ("LDGDEPBAR", ""): Kind.COPY_COMMIT,
    ("WARPGROUP", "DEPBAR"): Kind.PRODUCT_WAIT, ("DEPBAR", ""): Kind.COPY_WAIT,
}  # fmt: skip


def _memory(one: Instruction, box: float) -> tuple[Kind, float, float]:
    """Return kind, latency and amount of an instruction that moves data or waits for data."""
    name, moved = one.name, float(WARP * lane_bytes(one))
    if name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        return Kind.SHARED, _SHARED_LATENCY if name[0] == "L" else _STORE_LATENCY, max(_LINE, shared_bytes(one))
    if name == "SHFL":  # takes the pipe of shared memory: one warp instruction per cycle and multiprocessor
        return Kind.SHARED, _SHARED_LATENCY - 6, _LINE
    if name in ("LDL", "STL"):  # spilled registers stay in the L1 cache, which shares its memory with shared memory
        return Kind.SHARED, _SHARED_LATENCY, moved
    if name in _MOVES:
        return _MOVES[name], 0.0, box if name.startswith("UTMA") else moved
    kind = next((kind for (of, part), kind in _WAITS.items() if name == of and part in one.opcode), Kind.PLAIN)
    left = re.search(r"(?:gsb0|SB0), 0x([0-9a-f]+)", one.operands)
    if kind in (Kind.PRODUCT_WAIT, Kind.COPY_WAIT):
        return (kind, 0.0, float(int(left[1], 16))) if left else (Kind.PLAIN, 0.0, 0.0)
    return kind, 0.0, 0.0


def shared_bytes(one: Instruction) -> float:
    """Return the bytes that a warp's instruction moves to or from shared memory."""
    matrices = re.search(r"\.(\d)$", one.opcode) if one.name in ("LDSM", "STSM") else None
    return _LINE * float(matrices[1]) if matrices else float(WARP * lane_bytes(one))


def tma_loads(ptx: str) -> list[float]:
    """Return the bytes of each TMA load in the PTX: the bytes that its barrier expects, over the number of its
    loads.
    """
    sizes: list[tuple[float, int]] = []
    for line in ptx.splitlines():
        if expected := re.search(r"expect_tx\S*\s+_,\s*\[[^]]*\],\s*(\d+)", line):
            sizes.append((float(expected[1]), 0))
        elif sizes and re.search(r"cp\.async\.bulk\.tensor\S*shared::(cta|cluster)\.global", line):
            sizes[-1] = sizes[-1][0], sizes[-1][1] + 1
    return [total / count for total, count in sizes for _ in range(count)]
