"""The registers of one thread, as far as their values are known, and the operands of instructions that name them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..sass import Instruction

MASK, WIDE_MASK = (1 << 32) - 1, (1 << 64) - 1
_ZERO = ("RZ", "URZ", "SRZ")
_TRUE = ("PT", "UPT")
_REGISTER = re.compile(r"(?P<sign>[-~!]?)(?P<bar>\|?)(?P<file>UP|UR|P|R)(?P<index>\d+)\|?(?P<rest>(\.\w+)*)$")
_SLOT = re.compile(r"\[R1(?:\+0x([0-9a-f]+))?\]")
_CONSTANT = re.compile(r"(?P<sign>-?)\|?c\[0x0\]\[0x(?P<address>[0-9a-f]+)\]\|?(\.\w+)*$")


class Unknown(Exception):  # noqa: N818  (it only makes a result unknown)
    """The error for reading a register or an operand whose value is unknown."""


class Operand(NamedTuple):
    """One operand: a register ("R5", "UP0"), a number, or a word of the constant bank; ``sign`` is "-", "~", "!" or
    empty.
    """

    register: str = ""
    number: int | None = None
    constant: int | None = None
    sign: str = ""
    absolute: bool = False

    @property
    def is_predicate(self) -> bool:
        """Return whether the machine instruction's operand is a predicate register."""
        return self.register.lstrip("U").startswith("P")


@functools.lru_cache(maxsize=65536)
def operands(text: str) -> tuple[Operand, ...]:
    """Parse the text of a machine instruction's operands."""
    return tuple(operand_of(part.strip()) for part in text.split(",") if part.strip())


def operand_of(text: str) -> Operand:
    """Parse the text of one operand of a machine instruction."""
    bare = text.lstrip("-~!").replace(".reuse", "").split(".")[0].strip("|")
    sign = text[0] if text[0] in "-~!" else ""
    if bare in _ZERO:
        return Operand(number=0, sign=sign)
    if bare in _TRUE:
        return Operand(register=bare, sign=sign)
    if match := _REGISTER.match(text):
        return Operand(match["file"] + match["index"], sign=match["sign"], absolute=bool(match["bar"]))
    if match := _CONSTANT.match(text):
        return Operand(constant=int(match["address"], 16), sign=match["sign"])
    if match := re.match(r"(-?)0x([0-9a-f]+)$", text):
        return Operand(number=int(match[1] + match[2], 16) & MASK)
    return Operand()


def following(register: str, offset: int) -> str:
    """Return the name of the register ``offset`` places after ``register``."""
    file = register.rstrip("0123456789")
    return f"{file}{int(register[len(file) :]) + offset}"


