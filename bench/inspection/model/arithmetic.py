"""The integer arithmetic of machine code, on which the number of loop iterations and the branches depend.

Integers come from the arguments of the launch and from the thread's place in the grid. Other values, such as the
results of float instructions or values from shared memory, are unknown, and so are all values that are computed from
them. The names of instructions are those that ``nvdisasm`` prints for compute capability 8.0 and up. NVIDIA documents
only these names, in the list of the CUDA binary utilities; the meanings here were inferred from compiled code.
"""

import itertools
import operator
import re
import struct
from collections.abc import Callable

from ..sass import Instruction
from .registers import MASK, WIDE_MASK, Operand, State, Unknown, following, operand_of, operands, slot, written

_ADDRESS = re.compile(r"\[(?P<parts>[^\[\]]+)\]$")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


def execute(state: State, instruction: Instruction) -> None:
    """Run one instruction; the registers that it writes become unknown if its meaning or an operand is unknown."""
    holds = state.holds(instruction.guard)
    if holds is False:
        return
    name = instruction.name
    # An instruction on uniform registers has the name of an ordinary instruction after a "U", and its meaning.
    meaning = (_MEANING.get(name) or _MEANING.get(name.removeprefix("U"))) if holds else None
    try:
        if meaning is None:
            raise Unknown
        meaning(state, instruction.modifiers, operands(instruction.operands), instruction)
    except Unknown:
        for operand, words in written(instruction):
            state.write(operand, None, words)


def signed(value: int) -> int:
    """Return the signed number that 32 bits of a register represent in two's complement."""
    return value - (1 << 32) if value >> 31 else value


Meaning = Callable[[State, list[str], tuple[Operand, ...], Instruction], None]
_MEANING: dict[str, Meaning] = {}


def _means(*names: str) -> Callable[[Meaning], Meaning]:
    """Register a function as the meaning of the instructions with these names."""

    def register(function: Meaning) -> Meaning:
        """Register the meaning of these machine instructions."""
        for name in names:
            _MEANING[name] = function
        return function

    return register


def _split(found: tuple[Operand, ...]) -> tuple[list[Operand], Operand, list[Operand]]:
    """Split an instruction's operands into written predicates, the written register, and the other operands."""
    before = []
    position = 0
    while found[position].is_predicate:
        before.append(found[position])
        position += 1
    result, rest = found[position], list(found[position + 1 :])
    while rest and rest[0].is_predicate and rest[0].sign != "!":
        before.append(rest.pop(0))
    return before, result, rest


