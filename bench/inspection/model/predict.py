"""The predicted time of a launch: its programs are simulated on one multiprocessor, and the result is scaled to all."""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clipfast.kernels.launch import Launch

from ..offline import compile_kernel
from .arguments import bank
from .kernel import ARCH, Kernel, NoModel, load
from .machine import Machine
from .multiprocessor import run
from .paths import NoPath, Path, kinds, sample, shortened
from .traffic import moved_bytes

# A kernel runs at the highest clock if its FLOP/s are below this fraction of the rate that the power limit allows.
BOOST_BELOW = 0.25
# Programs of one kind are simulated on the same path through the machine code. If the kind changes at most this often
# along a grid, the exact places of the changes are searched for.
MOST_SEARCHED = 8
_OF_MULTIPROCESSOR = ("shared", "l2", "hbm", "operands")  # each of its four sub-partitions has all other units


class Effort(NamedTuple):
    """The limits on how much is simulated for a prediction.

    Attributes:
        steps: the most instructions of all warps in a simulation of several rounds.
        turns: a loop of more than twice this many iterations is simulated with this number and twice this number; its
            time is extrapolated linearly from the two.
        programs: the number of programs of a grid whose paths are followed.
        kinds: the number of different paths that are simulated.
    """

    steps: int
    turns: int
    programs: int
    kinds: int


