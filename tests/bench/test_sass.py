"""Test the parser of machine code on short listings; test_model.py parses many other instructions."""

import pytest

from clipfast.bench.inspection import sass

from .listing import listing


def test_notes_behind_an_instruction_are_not_operands():
    (branch, wait) = sass.parse(listing("@P0 BRA 0x30f0   &req={2}   ?trans5", "DEPBAR.LE SB0, 0x0   ?WAIT4_END_GROUP"))
    assert (branch.operands, wait.operands) == ("0x30f0", "SB0, 0x0")


def test_parse_takes_the_first_function():
    assert len(sass.parse(listing("NOP", "EXIT") + listing("EXIT"))) == 2
    with pytest.raises(ValueError, match="no instructions in the disassembly"):
        sass.parse(listing())
