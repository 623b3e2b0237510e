"""Machine code read from short listings, and the cycles of its loops against counts by hand."""

import operator

import pytest

from clipfast.bench.inspection import bound, sass
from clipfast.bench.inspection.bound import Bound, Cycles

MMA_90 = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"  # 64 * 64 * 16 / 2048 = 32 cycles for a warpgroup
EXP = "MUFU.EX2 R1, R2"  # 32 lanes, 16 per clock: 2 cycles for a warp


def listing(*lines: str) -> str:
    """A listing in the disassembler's form, 16 bytes per instruction."""
    header = '\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    code = "".join(
        f"        /*{16 * index:04x}*/                   {line} ;   /* 0x000000ff00057210 */\n"
        "                                                          /* 0x000fe20000000000 */\n"
        for index, line in enumerate(lines)
    )
    return header + code


def evaluate(*lines: str, arch: int = 90, warps: int = 4, **options: bool) -> Bound | str:
    return bound.bound(sass.parse(listing(*lines)), arch, warps, **options)


def test_parse_splits_guard_opcode_and_operands():
    first, second = sass.parse(listing("@!UP0 UIADD3.X UR4, UR5, 0x1, URZ", "EXIT"))
    assert (first.address, first.guard, first.name, first.modifiers) == (0, "!UP0", "UIADD3", ["X"])
    assert first.operands == "UR4, UR5, 0x1, URZ"
    assert (second.address, second.guard, second.opcode, second.operands) == (16, None, "EXIT", "")


def test_parse_takes_the_first_function():
    assert len(sass.parse(listing("NOP", "EXIT") + listing("EXIT"))) == 2
    with pytest.raises(ValueError, match="no instructions in the disassembly"):
        sass.parse(listing())


def test_cycles_of_a_loop_are_those_counted_by_hand():
    found = evaluate("NOP", MMA_90, EXP, EXP, "FADD R1, R2, R3", "@P0 BRA 0x10", "EXIT", warps=8)
    # two warpgroups; 2 * 8 warps * 32 lanes / 16; 8 * 32 / 128; 5 instructions * 8 warps / 4 slots
    assert found.region == "0x10-0x50"
    assert found.loop == Cycles(peak=64, mma=64, exp=32, fp32=2, issue=10)
    assert found.outside == Cycles(peak=0, mma=0, exp=0, fp32=0, issue=4)
    assert (found.share, found.loop.limit) == (1.0, "mma")
    assert found.overhead == 0.5


