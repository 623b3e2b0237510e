"""The path of a program through its machine code, from the arguments of its launch.

A branch is decided by computing its condition for one thread of the first warp. If the condition depends on an unknown
value, such as one from memory, the branch is guessed: a forward branch is not taken, because it usually skips work, and
a backward branch leaves its loop. The number of guesses is part of the result. The slow paths of float
functions, which are subroutines, are not taken, nor are products of matrices that only some numbers need.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from ..sass import Instruction, target
from .arithmetic import execute
from .registers import Operand, State, following, operands, slot, written

MOST_STEPS = 5_000_000  # a longer path means an error of the model or an unsuitable kernel


class Lost(Exception):  # noqa: N818  (a finding, not a failure)
    """The error for a path through machine code that cannot be followed."""


@dataclasses.dataclass(frozen=True)
class Path:
    """The path of one program: its pieces of straight-line code, and the number of guesses.

    A piece is the index of its first instruction and the index behind its last.
    """

    pieces: tuple[tuple[int, int], ...]
    guesses: int

    @functools.cached_property
    def length(self) -> int:
        """Return the number of machine instructions along the path."""
        return sum(last - first for first, last in self.pieces)


class Code:
    """The instructions of a kernel, prepared for following paths through them."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = list(instructions)
        self.place = {one.address: index for index, one in enumerate(instructions)}
        relevant = _relevant(self.instructions)
        stops = [index for index, one in enumerate(instructions) if one.name in _CONTROL or index in relevant]
        self._relevant = relevant
        self._next = [0] * len(instructions)  # for each instruction, the next one that affects a branch
        for index in reversed(range(len(instructions))):
            while stops and len(stops) > 1 and stops[-2] >= index:
                stops.pop()
            self._next[index] = stops[-1] if stops else len(instructions)

    def follow(self, state: State) -> Path:
        """Return the path of a program whose first thread starts with ``state``.

        Raises:
            Lost: the path has an indirect branch or does not end.
        """
        pieces: list[tuple[int, int]] = []
        start = index = steps = guesses = 0
        returns: list[int] = []
        joins: dict[str, int] = {}
        while True:
            index = self._next[index]
            one = self.instructions[index]
            if one.name not in _CONTROL:
                execute(state, one)
                index += 1
                continue
            to, guessed = self._step(index, state, returns, joins)
            guesses += guessed
            if to == index + 1:
                index = to
                continue
            pieces.append((start, index + 1))
            steps += index + 1 - start
            if steps > MOST_STEPS:
                raise Lost(f"more than {MOST_STEPS} instructions: does the loop at {one.address:#x} end?")
            if to is None:
                return Path(tuple(pieces), guesses)
            start = index = to

    def _step(self, index: int, state: State, returns: list[int], joins: dict[str, int]) -> tuple[int | None, int]:
        """Return where the simulated control goes from ``index``, None at the end, and whether that is a guess."""
        one, behind = self.instructions[index], index + 1
        holds = state.holds(one.guard)
        if one.name == "EXIT":
            return (None, 0) if holds else (behind, int(holds is None))
        if one.name == "BSSY":
            joins[one.operands.split(",")[0].strip()] = self._target(one)
            return behind, 0
        if one.name == "BSYNC":
            return joins.pop(one.operands.split(",")[0].strip(), behind), 0
        if one.name == "CALL":
            if holds:
                returns.append(behind)
            return (self._target(one) if holds else behind), int(holds is None)
        if one.name == "RET":
            if not returns:
                raise Lost(f"a return at {one.address:#x} from nowhere")
            return returns.pop(), 0
        if one.name != "BRA":
            raise Lost(f"an indirect branch at {one.address:#x}")
        return self._branch(index, state, holds)

    def _branch(self, index: int, state: State, holds: bool | None) -> tuple[int | None, int]:
        """Return where a branch of machine code leads, None at the end, and whether that is a guess."""
        one, behind = self.instructions[index], index + 1
        if "DIV" in one.modifiers or "CONV" in one.modifiers:
            return behind, 0  # the branch is taken only if the threads of a warp differ
        found = operands(one.operands)
        if len(found) > 1 and found[0].is_predicate and holds:  # a predicate as an operand: BRA.U UP0, 0x40
            holds = state.predicate(found[0])
        to = self._target(one)
        if to == index:
            return None, 0  # the code ends with a branch to itself
        if holds is None:
            # Such a branch may skip a slow path for rare numbers: a subroutine, or products to be computed once more.
            is_rare = any(other.name in ("CALL", "HGMMA", "HMMA") for other in self.instructions[behind:to])
            return (to, 0) if is_rare else (behind, 1)
        return (to if holds else behind), 0

    def _target(self, one: Instruction) -> int:
        """Return the index of the instruction that a branch leads to."""
        to = self.place.get(target(one) or 0)
        if to is None:
            raise Lost(f"{one.name} at {one.address:#x} leads to {one.operands!r}")
        return to