FULL = Effort(steps=1_000_000, turns=20, programs=48, kinds=4)
QUICK = Effort(steps=150_000, turns=6, programs=12, kinds=4)  # for a table of many kernels


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch, and the numbers that it is computed from.

    Attributes:
        seconds: the time on the device, with the overhead of a launch.
        at_once: the number of programs that run on a multiprocessor at once.
        waves: the number of programs divided by the number that runs at once on all multiprocessors.
        cycles: cycles per program on a multiprocessor that is full of programs.
        busy: cycles per program for which each unit is busy; a unit of the sub-partitions is counted in one of them.
        flops: the FLOPs of the matrix unit in all programs, padding included.
        guesses: the number of branches of a path whose conditions the model does not know.
        limit: the busiest unit, and the part of the time for which it is busy; or "power".
    """

    seconds: float
    at_once: int
    waves: float
    cycles: float
    busy: Mapping[str, float]
    flops: float
    guesses: int
    limit: str


def predict(
    kernel: Kernel, grid: Sequence[int], arguments: Mapping[str, Any], machine: Machine,
    *, hbm_bytes: float | None = None, effort: Effort = FULL,
) -> Prediction:  # fmt: skip
    """Predict the time of one launch.

    Args:
        kernel: the compiled kernel.
        grid: the number of programs along each axis.
        arguments: the arguments of the launch by name. Only sizes and dtypes of tensors matter, and the values of
            integer tensors.
        machine: rates and latencies.
        hbm_bytes: the bytes that all programs together move from and to device memory; by default each tensor once.
        effort: the limits on how much is simulated.

    Raises:
        NoModel: the path of its programs cannot be followed.
    """
    moved = moved_bytes(kernel.ttir, arguments) if hbm_bytes is None else hbm_bytes
    launch = _Grid(kernel, grid, arguments, moved, effort)
    found = launch.predict(machine)
    if found.flops / found.seconds > BOOST_BELOW * machine.power_flops:
        return found
    return launch.predict(dataclasses.replace(machine, clock=machine.boost))


def predict_launch(launch: Launch, machine: Machine, effort: Effort = FULL) -> Prediction:
    """Compile a recorded launch and predict it; raise :class:`NoModel` where the model does not cover it."""
    return predict(load(compile_kernel(launch, ARCH)), launch.grid, launch.args, machine, effort=effort)


def _follower(kernel: Kernel, grid: Sequence[int], arguments: Mapping[str, Any]) -> Callable[[int], Path]:
    """Return the function that follows the path of a program of a launch, given the program's number."""
    start = bank(kernel.ptx, grid, kernel.warps, [(name, arguments[name]) for name in kernel.names])
    x, y, _ = (*grid, 1, 1)[:3]

    def path_of(number: int) -> Path:
        """Return the path of a program in the machine code, given its number."""
        try:
            return kernel.code.follow(start.state((number % x, number // x % y, number // (x * y))))
        except NoPath as error:
            raise NoModel(str(error)) from None

    return path_of


def runs(known: Mapping[int, int], kind_of: Callable[[int], int | None]) -> list[tuple[int, int]]:
    """Return the first program, and the kind, of each series of neighbouring programs of a grid that are of one kind.

    If the kind changes rarely along the grid, the exact places of the changes are searched for. Otherwise, a program of
    unknown kind is assumed to be like the last program before it whose kind is known.

    Args:
        known: kind by number of program, for some of them, the first among them.
        kind_of: finds the kind of any program, or None.
    """
    changes = [pair for pair in itertools.pairwise(sorted(known)) if known[pair[0]] != known[pair[1]]]
    found = [(0, known[0])]
    for low, high in changes:
        before, after = known[low], known[high]
        while high - low > 1 and len(changes) <= MOST_SEARCHED:
            middle = (low + high) // 2
            low, high = (middle, high) if kind_of(middle) == before else (low, middle)
        found.append((high, after))
    return found


@dataclasses.dataclass(frozen=True)
class _Timed:
    """The simulated cycles of programs of one kind, and the work of one of them."""

    ramp: float  # cycles until the first blocks end
    cycles: float
    flops: float
    busy: Mapping[str, float]


def _sum(parts: Sequence[tuple[_Timed, float]]) -> _Timed:
    """Return the weighted sum of the simulated times of several kinds of programs."""

    def total(name: str) -> float:
        """Return the weighted sum of one field of the simulated times."""
        return sum(weight * getattr(part, name) for part, weight in parts)

    units = {unit for part, _ in parts for unit in part.busy}
    busy = {unit: sum(weight * part.busy.get(unit, 0.0) for part, weight in parts) for unit in units}
    return _Timed(total("ramp"), total("cycles"), total("flops"), busy)


class _Grid:
    """The programs of a launch, grouped by the path that they take."""

    def __init__(
        self, kernel: Kernel, grid: Sequence[int], arguments: Mapping[str, Any], hbm_bytes: float, effort: Effort
    ) -> None:
        self.kernel, self.effort, self.programs = kernel, effort, math.prod(grid)
        path_of = _follower(kernel, grid, arguments)
        row = grid[0] if self._rows_are_alike(path_of, grid[0]) else self.programs
        paths = {number: path_of(number) for number in sample(row, effort.programs)}
        self.guesses = max(path.guesses for path in paths.values())
        found = kinds(paths, effort.kinds)
        self.kinds = [path for path, _ in found]
        kind_of = {number: kind for kind, (_, numbers) in enumerate(found) for number in numbers}
        of_paths = {path: kind_of[number] for number, path in paths.items()}
        in_row = runs(kind_of, lambda number: of_paths.get(path_of(number)))
        self.runs = [(start + place, kind) for start in range(0, self.programs, row) for place, kind in in_row]
        counts = [0] * len(self.kinds)
        for kind, start, end in self._spans():
            counts[kind] += end - start
        self.shares = [count / self.programs for count in counts]
        requested = sum(
            share * kernel.requested_bytes(path) for share, path in zip(self.shares, self.kinds, strict=True)
        )
        self.hbm_share = min(1.0, hbm_bytes / max(1.0, self.programs * requested))

    def _rows_are_alike(self, path_of: Callable[[int], Path], row: int) -> bool:
        """Return whether each row of programs along the grid's first axis takes the same paths as the first row.

        Only the middle and the last program of the grid are compared.
        """
        return all(path_of(number) == path_of(number % row) for number in (self.programs - 1, self.programs // 2))

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield kind, first program and end of each series of neighbouring programs of one kind."""
        for (start, kind), (end, _) in itertools.pairwise([*self.runs, (self.programs, 0)]):
            yield kind, start, end

    def predict(self, machine: Machine) -> Prediction:
        """Return the predicted time of the whole launch of a kernel."""
        timed = [self._time(path, machine) for path in self.kinds]
        mean = _sum(list(zip(timed, self.shares, strict=True)))
        fits = self.kernel.at_once
        busiest = -(-self.programs // machine.multiprocessors)  # the most programs that one multiprocessor runs
        work = busiest * mean.cycles if len(timed) == 1 else self._longest([one.cycles for one in timed], machine)
        # The first programs of a multiprocessor start together, so no other program runs while they wait.
        cycles = work + mean.ramp - min(fits, busiest) * mean.cycles
        seconds, flops = cycles / machine.clock, mean.flops * self.programs
        by_power, unit = flops / machine.power_flops, max(mean.busy, key=mean.busy.__getitem__)
        limit = "power" if by_power > seconds else f"{unit} {min(1.0, mean.busy[unit] / mean.cycles):.0%}"
        return Prediction(
            seconds=max(seconds, by_power) + machine.launch, at_once=fits,
            waves=self.programs / machine.multiprocessors / fits, cycles=mean.cycles, busy=mean.busy, flops=flops,
            guesses=self.guesses, limit=limit,
        )  # fmt: skip

    def _longest(self, cycles: Sequence[float], machine: Machine) -> float:
        """Return the cycles of the multiprocessor with the most work, if each takes the next program when it is
        free.
        """
        loads = [0.0] * machine.multiprocessors
        for kind, start, end in self._spans():
            for _ in range(start, end):
                heapq.heapreplace(loads, loads[0] + cycles[kind])
        return max(loads)

    def _time(self, path: Path, machine: Machine) -> _Timed:
        """Return the simulated cycles of programs that take ``path``; long loops are extrapolated."""
        parts = shortened(path, self.effort.turns)
        return _sum([(self._run(short, machine), weight) for short, weight in parts])

    def _run(self, path: Path, machine: Machine) -> _Timed:
        """Simulate a program alone, and then as many rounds of programs as ``effort`` allows.

        Several rounds are needed, because blocks start at the same time and then drift apart.
        """
        kernel, steps = self.kernel, self.kernel.steps(path)
        busiest = -(-self.programs // machine.multiprocessors)
        places = min(kernel.at_once, busiest)
        times = functools.partial(run, steps, kernel.warps, machine=machine, hbm_share=self.hbm_share)
        alone = times()
        busy = {unit: used / (1 if unit in _OF_MULTIPROCESSOR else 4) for unit, used in alone.busy.items()}
        first = alone if places == 1 else times(blocks=places)
        cycles = first.cycles / places
        if busiest > places:
            affordable = int(self.effort.steps / (len(steps) * kernel.warps * places))
            rounds = min(max(3, min(9, affordable)), -(-busiest // places))
            last = times(blocks=places, rounds=rounds)
            cycles = (last.cycles - first.cycles) / (rounds - 1) / places
        return _Timed(first.cycles, cycles, kernel.flops(path), busy)
