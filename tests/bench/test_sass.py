"""Test the parser of machine code on short listings."""

import pytest

from clipfast.bench.inspection import sass
from clipfast.bench.inspection.sass import Control

from .listing import listing

MMA_90 = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"


def test_parse_splits_guard_opcode_and_operands():
    first, second = sass.parse(listing("@!UP0 UIADD3.X UR4, UR5, 0x1, URZ", "EXIT"))
    assert (first.address, first.guard, first.name, first.modifiers) == (0, "!UP0", "UIADD3", ["X"])
    assert first.operands == "UR4, UR5, 0x1, URZ"
    assert (second.address, second.guard, second.opcode, second.operands) == (16, None, "EXIT", "")


def test_notes_behind_an_instruction_are_not_operands():
    (branch, wait) = sass.parse(listing("@P0 BRA 0x30f0   &req={2}   ?trans5", "DEPBAR.LE SB0, 0x0   ?WAIT4_END_GROUP"))
    assert (branch.operands, wait.operands) == ("0x30f0", "SB0, 0x0")


def test_parse_takes_the_first_function():
    assert len(sass.parse(listing("NOP", "EXIT") + listing("EXIT"))) == 2
    with pytest.raises(ValueError, match="no instructions in the disassembly"):
        sass.parse(listing())


@pytest.mark.parametrize(
    "control",
    [Control(), Control(stall=15, write=0), Control(stall=2, read=5, wait=(0, 3)), Control(4, 1, 2, (5,))],
)
def test_the_control_code_is_read_from_the_second_half_of_an_instruction(control):
    bits = control.stall | control.write << 5 | control.read << 8 | sum(1 << 11 + board for board in control.wait)
    one, _ = sass.parse(listing("NOP", "EXIT", codes=[bits << 41, 1 << 41]))
    assert one.control == control


def test_the_matrix_instructions_of_a_kernel():
    lines = ("HFMA2.MMA R1, -RZ, RZ, 0, 0", MMA_90, MMA_90, "HMMA.1688.F32.TF32 R4, R8, R12, R4", "UTCHMMA gdesc[UR4]")
    found = sass.matrix_instructions(sass.parse(listing(*lines, "EXIT")))
    assert found == ("HGMMA.64x64x16.F32.BF16", "HMMA.1688.F32.TF32", "UTCHMMA")
