"""Machine code as the disassembler prints it: instructions with their control codes."""

import dataclasses
import functools
import re

_FUNCTION = re.compile(r"\s*Function : (\S+)")
# For sm_120, the disassembler of Triton 3.6 adds notes such as "&req={2} ?trans2", which repeat the control code.
_LINE = re.compile(r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*?)(?:\s+[&?][^;]*)?\s*;")
_CODE = re.compile(r"\s*/\* 0x(?P<code>[0-9a-f]{16}) \*/")  # the second half of an instruction, on the line below it
_TEXT = re.compile(r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z]\w*(?:\.\w+)*)\s*(?P<operands>.*)")
_MMA = re.compile(r"(UTC)?[A-Z]G?MMA$")  # HFMA2.MMA does not run on the matrix unit


NO_SCOREBOARD = 7


@dataclasses.dataclass(frozen=True)
class Control:
    """The control code of an instruction, bits 105 to 125, by which the assembler tells the scheduler when to issue it.

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
    """One machine instruction: address in bytes, guard predicate (None: always runs), opcode with modifiers,
    operands.
    """

    address: int
    guard: str | None
    opcode: str
    operands: str
    control: Control = Control()

    @functools.cached_property
    def name(self) -> str:
        """Return the opcode of a machine instruction without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """Return the modifiers that follow the name of a machine instruction's opcode."""
        return self.opcode.split(".")[1:]


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


def target(instruction: Instruction) -> int | None:
    """Return the address that a machine instruction such as a branch or a call names, or None."""
    if instruction.name not in ("BRA", "BSSY", "CALL"):
        return None
    match = re.search(r"\b0x([0-9a-f]+)\s*$", instruction.operands)
    return int(match.group(1), 16) if match else None


def matrix_instructions(instructions: list[Instruction]) -> tuple[str, ...]:
    """Return the instructions that run on the matrix unit, such as "HGMMA.64x128x16.F32.BF16", each once."""
    return tuple(sorted({one.opcode for one in instructions if _MMA.match(one.name)}))
