"""Disassembled machine code as NVIDIA's disassembler lists it, for tests of the inspection."""

from collections.abc import Sequence

PLAIN = 0x000FE20000000000  # the control bits of an instruction that takes one cycle and uses no scoreboard


def listing(*lines: str, codes: Sequence[int] = ()) -> str:
    """Return a disassembly for the inspection, 16 bytes for each instruction; ``codes`` are the second 8 bytes."""
    header = '\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    codes = codes or [PLAIN] * len(lines)
    return header + "".join(
        f"        /*{16 * index:04x}*/                   {line} ;   /* 0x000000ff00057210 */\n"
        f"                                                          /* 0x{code:016x} */\n"
        for index, (line, code) in enumerate(zip(lines, codes, strict=True))
    )
