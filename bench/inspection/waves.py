"""Waves: how often the multiprocessors of a GPU must be filled to run the programs of an op, and how full they are."""

import dataclasses
import math
from collections import defaultdict

from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import Launch
from clipfast.kernels.spec import OpSpec, Shape

from . import offline
from .workloads import op_work

ARCH = 90


@dataclasses.dataclass(frozen=True)
class Waves:
    """All launches of one kernel in the forward and the backward pass of an op.

    Attributes:
        launches: their number.
        programs: the programs of all of them.
        at_once: programs that run at once, by occupancy and the number of multiprocessors.
        waves: times that the GPU is filled, launch by launch; the last wave of a launch takes as long as any other.
        filled: percent of the places in those waves that hold a program.
    """

    launches: int
    programs: int
    at_once: int
    waves: int
    filled: int

    @classmethod
    def of(cls, programs: list[int], at_once: int) -> "Waves":
        """Count the waves of launches with these numbers of programs."""
        waves = sum(-(-number // at_once) for number in programs)
        return cls(len(programs), sum(programs), at_once, waves, 100 * sum(programs) // (waves * at_once))


def waves_of(spec: OpSpec, shape: Shape, dtype: str = "bf16", arch: int = ARCH) -> dict[str, Waves]:
    """Return the waves of each kernel that an op launches at a shape on the card of ``arch`` in the hardware table.

    A kernel that is compiled in several ways has an entry for each number of its blocks that fit on a multiprocessor.
    """
    launches = [launch for _, launch in op_work(spec, shape, dtype, arch).launches]
    blocks = {offline.identity(launch): _blocks(launch, arch) for launch in offline.distinct(launches)}
    programs: dict[tuple[str, int], list[int]] = defaultdict(list)
    for launch in launches:
        programs[launch.kernel.__name__, blocks[offline.identity(launch)]].append(math.prod(launch.grid))
    found: dict[str, Waves] = {}
    for (name, fitting), numbers in programs.items():
        key = f"{name} {sum(other.split()[0] == name for other in found)}"
        found[key] = Waves.of(numbers, fitting * ARCHITECTURES[arch].multiprocessors)
    return found


def _blocks(launch: Launch, arch: int) -> int:
    """Return how many blocks of a launch fit on a multiprocessor."""
    kernel = offline.compile_kernel(launch, arch)
    return offline.occupancy_of(kernel, offline.resources(kernel, copies=False)).blocks