_CONTROL = frozenset(("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "BRX", "BRXU", "JMX", "JMXU", "JMP"))


def _relevant(instructions: Sequence[Instruction]) -> frozenset[int]:
    """Return the indices of the instructions whose results a branch may depend on.

    This is an analysis of live registers in which only branches make a register live, and an instruction makes its
    operands live only if its own result is.
    """
    writes = [_names(written(one)) for one in instructions]
    reads = [_read(one) for one in instructions]
    behind = _successors(instructions)
    live: list[frozenset[str]] = [frozenset()] * len(instructions)  # before each instruction
    found: set[int] = set()
    before: dict[int, list[int]] = {index: [] for index in range(len(instructions))}
    for index, others in enumerate(behind):
        for other in others:
            before[other].append(index)
    pending = set(range(len(instructions)))
    while pending:
        index = max(pending)
        pending.discard(index)
        one = instructions[index]
        after = frozenset().union(*(live[other] for other in behind[index]))
        now = after
        if one.name in _CONTROL:
            now = after | reads[index]
        elif writes[index] & after:
            found.add(index)
            # If an instruction has a guard, its result register may also keep the old value.
            now = (after if one.guard else after - writes[index]) | reads[index]
        if now != live[index]:
            live[index] = now
            pending.update(before[index])
    return frozenset(found)


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Return the indices where control may go from each instruction."""
    place = {one.address: index for index, one in enumerate(instructions)}
    returns = [index + 1 for index, one in enumerate(instructions) if one.name == "CALL"]
    joins = [place[to] for one in instructions if one.name == "BSSY" and (to := target(one)) in place]
    found = []
    for index, one in enumerate(instructions):
        behind = [index + 1] if index + 1 < len(instructions) else []
        to = place.get(target(one) or 0)
        always = one.guard in (None, "PT", "UPT") and "," not in one.operands
        match one.name:
            case "BRA" | "CALL" if to is not None:
                found.append([to] if always else [to, *behind])
            case "EXIT":
                found.append([] if always else behind)
            case "RET":
                found.append(returns)
            case "BSYNC":
                found.append([*behind, *joins])
            case _:
                found.append(behind)
    return found


def _names(results: Sequence[tuple[Operand, int]]) -> frozenset[str]:
    """Return the names of all registers that an instruction's results cover."""
    return frozenset(
        following(operand.register, word)
        for operand, words in results
        for word in range(words)
        if operand.register[-1:].isdigit()
    )


# Instructions whose results are always unknown.
_OPAQUE = frozenset(
    ("HGMMA", "QGMMA", "HMMA", "QMMA", "LDS", "LDSM", "ATOMS", "ATOMG", "FADD", "FMUL", "FFMA", "SYNCS", "RET")
)


def _read(one: Instruction) -> frozenset[str]:
    """Return the names of the registers that an instruction reads."""
    names = {operand.register for operand in operands(one.operands)} if one.name not in _OPAQUE else set()
    names |= {operand.register for operand in operands(one.guard or "")}
    if one.name == "LDL":
        names = {slot(one).register, *names}
    if one.name == "P2R":
        mask = operands(one.operands)[-1].number
        names |= {f"P{index}" for index in range(7) if mask is None or mask >> index & 1}
    if one.name == "LDG":
        for part in one.operands.replace("[", "+").replace("]", "+").split("+"):
            names |= {operand.register for operand in operands(part.replace(".64", ""))}
    names = {name for name in names if name[-1:].isdigit()}
    wide = one.name == "LDG" or {"WIDE", "HI", "64", "U64"} & set(one.modifiers)
    return frozenset(names | {following(name, 1) for name in names if wide and "P" not in name})


def shortened(path: Path, most_turns: int) -> tuple[Path, Path, float]:
    """Return two shorter paths and a factor, from which the time of a long path is extrapolated linearly.

    If the path repeats the same pieces more than twice ``most_turns`` times in a row, the first path has them
    ``most_turns`` times and the second twice as often. The time is that of the first path, and ``factor`` times the
    difference to the second. Otherwise the factor is 0, and both are the path itself.
    """
    start, period, turns = _longest_repeat(path.pieces)
    if turns <= 2 * most_turns:
        return path, path, 0.0
    body, before = path.pieces[start : start + period], path.pieces[:start]
    after = path.pieces[start + period * turns :]
    short, double = (Path(before + body * count + after, path.guesses) for count in (most_turns, 2 * most_turns))
    return short, double, (turns - most_turns) / most_turns


def _longest_repeat(pieces: Sequence[tuple[int, int]], longest_period: int = 48) -> tuple[int, int, int]:
    """Return start, period and number of turns of the repetition in a path that spans the most pieces."""
    best, span = (0, 1, 1), 0
    places: dict[tuple[int, int], int] = {}
    index = 0
    while index < len(pieces):
        period = index - places.get(pieces[index], -longest_period - 1)
        if 0 < period <= longest_period:
            start = index - period
            end = index
            while end < len(pieces) and pieces[end] == pieces[end - period]:
                end += 1
            turns = (end - start) // period
            if turns * period > span and turns > 1:
                best, span = (start, period, turns), turns * period
            if turns > 1:
                places.clear()
                index = end
                continue
        places[pieces[index]] = index
        index += 1
    return best


def sample(programs: int, most: int) -> list[int]:
    """Return numbers of programs to simulate, spread over a grid: the first among them, and at most ``most``."""
    if programs <= most:
        return list(range(programs))
    # Multiples of the golden ratio are spread over the whole grid, and do not follow any of its periods.
    return sorted({int(programs * (n * 0.6180339887498949 % 1)) for n in range(most)})


def kinds(paths: Mapping[int, Path], most: int) -> list[tuple[Path, list[int]]]:
    """Return the different paths of programs, the most frequent first, each with the numbers of its programs.

    If there are more than ``most``, the programs of a rare path count for the frequent path of the nearest length.
    """
    places: dict[Path, list[int]] = {}
    for place, path in paths.items():
        places.setdefault(path, []).append(place)
    ordered = sorted(places, key=lambda path: (-len(places[path]), path.length))
    kept = ordered[:most]
    for path in ordered[most:]:
        places[min(kept, key=lambda other: abs(other.length - path.length))] += places[path]
    return [(path, places[path]) for path in kept]