def _simple(arithmetic: Callable[[list[str], list[int]], int]) -> Meaning:
    """Return the function that simulates a machine instruction, given its result as a function of 32-bit operands."""

    def run(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
        """Run a machine instruction that writes one register."""
        result, rest = _split(found)[1:]
        values = [state.read(operand) for operand in rest if not operand.is_predicate]
        state.write(result, arithmetic(modifiers, values) & MASK)

    return run


def _shift(modifiers: list[str], values: list[int]) -> int:
    """Run the machine instruction SHF, a shift of 64 bits by a variable amount."""
    low, amount, high = values
    wide, kind = high << 32 | low, "".join(modifiers)
    amount &= 63 if "64" in kind else 31
    if "L" in modifiers:
        return (wide << amount) >> 32 if "HI" in modifiers else low << amount
    if "HI" in modifiers:
        return (signed(high) if "S32" in modifiers or "S64" in modifiers else high) >> amount
    return wide >> amount


def _permute(_: list[str], values: list[int]) -> int:
    """Run the machine instruction PRMT, which selects bytes of two registers."""
    a, selector, b = values
    data, result = b << 32 | a, 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = data >> 8 * (nibble & 7) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * place
    return result


def _extend(modifiers: list[str], values: list[int]) -> int:
    """Run the machine instruction SGXT, which extends the sign of a bit field."""
    value, bits = values[0], min(values[1], 32)
    value &= (1 << bits) - 1
    return value - (1 << bits) if bits and "U32" not in modifiers and value >> bits - 1 else value


@_means("IMAD")
def _multiply_add(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run the machine instruction IMAD, an integer multiply-add."""
    carries, result, rest = _split(found)
    for carry in carries:
        state.set(carry, None)
    if "HI" in modifiers:
        a, b, c = state.read(rest[0]), state.read(rest[1]), state.read(rest[2], wide=True)
        product = a * b if "U32" in modifiers else signed(a) * signed(b)
        state.write(result, (product + c & WIDE_MASK) >> 32)
        return
    wide = "WIDE" in modifiers
    # Zero times an unknown value is zero. The assembler writes moves and additions as such products.
    is_zero = 0 in (state.peek(rest[0]), state.peek(rest[1]))
    a, b = (0, 0) if is_zero else (state.read(rest[0]), state.read(rest[1]))
    if wide and "U32" not in modifiers:
        a, b = signed(a), signed(b)
    total = a * b + state.read(rest[2], wide=wide)
    if "X" in modifiers:
        total += state.flag(rest[3])
    state.write(result, total & (WIDE_MASK if wide else MASK), 2 if wide else 1)


def _addend(state: State, operand: Operand, *, takes_carry: bool) -> int:
    """Return an operand of an integer addition; a negated one is ~x + 1 in 33 bits, the last of them the carry."""
    if operand.is_predicate:
        return int(takes_carry and state.flag(operand))
    value = state.read(operand._replace(sign=""))
    return (~value & MASK) + (operand.sign == "-") if operand.sign else value


@_means("IADD3")
def _add(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run the machine instruction IADD3, which adds three integers and sets predicates to the carries."""
    carries, result, rest = _split(found)
    total = sum(_addend(state, operand, takes_carry="X" in modifiers) for operand in rest)
    for place, carry in enumerate(carries):
        state.set(carry, total >> 32 > place)
    state.write(result, total & MASK)


@_means("LEA")
def _shift_add(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run the machine instruction LEA, which shifts one integer and adds it to another."""
    carries, result, rest = _split(found)
    known = [state.read(operand) for operand in rest if not operand.is_predicate]
    carry_in = [state.flag(operand) for operand in rest if operand.is_predicate] if "X" in modifiers else []
    a, b, amount = known[0], known[1], known[-1] & 31
    if "HI" in modifiers:
        high = known[2] if len(known) == 4 else (-1 if "SX32" in modifiers and a >> 31 else 0)
        total = ((((high << 32) | a) << amount) >> 32 & MASK) + b
    else:
        total = (a << amount & MASK) + b
    total += sum(carry_in)
    for carry in carries:
        state.set(carry, total >> 32 > 0)
    state.write(result, total & MASK)


@_means("ISETP")
def _compare(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run the machine instruction ISETP, which compares integers and sets predicates."""
    (first, second), (a, b), rest = found[:2], found[2:4], found[4:]
    left, right = state.peek(a), state.peek(b)
    compare = next((_COMPARE[name] for name in modifiers if name in _COMPARE), None)
    result: bool | None = None
    if left is not None and right is not None and compare is not None:
        if "U32" not in modifiers:
            left, right = signed(left), signed(right)
        result = compare(left, right)
        if "EX" in modifiers and left == right:  # the earlier comparison of the low halves decides
            result = state.predicate(rest[-1])
    other = state.predicate(rest[0]) if rest else True
    combine = operator.or_ if "OR" in modifiers else operator.xor if "XOR" in modifiers else operator.and_
    for operand, value in ((first, result), (second, None if result is None else not result)):
        state.set(operand, _known(combine, value, other))


def _known(function: Callable[..., bool], *values: bool | None) -> bool | None:
    """Return a function's value for predicates, of which None is an unknown one; None if the value depends on these."""
    choices = itertools.product(*((False, True) if value is None else (value,) for value in values))
    options = {function(*chosen) for chosen in choices}
    return options.pop() if len(options) == 1 else None


@_means("LOP3")
def _logic(state: State, _: list[str], found: tuple[Operand, ...], __: Instruction) -> None:
    """Run the machine instruction LOP3, any function of three bits for each bit of three registers."""
    carries, result, rest = _split(found)
    bits, known = _look_up(rest[3].number or 0, [state.read_bits(operand) for operand in rest[:3]])
    state.write_bits(result, bits, known)
    is_zero = known == MASK and bits == 0
    for carry in carries:
        state.set(carry, True if bits else (False if is_zero else None))


def _look_up(table: int, values: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the bits of a machine instruction's function of three bits, and a mask of those that are known."""
    may_be = [0, 0]  # bits that may be 0, and bits that may be 1
    for row in range(8):
        possible = MASK
        for place, (bits, known) in enumerate(values):
            possible &= (bits if row >> 2 - place & 1 else ~bits) | ~known
        may_be[table >> row & 1] |= possible & MASK
    return may_be[1] & ~may_be[0], ~(may_be[0] & may_be[1]) & MASK


@_means("PLOP3")
def _predicate_logic(state: State, _: list[str], found: tuple[Operand, ...], __: Instruction) -> None:
    """Run PLOP3, any function of three predicates; unknown ones may not matter to its result."""
    inputs = [state.predicate(operand) for operand in found[2:5]]
    for result, table in zip(found[:2], found[5:7], strict=True):
        bits = table.number or 0
        state.set(result, _known(lambda a, b, c, bits=bits: bool(bits >> 4 * a + 2 * b + c & 1), *inputs))


@_means("SEL")
def _select(state: State, _: list[str], found: tuple[Operand, ...], __: Instruction) -> None:
    """Run the machine instruction SEL, which selects one of two operands by a predicate."""
    chosen = state.predicate(found[3])
    a, b = (state.read_bits(operand) for operand in found[1:3])
    if chosen is None:  # a bit is known if both operands have the same one
        state.write_bits(found[0], a[0], a[1] & b[1] & ~(a[0] ^ b[0]))
    else:
        state.write_bits(found[0], *(a if chosen else b))


@_means("IMNMX", "VIMNMX", "VIADDMNMX")
def _extremum(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run a machine instruction that takes the minimum or the maximum of two integers."""
    *addends, other, chooses_min = found[1:]  # VIADDMNMX adds two numbers first
    first, second = sum(state.read(operand) for operand in addends) & MASK, state.read(other)
    key = (lambda value: value) if "U32" in modifiers else signed
    state.write(found[0], (min if state.flag(chooses_min) else max)(first, second, key=key))


@_means("HFMA2")
def _half_constants(state: State, _: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run HFMA2 for zero times zero plus two float16 numbers, which is how the assembler loads a constant."""
    texts = [text.strip() for text in instruction.operands.split(",")]
    if any(operand.number != 0 for operand in found[1:3]) or len(texts) != 5:
        raise Unknown
    high, low = (int.from_bytes(struct.pack("<e", float(text)), "little") for text in texts[3:])
    state.write(found[0], high << 16 | low)


@_means("LDC", "LDCU", "MOV", "R2UR")
def _move(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run a machine instruction that moves a register or loads a constant."""
    result, rest = _split(found)[1:]
    if "64" in modifiers:
        state.write(result, state.read(rest[0], wide=True), 2)
    elif not set(modifiers) & {"128", "U8", "S8", "U16", "S16"}:
        state.write(result, state.read(rest[0]))
    else:
        state.write(result, None, 4)


@_means("S2R", "S2UR", "CS2R")
def _special(state: State, modifiers: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run a machine instruction that reads a special register, such as the number of the program."""
    name = instruction.operands.split(",")[1].strip()
    words = 2 if instruction.name == "CS2R" and "32" not in modifiers else 1
    state.write(found[0], 0 if name == "SRZ" else state.special.get(name, 0), words)


@_means("SHFL")
def _shuffle(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run the machine instruction SHFL, which reads a register of another lane."""
    if "IDX" not in modifiers:  # the compiler shuffles by an index only to give all lanes the same value
        raise Unknown
    state.write(found[1], state.read(found[2]))


@_means("VOTE", "VOTEU", "ELECT", "SYNCS")
def _agree(state: State, modifiers: list[str], found: tuple[Operand, ...], _: Instruction) -> None:
    """Run a vote as if all lanes agree, an election as if this lane wins, or a test as if its barrier is reached."""
    results = [operand for operand in found if operand.is_predicate and operand.sign != "!"]
    if "ARRIVE" in modifiers or "EXCH" in modifiers or not results:
        return
    value = state.predicate(found[-1]) if {"ANY", "ALL"} & set(modifiers) and len(found) > 1 else True
    state.set(results[0], value)
    if not found[0].is_predicate:
        state.write(found[0], None)


@_means("P2R", "UP2UR")
def _pack(state: State, _: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run the machine instruction P2R, which packs predicates into the bits of a register."""
    (base, base_known), mask = state.read_bits(found[2]), found[3].number or 0
    kind = "UP" if instruction.name == "UP2UR" else "P"
    predicates = {index: state.registers.get(f"{kind}{index}") for index in range(7) if mask >> index & 1}
    packed = sum(value << index for index, value in predicates.items() if value)
    known = sum(1 << index for index, value in predicates.items() if value is not None) | (mask & ~0x7F)
    state.write_bits(found[0], base & ~mask | packed, base_known & ~mask | known)


@_means("R2P", "UR2UP")
def _unpack(state: State, _: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run the machine instruction R2P, which sets predicates from the bits of a register."""
    (bits, known), mask = state.read_bits(found[1]), found[2].number or 0
    kind = "UP" if instruction.name == "UR2UP" else "P"
    for index in range(7):
        if mask >> index & 1:
            state.set(Operand(f"{kind}{index}"), bool(bits >> index & 1) if known >> index & 1 else None)


@_means("LDG")
def _load(state: State, modifiers: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run the machine instruction LDG, a load from global memory, if the value is known."""
    wide = "64" in modifiers or "128" in modifiers
    match = _ADDRESS.search(instruction.operands)
    if match is None or wide:
        raise Unknown
    address = 0
    for part in match["parts"].split("+"):
        operand = operand_of(part.removesuffix(".64").removesuffix(".U32"))
        value = state.read(operand, wide=part.endswith(".64"))
        # A number is a signed offset, whereas a register holds an unsigned address.
        address += value - (MASK + 1) if operand.number is not None and value > MASK // 2 else value
    size = next((size for name, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if name in modifiers), 4)
    loaded = state.memory(address, size)
    state.write(found[0], None if loaded is None else loaded & MASK)


@_means("STL", "LDL")
def _spill(state: State, _: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run a spill or a fill: move registers to local memory or back. A word that is known only in part is forgotten."""
    here, spills = slot(instruction), instruction.name == "STL"
    result, words = written(instruction)[0]
    source = found[1] if spills else here
    for word in range(words):
        register = following(source.register, word) if source.register else ""
        value = 0 if source.number == 0 else state.registers.get(register)
        state.write(Operand(following(result.register, word)) if result.register else result, value)


def _float(bits: int) -> float:
    """Return the float32 number that the bits of a register represent."""
    return float(struct.unpack("f", struct.pack("I", bits & MASK))[0])


def _bits(value: float, *, up: bool = False) -> int:
    """Return the bits of a float32 number for a register, rounded up if ``up``."""
    bits = int(struct.unpack("I", struct.pack("f", value))[0])
    return bits + 1 if up and _float(bits) < value else bits


@_means("I2F", "I2FP", "F2I", "MUFU")
def _convert(state: State, modifiers: list[str], found: tuple[Operand, ...], instruction: Instruction) -> None:
    """Run a conversion between integer and float: an integer division starts from an estimate in float32."""
    name, is_wide, unsigned = instruction.name, "U64" in modifiers, {"U32", "U64"} & set(modifiers)
    words = 2 if is_wide and name == "F2I" else 1
    try:
        value = state.read(found[1], wide=is_wide and name == "I2F")
        if name in ("I2F", "I2FP"):
            result = _bits(float(value if unsigned else signed(value)), up="RP" in modifiers)
        elif name == "MUFU" and "RCP" in modifiers and _float(value):
            result = _bits(1.0 / _float(value))
        elif name == "F2I" and unsigned:
            result = max(0, int(_float(value)))
        else:
            raise Unknown
        state.write(found[0], result, words)
    except Unknown:
        state.write(found[0], None, words)


_MEANING |= {
    "SHF": _simple(_shift), "PRMT": _simple(_permute), "SGXT": _simple(_extend),
    "VIADD": _simple(lambda _, values: sum(values)), "IABS": _simple(lambda _, values: abs(signed(values[0]))),
    "POPC": _simple(lambda _, values: values[0].bit_count()),
}  # fmt: skip