def test_mma_sync_cannot_fill_hopper():
    # 16 * 8 * 16 for each of four warps: 8 cycles on sm_80, 4 at the peak of sm_90
    loop = [*["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 8, "@P0 BRA 0x0", "EXIT"]
    assert evaluate(*loop, arch=80).share == 1.0
    hopper = evaluate(*loop, arch=90)
    assert hopper.share == pytest.approx(2 / 3)
    assert hopper.loop.mma == pytest.approx(48)
    assert "no rate is published" in evaluate(*loop, arch=100)


def test_tf32_runs_at_half_the_rate():
    one, two = (
        evaluate(f"HMMA.{kind} R4, R8, R12, R4", "@P0 BRA 0x0", "EXIT", arch=80)
        for kind in ("16816.F32.BF16", "1688.F32.TF32")
    )
    assert one.loop.mma == two.loop.mma  # half the depth, half the rate


LOOPS = {
    "exponentials lower the bound": (
        [MMA_90, *[EXP] * 8, "@P0 BRA 0x0", "EXIT"], {"loop.exp": 64, "share": 0.5, "loop.limit": "exp"},
    ),
    "other instructions lower the bound": (
        [MMA_90, *["IADD3 R1, R2, R3, RZ"] * 62, "@P0 BRA 0x0", "EXIT"],
        {"loop.issue": 64, "share": 0.5, "loop.limit": "issue"},
    ),
    # only the loop counts
    "code around the loop": (
        [*[EXP] * 4, MMA_90, "@P0 BRA 0x40", *[EXP] * 4, "EXIT"],
        {"loop.mma": 32, "loop.exp": 0, "outside.exp": 64, "share": 1.0},
    ),
    "the innermost loop counts, and around it is the outer one": (
        [EXP, EXP, MMA_90, "@P0 BRA 0x20", EXP, "@P1 BRA 0x0", EXP, "EXIT"],
        {"region": "0x20-0x30", "outside.exp": 24},
    ),
    "of two loops the one with more work": (
        [MMA_90, "@P0 BRA 0x0", MMA_90, MMA_90, "@P0 BRA 0x20", "EXIT"],
        {"region": "0x20-0x40", "loop.mma": 64},
    ),
    # the branch at 0x50 goes back from behind the exit, into the loop; the one at 0x40 is a loop without products
    "a wait out of line neither makes nor ends a loop": (
        ["@!P1 BRA 0x40", MMA_90, "@P0 BRA 0x0", "EXIT", "@!P1 BRA 0x40", "BRA 0x10", *["NOP"] * 9, "BRA 0xf0"],
        {"loop.issue": 3},
    ),
    "code that may be skipped is not held against the products": (
        [MMA_90, "@P1 BRA 0x40", EXP, EXP, "@P0 BRA 0x0", "EXIT"], {"loop.exp": 0, "loop.issue": 3},
    ),
    "products that may be skipped count with what leads to them": (
        ["@P1 BRA 0x40", "NOP", MMA_90, "NOP", "@P0 BRA 0x0", "EXIT"], {"loop.mma": 32, "loop.issue": 5},
    ),
    "a predicate as operand makes a branch conditional": (
        [MMA_90, "BRA.U UP0, 0x0", EXP, "EXIT"], {"region": "0x0-0x10"},
    ),
    "code behind a conditional branch": (["BRA.U UP0, 0x20", EXP, MMA_90, "BRA 0x0"], {"loop.exp": 0}),
    # BSYNC at 0x40 goes on at 0x20, out of order: without that edge the loop is not seen
    "reconvergence goes where its barrier says": (
        ["BSSY B0, 0x20", "BRA 0x40", MMA_90, "BRA 0x50", "BSYNC B0", "@P0 BRA 0x0", "EXIT"],
        {"region": "0x0-0x50", "loop.issue": 6},
    ),
    "products outside loops are taken with the kernel": ([MMA_90, EXP, "EXIT"], {"region": "kernel"}),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), LOOPS.values(), ids=LOOPS)
def test_what_counts_for_the_bound(lines, expected):
    found = evaluate(*lines)
    assert {name: operator.attrgetter(name)(found) for name in expected} == expected


def test_products_in_float32_are_measured_in_multiply_adds():
    found = evaluate("FFMA R1, R2, R3, R1", "FFMA R1, R2, R3, R1", "LDS R2, [R4]", "@P0 BRA 0x0", "EXIT")
    assert (found.unit, found.loop.fp32, found.loop.issue, found.share) == ("fp32", 2, 4, 0.5)
    # half the lanes on sm_80
    assert evaluate("FFMA R1, R2, R3, R1", "@P0 BRA 0x0", "EXIT", arch=80).loop.fp32 == 2


TENSOR = "UTCHMMA gdesc[UR4], gdesc[UR12], tmem[UR10], tmem[UR20], idesc[UR21], UPT"
# After these, the descriptor in UR21 is not certain.
WRITERS = ["UMOV UR21, UR6", "ULDC.64 UR20, c[0x0][0x210]", "@UP0 UMOV UR21, 0x8100490", "UMOV UR21, 0x3"]


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        ([TENSOR, "EXIT"], {"arch": 100}, "unknown matrix instruction: UTCHMMA ?"),
        *(
            (["UMOV UR21, 0x8100490", writer, TENSOR, "EXIT"], {"arch": 100}, "unknown matrix instruction: UTCHMMA ?")
            for writer in WRITERS
        ),
        ([MMA_90, "BRX R4 -0x10", "EXIT"], {}, "indirect branch at 0x10"),
        ([MMA_90, "BRA 0x8888", "EXIT"], {}, "branch at 0x10"),
        ([MMA_90, "USETMAXREG.DEALLOC.CTAPOOL 0x18", "@P0 BRA 0x0", "EXIT"], {}, "warp-specialised"),
        ([MMA_90, "@P0 BRA 0x0", "EXIT"], {"specialised": True}, "warp-specialised"),
        (["DMMA.8x8x4 R4, R8, R12, R4", "@P0 BRA 0x0", "EXIT"], {}, "unknown matrix instruction"),
        (["HMMA.SP.16832.F32 R4, R8, R12, R4, R2", "@P0 BRA 0x0", "EXIT"], {}, "unknown matrix instruction"),
        (["EXIT", MMA_90, "EXIT"], {}, "subroutine"),
        (["HFMA2.MMA R1, -RZ, RZ, 0, 0", "EXIT"], {"multiplies": False}, "no matrix product"),
    ],
)
def test_what_is_not_known_is_said(lines, options, reason):
    found = evaluate(*lines, **options)
    assert isinstance(found, str)
    assert reason in found


def test_tensor_memory_products_take_their_shape_from_the_descriptor():
    # fields of 0x8100490: M / 16 = 8, N / 8 = 8, operands of type 1 (bf16); one issue for the whole block
    lines = ("UMOV UR21, 0x8100490", "NOP", "@P1 BRA 0x40", TENSOR, "@P0 BRA 0x10", "EXIT")
    found = evaluate(*lines, arch=100, warps=8)
    assert found.loop.mma == 128 * 64 * 16 / 4096
    assert bound.mma_kinds(sass.parse(listing(*lines))) == ("UTCHMMA 128x64x16 bf16",)
