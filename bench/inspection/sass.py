"""Machine code as the disassembler prints it: instructions with their control codes, and basic blocks."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

_FUNCTION = re.compile(r"\s*Function : (\S+)")
# The disassembler of Triton 3.6 adds notes for sm_120, such as "&req={2} ?trans2", which the control code says too.
_LINE = re.compile(r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*?)(?:\s+[&?][^;]*)?\s*;")
_CODE = re.compile(r"\s*/\* 0x(?P<code>[0-9a-f]{16}) \*/")  # the second half of an instruction, on the line below it
_TEXT = re.compile(r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z]\w*(?:\.\w+)*)\s*(?P<operands>.*)")
_ENDS = ("EXIT", "RET", "KILL")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU", "JMP")


NO_SCOREBOARD = 7


@dataclasses.dataclass(frozen=True)
class Control:
    """What the assembler tells the scheduler about an instruction: bits 105 to 125 of it, since Volta.

    Attributes:
        stall: cycles until the warp may issue its next instruction.
        write: the scoreboard that is free again when the result has been written, or NO_SCOREBOARD.
        read: the scoreboard that is free again when the operands have been read, or NO_SCOREBOARD.
        wait: the scoreboards that must be free before the instruction is issued.
    """

    stall: int = 1
    write: int = NO_SCOREBOARD
    read: int = NO_SCOREBOARD
    wait: tuple[int, ...] = ()

    @classmethod
    def decode(cls, code: int) -> "Control":
        """Read the control code from the second 64 bits of an instruction."""
        bits = code >> 41
        return cls(bits & 15, bits >> 5 & 7, bits >> 8 & 7, tuple(n for n in range(6) if bits >> 11 + n & 1))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, guard predicate (None: always), opcode with modifiers, operands."""

    address: int
    guard: str | None
    opcode: str
    operands: str
    control: Control = Control()

    @functools.cached_property
    def name(self) -> str:
        """Return the opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """Return the modifiers behind the opcode's name."""
        return self.opcode.split(".")[1:]


class UnknownControlFlow(Exception):  # noqa: N818  (a finding, not a failure)
    """A branch whose target is not in the text."""


def parse(text: str) -> list[Instruction]:
    """Read the instructions of the first function in the output of ``cuobjdump -sass``.

    Raises:
        ValueError: the text has no instruction, or one that cannot be read.
    """
    found: list[Instruction] = []
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if found and _FUNCTION.match(line):
            break
        if match := _LINE.match(line):
            parts, code = _TEXT.match(match["text"]), _CODE.match(below)
            if parts is None:
                raise ValueError(f"cannot read the instruction {match['text']!r}")
            control = Control.decode(int(code["code"], 16)) if code else Control()
            address = int(match["address"], 16)
            found.append(Instruction(address, parts["guard"], parts["opcode"], parts["operands"], control))
    if not found:
        raise ValueError("no instructions in the disassembly")
    return found


class Graph:
    """Basic blocks that can be reached from the entry, and their dominators.

    It is assumed that calls return. A called subroutine is not part of the graph.
    """

    def __init__(self, instructions: list[Instruction]) -> None:
        self.blocks = _blocks(instructions)
        starts = {block[0].address: index for index, block in enumerate(self.blocks)}
        self.successors = {index: _successors(self.blocks, index, starts) for index in range(len(self.blocks))}
        self.order = sorted(_reachable(self.successors, [0]))
        self.predecessors = {
            block: [other for other in self.order if block in self.successors[other]] for block in self.order
        }
        self._avoiding = {block: _reachable(self.successors, [0], without=block) for block in self.order}

    def dominates(self, block: int, other: int) -> bool:
        """Return whether every path from the entry to ``other`` passes through ``block``."""
        return other not in self._avoiding[block]

    def above(self, block: int, position: int) -> list[Instruction]:
        """Return the instructions that certainly ran before number ``position`` of ``block``, the latest first."""
        found = self.blocks[block][:position][::-1]
        # the dominators of a block form a chain, in which a nearer one dominates fewer of the others
        chain = [other for other in self.order if other != block and self.dominates(other, block)]
        for other in sorted(chain, key=lambda index: sum(self.dominates(index, after) for after in chain)):
            found += self.blocks[other][::-1]
        return found


def _blocks(instructions: list[Instruction]) -> list[list[Instruction]]:
    targets = {target(instruction) for instruction in instructions if instruction.name != "CALL"}
    blocks: list[list[Instruction]] = [[]]
    for instruction in instructions:
        if instruction.address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.name in ("BRA", "BSYNC", *_ENDS, *_INDIRECT):
            blocks.append([])
    return [block for block in blocks if block]


def target(instruction: Instruction) -> int | None:
    """Return the address that a branch, a call or a convergence point names, or None."""
    if instruction.name not in ("BRA", "BSSY", "CALL"):
        return None
    match = re.search(r"\b0x([0-9a-f]+)\s*$", instruction.operands)
    return int(match.group(1), 16) if match else None


def _successors(blocks: list[list[Instruction]], index: int, starts: dict[int, int]) -> tuple[int, ...]:
    last = blocks[index][-1]
    following = (index + 1,) if index + 1 < len(blocks) else ()
    always = last.guard in (None, "PT", "UPT")
    if last.name == "BRA":
        to = target(last)
        if to is None or to not in starts:
            raise UnknownControlFlow(f"branch at {last.address:#x} to {last.operands!r}")
        # a predicate may be written as a first operand: BRA.U UP0, 0x40
        unconditional = always and "," not in last.operands
        return (starts[to],) if unconditional else (starts[to], *following)
    if last.name == "BSYNC":
        return _reconvergence(blocks, index, starts) or following
    if last.name in _INDIRECT:
        raise UnknownControlFlow(f"indirect branch at {last.address:#x}")
    if last.name in _ENDS and always:
        return ()
    return following


def _reconvergence(blocks: list[list[Instruction]], index: int, starts: dict[int, int]) -> tuple[int, ...]:
    """Return the block where BSYNC continues: the target of the BSSY before it on the same barrier."""
    barrier = blocks[index][-1].operands.split(",")[0].strip()
    for block in reversed(blocks[: index + 1]):
        for instruction in reversed(block):
            if instruction.name == "BSSY" and instruction.operands.split(",")[0].strip() == barrier:
                to = target(instruction)
                return (starts[to],) if to in starts else ()
    return ()


def _reachable(edges: Mapping[int, Iterable[int]], starts: Iterable[int], *, without: int | None = None) -> set[int]:
    """Return the blocks that can be reached from ``starts`` along ``edges`` without passing through ``without``."""
    found: set[int] = set()
    pending = list(starts)
    while pending:
        block = pending.pop()
        if block not in found and block != without:
            found.add(block)
            pending.extend(edges[block])
    return found
