"""A compiled kernel in the form that the model of the GPU simulates."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from ..offline import disassemble, occupancy_of, resources, threads
from ..sass import Instruction, parse
from .machine import WARP
from .paths import Code, Path
from .steps import PRODUCTS, Kind, Step, decode, product, shared_bytes, tma_loads

ARCH = 90  # the compute capability that is modelled


class NoModel(ValueError):  # noqa: N818  (a finding, not a failure)
    """The error for a kernel that the model of the GPU does not cover."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel: its code, and the number of its programs that share a multiprocessor.

    Attributes:
        name: the name of the Triton function.
        code: the machine code.
        ptx: the PTX that the machine code was assembled from.
        ttir: Triton's first intermediate code.
        warps: the number of warps of a program.
        at_once: the number of programs that fit on a multiprocessor.
        names: the names of the arguments that are not constants, in order.
    """

    name: str
    code: Code
    ptx: str
    ttir: str
    warps: int
    at_once: int
    names: tuple[str, ...]

    @property
    def instructions(self) -> list[Instruction]:
        """Return the machine code of the compiled kernel."""
        return self.code.instructions

    def steps(self, path: Path) -> list[Step]:
        """Return the decoded instructions that one warp runs along a path."""
        decoded = self._decoded(self._staged(path))
        return [step for first, last in path.pieces for step in decoded[first:last]]

    def flops(self, path: Path) -> float:
        """Return the FLOPs of the matrix unit in one program that takes a path."""
        return self.warps * sum(product(one)[2] for one in self.along(path) if one.name in PRODUCTS)

    def requested_bytes(self, path: Path) -> float:
        """Return the bytes that one program asks L2 for along a path."""
        total = 0.0
        for step in self.steps(path):
            if step.kind in (Kind.LOAD, Kind.STORE, Kind.COPY):
                total += step.amount * self.warps
            elif step.kind in (Kind.TMA_LOAD, Kind.TMA_STORE):
                total += step.amount
        return total

    def along(self, path: Path) -> list[Instruction]:
        """Return the machine instructions along a path."""
        return [one for first, last in path.pieces for one in self.instructions[first:last]]

    def _staged(self, path: Path) -> float:
        """Return the bytes of one TMA store: the bytes that all warps wrote to shared memory, over the number of
        stores.
        """
        staged, stores = 0.0, 0
        for one in self.along(path):
            if one.name in ("UTMASTG", "UTMAREDG"):
                stores += 1
            elif one.name in ("STS", "STSM"):
                staged += shared_bytes(one)
        return staged * self.warps / stores if stores else 0.0

    @functools.lru_cache(maxsize=8)  # noqa: B019  (a kernel lives as long as its cache)
    def _decoded(self, staged: float) -> Sequence[Step]:
        """Decode all instructions of the kernel for the simulation."""
        loads = sum(one.name == "UTMALDG" for one in self.instructions)
        sizes = tma_loads(self.ptx)
        if len(sizes) != loads:
            sizes = [sum(sizes) / max(1, len(sizes))] * loads
        boxes = iter(sizes)
        return [decode(one, next(boxes) if one.name == "UTMALDG" else staged) for one in self.instructions]


def load(compiled: Any) -> Kernel:
    """Return a kernel for the model, from a kernel that Triton compiled for compute capability 9.0.

    Raises:
        NoModel: it was compiled for another architecture, or its warps run different code.
    """
    arch = compiled.metadata.target.arch
    if arch != ARCH:
        raise NoModel(f"the model is of sm_{ARCH}, and the kernel is for sm_{arch}")
    instructions = parse(disassemble(compiled))
    if "ttg.warp_specialize" in compiled.asm["ttgir"] or any(one.name == "USETMAXREG" for one in instructions):
        raise NoModel("its warps run different code")
    fits, warps = occupancy_of(compiled, resources(compiled)), threads(compiled) // WARP
    names = tuple(name for name, kind in compiled.src.signature.items() if kind != "constexpr")
    if fits.blocks == 0:
        raise NoModel("a program does not fit on a multiprocessor")
    ptx, ttir = compiled.asm["ptx"], compiled.asm.get("ttir", "")  # kernels in Gluon have no TTIR
    return Kernel(compiled.metadata.name, Code(instructions), ptx, ttir, warps, fits.blocks, names)