@dataclasses.dataclass
class State:
    """The registers and the surroundings of one thread, as far as they are known.

    Attributes:
        constants: 32-bit words of constant bank 0 by address: launch dimensions and arguments.
        special: values of special registers, such as SR_CTAID.X.
        memory: a function that returns the integer of a number of bytes at an address of global memory, or None.
        registers: known registers by name; predicates are 0 or 1.
        parts: for registers of which only some bits are known: the bits and a mask of the known ones. The assembler
            packs predicates into registers, and some predicates are unknown.
    """

    constants: Mapping[int, int]
    special: Mapping[str, int]
    memory: Callable[[int, int], int | None]
    registers: dict[str, int] = dataclasses.field(default_factory=dict)
    parts: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def holds(self, guard: str | None) -> bool | None:
        """Return whether a guard such as "!P0" is true, or None if that is unknown."""
        if guard is None:
            return True
        return self.predicate(operand_of(guard))

    def predicate(self, operand: Operand) -> bool | None:
        """Return the value of a predicate operand of a simulated instruction."""
        value = 1 if operand.register in _TRUE else self.registers.get(operand.register)
        return None if value is None else bool(value) != (operand.sign == "!")

    def flag(self, operand: Operand) -> bool:
        """Return the value of a simulated instruction's predicate operand, or raise :class:`Unknown`."""
        value = self.predicate(operand)
        if value is None:
            raise Unknown
        return value

    def peek(self, operand: Operand) -> int | None:
        """Return 32 bits of a simulated instruction's operand, with its sign applied, or None if they are unknown."""
        value = self._bare(operand, 0)
        if value is None:
            return None
        if operand.absolute:
            value = min(value, -value & MASK)
        return {"-": -value, "~": ~value}.get(operand.sign, value) & MASK

    def read(self, operand: Operand, *, wide: bool = False) -> int:
        """Return 32 bits of a simulated instruction's operand, with its sign applied, or raise :class:`Unknown`.

        With ``wide``, return 64 bits: those of a register and the next one, or two words of the constant bank.
        """
        if not wide:
            value = self.peek(operand)
            if value is None:
                raise Unknown
            return value
        low, high = self._bare(operand, 0), self._bare(operand, 1)
        if low is None or high is None:
            raise Unknown
        value = high << 32 | low
        return {"-": -value, "~": ~value}.get(operand.sign, value) & WIDE_MASK

    def _bare(self, operand: Operand, offset: int) -> int | None:
        """Return 32 bits of a simulated instruction's operand without its sign, or None if they are unknown."""
        if operand.number is not None:
            return operand.number & MASK if offset == 0 else 0
        if operand.constant is not None:
            return self.constants.get(operand.constant + 4 * offset)
        if not operand.register or operand.is_predicate:
            return None
        return self.registers.get(following(operand.register, offset) if offset else operand.register)

    def read_bits(self, operand: Operand) -> tuple[int, int]:
        """Return the values of 32 bits of a simulated instruction's operand, and a mask of the bits that are known."""
        value = self.peek(operand)
        if value is not None:
            return value, MASK
        bits, known = self.parts.get(operand.register, (0, 0)) if operand.sign in ("", "~") else (0, 0)
        return (~bits if operand.sign == "~" else bits) & known, known

    def write_bits(self, operand: Operand, bits: int, known: int) -> None:
        """Set a simulated register of which only some bits are known."""
        self.write(operand, bits if known == MASK else None)
        if known != MASK and known and operand.register:
            self.parts[operand.register] = bits & known, known

    def write(self, operand: Operand, value: int | None, words: int = 1) -> None:
        """Set a simulated register, and with ``words`` the next ones too; an unknown value makes them unknown."""
        if not operand.register or operand.register in _TRUE:
            return
        for word in range(words):
            name = following(operand.register, word) if word else operand.register
            self.parts.pop(name, None)
            if value is None:
                self.registers.pop(name, None)
            else:
                self.registers[name] = value >> 32 * word & MASK

    def set(self, operand: Operand, value: bool | None) -> None:
        """Set a simulated predicate register."""
        self.write(operand, None if value is None else int(value))


def slot(instruction: Instruction) -> Operand:
    """Return the word of local memory that an instruction spills to or fills from, as a register "L5"."""
    match = _SLOT.search(instruction.operands)
    return Operand(f"L{int(match[1] or '0', 16) // 4}") if match else Operand()


def _words(instruction: Instruction) -> int:
    """Return the number of registers that the result of an instruction takes."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("HGMMA", "QGMMA"):  # 64 x N results over 128 threads
        return int(modifiers[0].split("x")[1]) // 2
    if "128" in modifiers or name in ("HMMA", "QMMA", "LDSM"):
        return 4
    is_wide = "WIDE" in modifiers or "64" in modifiers or name in ("CS2R", "DADD", "DMUL")
    return 2 if is_wide and "32" not in modifiers else 1


def written(instruction: Instruction) -> list[tuple[Operand, int]]:
    """Return the registers that an instruction writes, each with the number of registers from there on."""
    found = operands(instruction.operands)
    if instruction.name in _NO_RESULT or not found:
        return []
    if instruction.name.endswith("SETP") or instruction.name.endswith("PLOP3"):
        return [(operand, 1) for operand in found[:2]]
    if instruction.name == "STL":
        return [(slot(instruction), _words(instruction))]
    if instruction.name == "R2P":
        return [(Operand(f"P{index}"), 1) for index in range(7)]
    results = []
    for position, operand in enumerate(found):
        if operand.is_predicate and operand.sign != "!":
            results.append((operand, 1))
        elif position == 0 or all(other.is_predicate for other in found[:position]):
            results.append((operand, _words(instruction)))
            if not (len(found) > position + 1 and found[position + 1].is_predicate):
                break
        else:
            break
    return results


_NO_RESULT = frozenset((
    "BRA", "EXIT", "STG", "STS", "RED", "BAR", "NOP", "BSSY", "BSYNC", "CALL", "RET", "LDGSTS", "UTMALDG",
    "UTMASTG", "DEPBAR", "MEMBAR", "FENCE", "WARPSYNC", "LDGDEPBAR", "STSM", "CCTL", "BREAK",
))  # fmt: skip
