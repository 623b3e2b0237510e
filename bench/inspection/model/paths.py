"""The path of a program through its machine code, from the arguments of its launch.

A branch is decided by computing its condition for one thread of the first warp. If the condition depends on an unknown
value, such as one from memory, the branch is guessed: a forward branch is not taken, because it usually skips work, and
a backward branch leaves its loop. The number of guesses is part of the result. The slow paths of float
functions, which are subroutines, are not taken, nor is code with matrix products that only rare values need.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..sass import Instruction, target
from .arithmetic import execute
from .registers import Operand, State, following, operands, slot, written

MOST_STEPS = 5_000_000  # a longer path means an error of the model or an unsuitable kernel


class NoPath(Exception):  # noqa: N818  (a finding, not a failure)
    """The error for a path through machine code that cannot be followed."""


@dataclasses.dataclass(frozen=True)
class Path:
    """The path of one program: its pieces of straight-line code, and the number of guesses.

    A piece is the index of its first instruction and the index after its last.
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
            NoPath: the path has an indirect branch or does not end.
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
                raise NoPath(f"more than {MOST_STEPS} instructions: does the loop at {one.address:#x} end?")
            if to is None:
                return Path(tuple(pieces), guesses)
            start = index = to

    def _step(self, index: int, state: State, returns: list[int], joins: dict[str, int]) -> tuple[int | None, int]:
        """Return the index of the instruction that runs after ``index``, None at the end, and whether it is a guess."""
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
                raise NoPath(f"a return at {one.address:#x} without a call")
            return returns.pop(), 0
        if one.name != "BRA":
            raise NoPath(f"an indirect branch at {one.address:#x}")
        return self._branch(index, state, holds)

    def _branch(self, index: int, state: State, holds: bool | None) -> tuple[int | None, int]:
        """Return the index to which a branch of machine code leads, None at the end, and whether it is a guess."""
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
            # A branch on an unknown value may skip a slow path for rare numbers: a subroutine, or products that are
            # computed once more.
            is_rare = any(other.name in ("CALL", "HGMMA", "HMMA") for other in self.instructions[behind:to])
            return (to, 0) if is_rare else (behind, 1)
        return (to if holds else behind), 0

    def _target(self, one: Instruction) -> int:
        """Return the index of the instruction that a branch leads to."""
        to = self.place.get(target(one) or 0)
        if to is None:
            raise NoPath(f"{one.name} at {one.address:#x} leads to {one.operands!r}")
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
    """Return for each machine instruction the indices of the instructions that may run next."""
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


class _Loop(NamedTuple):
    """A part of a path that is repeated: its pieces, among them other loops, and the number of turns."""

    body: tuple[Any, ...]
    turns: int


def shortened(path: Path, most_turns: int) -> list[tuple[Path, float]]:
    """Return short paths with weights, by which their times sum to the time of a long path.

    The time of a path is taken to be linear in the turns of each of its loops. A loop of more than twice
    ``most_turns`` turns is therefore run ``most_turns`` times and twice as often, and the time is extrapolated from the
    two. For a loop that contains such a loop, 2 and 4 turns are enough. At most the two longest loops are shortened.
    """
    items = _grouped(path.pieces)
    found: dict[tuple[Any, ...], list[int]] = {}
    _long_loops(items, most_turns, found)
    longest = sorted(found, key=lambda body: -len(_unrolled(body, {})) * sum(found[body]))[:2]
    ways: list[tuple[dict[tuple[Any, ...], int], float]] = [({}, 1.0)]
    for body in longest:
        few = _few(body, most_turns)
        factor = sum(turns / few - 1 for turns in found[body]) / len(found[body])
        ways = [
            (counts | {body: few * times}, weight * share)
            for counts, weight in ways
            for times, share in ((1, 1 - factor), (2, factor))
        ]
    return [(Path(_unrolled(items, counts), path.guesses), weight) for counts, weight in ways]


def _few(body: tuple[Any, ...], most_turns: int) -> int:
    """Return the smaller of the two numbers of turns with which a long loop with this body is run."""
    has_long_loop = any(isinstance(item, _Loop) and item.turns > 2 * most_turns for item in body)
    return 2 if has_long_loop else most_turns


def _long_loops(items: Sequence[Any], most_turns: int, found: dict[tuple[Any, ...], list[int]]) -> None:
    """Collect the turns of the loops that are worth shortening, by their body."""
    for item in items:
        if isinstance(item, _Loop):
            if item.turns > 2 * _few(item.body, most_turns):
                found.setdefault(item.body, []).append(item.turns)
            _long_loops(item.body, most_turns, found)


def _unrolled(items: Sequence[Any], counts: Mapping[tuple[Any, ...], int]) -> tuple[tuple[int, int], ...]:
    """Return the pieces of a path, in which a loop has at most the turns that ``counts`` has for its body, if any."""
    pieces: list[tuple[int, int]] = []
    for item in items:
        if isinstance(item, _Loop):
            pieces += _unrolled(item.body, counts) * min(item.turns, counts.get(item.body, item.turns))
        else:
            pieces.append(item)
    return tuple(pieces)


def _grouped(items: Sequence[Any], longest_period: int = 48) -> tuple[Any, ...]:
    """Return the pieces of a path, in which repeated pieces are replaced by loops; inner loops are found first."""
    made: list[Any] = []
    places: dict[Any, int] = {}
    index = 0
    while index < len(items):
        period = index - places.get(items[index], -longest_period - 1)
        if 0 < period <= longest_period:
            end = index
            while end < len(items) and items[end] == items[end - period]:
                end += 1
            if turns := (end - index) // period:
                body = tuple(made[-period:])
                made[-period:] = [_Loop(body, turns + 1)]
                index += turns * period
                places.clear()
                continue
        places[items[index]] = index
        made.append(items[index])
        index += 1
    return tuple(made) if len(made) == len(items) else _grouped(made, longest_period)


def sample(programs: int, most: int) -> list[int]:
    """Return numbers of programs to simulate, spread over a grid: the first among them, and at most ``most``."""
    if programs <= most:
        return list(range(programs))
    # Multiples of the golden ratio are spread over the whole grid, and do not follow any of its periods.
    return sorted({int(programs * (n * 0.6180339887498949 % 1)) for n in range(most)})


def kinds(paths: Mapping[int, Path], most: int) -> list[tuple[Path, list[int]]]:
    """Return the different paths of programs, the most frequent first, each with the numbers of its programs.

    If there are more than ``most``, as in causal attention, the programs are divided by the length of their path into
    ``most`` groups with the same sum of lengths, and each group takes the one of its paths that is nearest to its mean.
    """
    places: dict[Path, list[int]] = {}
    for place, path in paths.items():
        places.setdefault(path, []).append(place)
    if len(places) > most:
        by_length = sorted(paths, key=lambda number: (paths[number].length, number))
        total, before = sum(path.length for path in paths.values()), 0
        groups: list[list[int]] = [[] for _ in range(most)]
        for number in by_length:
            groups[min(most - 1, before * most // total)].append(number)
            before += paths[number].length
        places = {}
        for group in filter(None, groups):
            mean = sum(paths[number].length for number in group) / len(group)
            path = min((paths[number] for number in group), key=lambda one: abs(one.length - mean))
            places.setdefault(path, []).extend(group)
    return sorted(places.items(), key=lambda item: (-len(item[1]), item[0].length))
