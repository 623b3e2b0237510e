"""Test the model of a GPU that predicts the times of kernels from their machine code.

The model's arithmetic is compared with Python's, its paths with loops that are counted by hand, its cycles with those
of small programs, and the FLOPs of shipped kernels with those of their tiles.
"""

import dataclasses
import itertools
import operator

import pytest
import torch
import triton
import triton.language as tl

from clipfast.bench.inspection import forecast, model, offline, sass
from clipfast.bench.inspection.model import paths
from clipfast.bench.inspection.model.arguments import bank
from clipfast.bench.inspection.model.arithmetic import execute, signed
from clipfast.bench.inspection.model.machine import H100
from clipfast.bench.inspection.model.multiprocessor import run
from clipfast.bench.inspection.model.paths import Code, NoPath, Path, kinds, sample, shortened
from clipfast.bench.inspection.model.predict import runs
from clipfast.bench.inspection.model.registers import State
from clipfast.bench.inspection.model.steps import Kind, Step, decode
from clipfast.bench.inspection.model.traffic import moved_bytes, used
from clipfast.kernels.launch import Launch
from clipfast.kernels.spec import specs

from ..conftest import INTERPRET, ON_GPU
from .listing import listing

pytestmark = pytest.mark.skipif(ON_GPU or INTERPRET, reason="kernels are compiled from calls recorded on a CPU")

M32, M64 = 2**32 - 1, 2**64 - 1


def after(*lines: str, **registers: int) -> dict[str, int]:
    """Run some instructions in the model of a GPU and return the registers after them."""
    state = State({}, {}, lambda address, size: None, dict(registers))
    for one in sass.parse(listing(*lines)):
        execute(state, one)
    return state.registers


NUMBERS = (0, 1, 200, 2**31 - 1, 2**31, 0x9ABCDEF1, M32)
DRAWS = list(itertools.product(NUMBERS, repeat=3))


# Instructions, and the 32-bit result in R0 for R1 = a, R2 = b, R3 = c.
ARITHMETIC = {
    "IADD3 R0, R1, -R2, R3": lambda a, b, c: a - b + c,
    "UIADD3 R0, ~R1, 0x7, RZ": lambda a, b, c: ~a + 7,
    "IMAD R0, R1, R2, R3": lambda a, b, c: a * b + c,
    "VIADD R0, R1, 0xffffff80": lambda a, b, c: a - 128,
    "LEA R0, R1, R2, 0x4": lambda a, b, c: (a << 4) + b,
    "LEA.HI R0, R1, R2, RZ, 0x7": lambda a, b, c: (a >> 25) + b,
    "LEA.HI.SX32 R0, R1, R2, 0x19": lambda a, b, c: (signed(a) >> 7) + b,
    "SHF.L.U32 R0, R1, 0x5, RZ": lambda a, b, c: a << 5,
    "SHF.R.U32.HI R0, RZ, 0x5, R1": lambda a, b, c: a >> 5,
    "SHF.R.S32.HI R0, RZ, 0x1f, R1": lambda a, b, c: signed(a) >> 31,
    "SHF.R.U64 R0, R1, 0x9, R2": lambda a, b, c: (b << 32 | a) >> 9,
    "SHF.L.U64.HI R0, R1, 0x9, R2": lambda a, b, c: (b << 32 | a) << 9 >> 32,
    "LOP3.LUT R0, R1, R2, R3, 0x96, !PT": lambda a, b, c: a ^ b ^ c,
    "LOP3.LUT R0, RZ, R1, RZ, 0x33, !PT": lambda a, b, c: ~a,
    "VIADDMNMX R0, R1, R2, R3, PT": lambda a, b, c: min(signed(a + b & M32), signed(c)),
    "IABS R0, R1": lambda a, b, c: abs(signed(a)),
    "VIMNMX R0, R1, R2, PT": lambda a, b, c: min(signed(a), signed(b)),
    "IMNMX.U32 R0, R1, R2, !PT": lambda a, b, c: max(a, b),
    "PRMT R0, R1, 0x5410, R2": lambda a, b, c: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "PRMT R0, R1, 0x8880, RZ": lambda a, b, c: (a & 0xFF) | (0xFFFFFF00 if a >> 7 & 1 else 0),
    "SGXT R0, R1, 0x8": lambda a, b, c: (a & 0xFF) - (256 if a >> 7 & 1 else 0),
    "SGXT.U32 R0, R1, 0x8": lambda a, b, c: a & 0xFF,
}


@pytest.mark.parametrize("line", ARITHMETIC)
def test_integer_instructions_compute_what_python_computes(line):
    for a, b, c in DRAWS:
        assert after(line, R1=a, R2=b, R3=c)["R0"] == ARITHMETIC[line](a, b, c) & M32, (a, b, c)
    assert "R0" not in after(line, R0=5)  # with unknown operands, the result is unknown


WIDE = (
    "IADD3 R10, P0, R2, R4, RZ", "IADD3.X R11, R3, R5, RZ, P0, !PT",
    "IADD3 R12, P1, RZ, -R2, RZ", "IADD3.X R13, RZ, ~R3, RZ, P1, !PT",
    "LEA R14, P0, R2, R4, 0x2", "LEA.HI.X R15, R2, R5, R3, 0x2, P0",
    "IMAD.WIDE.U32 R16, R2, R3, R4", "IMAD.WIDE R18, R2, R3, RZ",
)  # fmt: skip
COMPARISONS = {"GE": operator.ge, "LT": operator.lt, "NE": operator.ne}


def test_sums_products_and_comparisons_of_64_bits():
    for a, b, c in DRAWS:
        wide, other = b << 32 | a, c << 32 | b
        found = after(*WIDE, R2=a, R3=b, R4=b, R5=c)
        pairs = [found[f"R{high}"] << 32 | found[f"R{high - 1}"] for high in (11, 13, 15, 17, 19)]
        expected = (wide + other, -wide, 4 * wide + other, a * b + other, signed(a) * signed(b))
        assert pairs == [value & M64 for value in expected], (a, b, c)
        for name, compare in COMPARISONS.items():
            low, high = f"ISETP.{name}.U32.AND P0, PT, R2, R4, PT", f"ISETP.{name}.U32.AND.EX P1, P2, R3, R5, PT, P0"
            found = after(low, high, R2=a, R3=b, R4=b, R5=c)
            assert (found["P1"], found["P2"]) == (compare(wide, other), not compare(wide, other)), (name, wide, other)


PACKED = "P2R R0, PR, RZ, 0x3; LOP3.LUT R0, R0, 0x100, RZ, 0xfc, !PT; "
SPILL, FILL = "STL.64 [R1+0x8], R4; ", "LDL.LU R0, [R1+0xc]"


@pytest.mark.parametrize(
    ("lines", "before", "expected"),
    [
        ("ISETP.GE.OR P0, PT, R1, R2, P1", "R1=1 R2=2 P1=1", "P0=1"),
        ("ISETP.GE.AND P0, PT, R1, R2, !P1", "R1=3 R2=2 P1=1", "P0=0"),
        # One known operand can decide the result of "and" and "or", even if the other one is unknown.
        ("ISETP.GE.OR P0, PT, R9, R2, P1", "R2=2 P1=1", "P0=1"),
        ("ISETP.GE.AND P0, PT, R9, R2, P1", "R2=2 P1=1", "P0 unknown"),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x0", "P1=1 P2=1", "P0=1"),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x0", "P1=0", "P0=0"),
        ("P2R R0, PR, RZ, 0x14; R2P PR, R0, 0x10", "P0=1 P1=1 P2=1 P3=0 P4=0 P5=1 P6=1", "R0=4"),
        ("UP2UR UR0, UPR, URZ, 0x6; UR2UP UPR, UR0, 0x2", "UP0=1 UP1=1 UP2=0", "UR0=2"),
        ("@P0 MOV R0, 0x5", "R0=1 P0=0", "R0=1"),
        ("@!P0 MOV R0, 0x5", "R0=1 P0=0", "R0=5"),
        ("@P3 MOV R0, 0x5", "R0=1", "R0 unknown"),
        # If some of the packed predicates are known, they stay known.
        (PACKED + "R2P PR, R0, 0x3; LOP3.LUT P5, RZ, R0, 0x2, RZ, 0xc0, !PT", "P1=1", "P5=1"),
        (PACKED + "R2P PR, R0, 0x3", "P1=1", "P1=1"),
        (PACKED + "R2P PR, R0, 0x3", "P1=1", "P0 unknown"),
        (PACKED + "LOP3.LUT P5, RZ, R0, 0x1, RZ, 0xc0, !PT", "P1=1", "P5 unknown"),
        ("SEL R0, RZ, 0x20, P0; LOP3.LUT P5, RZ, R0, 0x40, RZ, 0xc0, !PT", "", "P5=0"),
        ("SEL R0, R1, R2, P0", "R1=1 R2=2 P0=0", "R0=2"),
        # HFMA2.MMA of zeros loads a 32-bit constant, written as two float16 numbers.
        ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", "", "R0=1"),
        ("HFMA2.MMA R0, R1, R2, 0, 1", "R1=1 R2=1", "R0 unknown"),
        # Spilled registers are restored.
        (SPILL + FILL, "R4=3 R5=7", "R0=7"),
        (SPILL + "STL [R1+0xc], R6; " + FILL, "R0=1 R4=3 R5=7", "R0 unknown"),
    ],
)
def test_predicates_constants_and_spills(lines, before, expected):
    known = {name: int(value) for name, value in (one.split("=") for one in before.split())}
    found = after(*lines.split("; "), **known)
    name = expected.split("=")[0].removesuffix(" unknown")
    assert (f"{name}={found[name]}" if name in found else f"{name} unknown") == expected


def code(*lines: str) -> Code:
    """Parse lines of SASS, the machine code that the model of a GPU runs."""
    return Code(sass.parse(listing(*lines)))


def follow(*lines: str, constants=None, **special: int) -> Path:
    """Return the path that a program takes through lines of SASS in the model of a GPU."""
    return code(*lines).follow(State(constants or {}, special, lambda address, size: None))


LOOP = ("MOV R0, RZ", "VIADD R0, R0, 0x3", "ISETP.LT.AND P0, PT, R0, c[0x0][0x210], PT", "@P0 BRA 0x10", "EXIT")
PLACE = ("S2R R0, SR_CTAID.X", "ISETP.GE.AND P0, PT, R0, 0x2, PT", "@P0 BRA 0x50", "NOP", "NOP", "EXIT")
SLOW = ("FADD R0, R1, R2", "ISETP.GT.U32.AND P0, PT, R0, RZ, PT", "@!P0 BRA 0x40", "CALL.REL.NOINC 0x50", "EXIT")


def test_loops_branches_and_calls_are_followed():
    for limit in (1, 3, 4, 100):
        path = follow(*LOOP, constants={0x210: limit})
        assert (path.length, path.guesses) == (2 + 3 * -(-limit // 3), 0)
    assert [follow(*PLACE, **{"SR_CTAID.X": place}).length for place in (1, 2)] == [6, 4]
    # Calls return, and diverged threads join again.
    assert follow("CALL.REL.NOINC 0x30", "NOP", "EXIT", "NOP", "RET.REL.NODEC R4 0x0").length == 5
    assert follow("BSSY B0, 0x40", "BRA 0x30", "NOP", "BSYNC B0", "EXIT").length == 4
    # The slow path of a float function is not taken, and this does not count as a guess.
    path = follow(*SLOW, "RET.REL.NODEC R4 0x0")
    assert (path.length, path.guesses) == (4, 0)


def test_what_is_not_known_is_a_guess_and_what_cannot_be_followed_an_error(monkeypatch):
    monkeypatch.setattr(paths, "MOST_STEPS", 1000)
    path = follow("LDS R0, [R1]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x0", "@P0 EXIT", "EXIT")
    assert (path.guesses, path.length) == (2, 5)
    for lines in (["BRX R4 -0x10"], ["BRA 0x8880"], ["RET.REL.NODEC R4 0x0"], ["NOP", "BRA 0x0"]):
        with pytest.raises(NoPath):
            follow(*lines, "EXIT")


def test_long_repetitions_are_shortened_and_continued_in_a_straight_line():
    def nested(outer: int, inner: int) -> Path:
        """Return a path through SASS with a loop of ``outer`` turns, and in each of them one of ``inner`` turns."""
        turn = ((5, 9), *((9, 20), (30, 31)) * inner, (20, 22))
        return Path(((0, 5), *turn * outer, (22, 40)), 0)

    whole = nested(30, 100)
    found = shortened(whole, 10)
    lengths = sorted(path.length for path, _ in found)
    assert lengths == sorted(nested(outer, inner).length for outer in (2, 4) for inner in (10, 20))
    assert sum(weight * path.length for path, weight in found) == pytest.approx(whole.length)
    assert shortened(nested(3, 20), 10) == [(nested(3, 20), 1.0)]


# Control codes that set the first scoreboard when the result is available, wait for it, or do neither.
SETS, WAITS, NEITHER = ((1 | board << 5 | 7 << 8 | wait << 11) << 41 for board, wait in ((0, 0), (7, 1), (7, 0)))


def cycles(*lines: str, warps: int = 1, codes=(), **options) -> float:
    """Return the cycles of a program in the model of a GPU; by default all instructions set the first scoreboard."""
    codes = [*(codes or [SETS] * len(lines)), WAITS]
    steps = [decode(one, 0.0) for one in sass.parse(listing(*lines, "EXIT", codes=codes))]
    return run(steps, warps, machine=H100, **options).cycles


def marginal(lines: list[str], warps: int = 1) -> float:
    """Return the cycles that each repetition of some instructions adds in the model of a GPU."""
    return (cycles(*lines * 64, warps=warps) - cycles(*lines * 32, warps=warps)) / 32


@pytest.mark.parametrize(
    ("lines", "warps", "expected"),
    [
        (["FADD R0, R1, R2"], 1, 1),  # one instruction per cycle
        (["IADD3 R0, R1, R2, RZ"], 1, 2),  # 16 lanes take two cycles for a warp of 32 threads
        (["MUFU.EX2 R0, R1"], 1, 8),  # four lanes take eight cycles for a warp of 32 threads
        (["FADD R0, R1, R2"], 4, 1),  # a warp on each sub-partition
        (["FADD R0, R1, R2"], 8, 2),
        (["IADD3 R0, R1, R2, RZ", "FADD R0, R1, R2"], 8, 4),  # two pipes and two warps work in parallel
        (["SHFL.BFLY PT, R0, R1, 0x1, 0x1f"], 8, 8),  # one instruction per cycle and multiprocessor
        (["LDS.128 R0, [R4]"], 4, 16),  # 512 bytes a warp at 128 a cycle
        (["HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24"], 4, 128),  # the product takes N / 2 cycles
        # Both operands come from shared memory, which takes (2048 + 32 N) / 128 cycles.
        (["HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24"], 4, 20),
        (["HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24"], 4, 8),  # N / 2 cycles, since A is in registers
        (["HMMA.16816.F32.BF16 R4, R8, R12, R4"], 4, 6),
    ],
)
def test_units_take_the_cycles_that_are_counted_by_hand(lines, warps, expected):
    lines = [line if "HGMMA" not in line else line + ", gsb0" for line in lines]
    assert marginal(lines, warps) == pytest.approx(expected, rel=0.02)


def test_scoreboards_barriers_blocks_and_bandwidth_hold_up_what_waits_for_them():
    lines = ("LDG.E R0, desc[UR4][R2.64]", "FADD R1, R0, R0", "FADD R1, R1, R1")
    assert cycles(*lines, codes=[SETS, WAITS, NEITHER]) == cycles(*lines, codes=[SETS, NEITHER, WAITS]) + 1
    assert cycles(*lines, codes=[SETS, NEITHER, NEITHER]) > H100.hbm_latency > 10 * cycles(*lines, codes=[NEITHER] * 3)
    barrier, nothing = (cycles(line, warps=4, codes=[NEITHER]) for line in ("BAR.SYNC.DEFER_BLOCKING 0x0", "NOP"))
    assert barrier > nothing + 20
    work = ["MUFU.EX2 R0, R1"] * 50
    one = cycles(*work, warps=4)
    assert cycles(*work, warps=4, blocks=2) == pytest.approx(2 * one, rel=0.1)
    assert cycles(*work, warps=4, rounds=3) == pytest.approx(3 * one + 2 * H100.block_gap, rel=0.05)
    per_load = marginal(["LDG.E.128 R0, desc[UR4][R2.64]"], warps=4)
    assert per_load == pytest.approx(4 * 512 * H100.clock * H100.multiprocessors / H100.hbm_rate, rel=0.01)


def test_a_load_takes_its_latency_behind_the_queue_and_other_blocks_fill_the_time():
    def step(kind: Kind, amount: float = 0.0, latency: float = 0.0) -> Step:
        """Return a step of the model of a GPU that sets and awaits no scoreboard."""
        return Step(kind, None, 64.0, latency, amount, 1, 7, 7, ())

    size, turns = 16384.0, 20
    turn = [step(Kind.EXPECT), step(Kind.BARRIER), step(Kind.TMA_LOAD, size), step(Kind.ARRIVAL)]
    turn += [step(Kind.PRODUCT, 1536.0, 1.0), step(Kind.PRODUCT_WAIT), step(Kind.BARRIER)]
    one, three = (
        run(turn * turns, 4, blocks=blocks, machine=H100, hbm_share=0.0).cycles / turns / blocks for blocks in (1, 3)
    )
    transfer = size * H100.cycles_per_byte(H100.l2_rate)
    assert one > transfer + H100.l2_latency + H100.tma_latency
    # If the model handled events out of the order of time, blocks would not run while another block waits.
    assert three == pytest.approx(transfer, rel=0.06)


@triton.jit
def _walk_kernel(x_ptr, out_ptr, flag_ptr, N, M, BLOCK: tl.constexpr):
    """Run loops whose lengths depend on arguments and program, if a flag is not 0: a kernel for the model of a GPU."""
    start = tl.program_id(0) * N // M
    acc = tl.zeros((BLOCK,), tl.float32)
    offs = tl.arange(0, BLOCK)
    if tl.load(flag_ptr) != 0:
        for i in range(start, N):
            for j in range(0, M, BLOCK):
                acc += tl.exp2(tl.load(x_ptr + i * M + j + offs, mask=j + offs < M, other=0.0))
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offs, acc)


def walk(n: int, m: int, *, flag: int = 1, grid: int = 3) -> Launch:
    """Return a launch of the kernel with nested loops, whose path the model of a GPU follows."""
    x, out = torch.empty(n, m), torch.empty(grid, 128)
    args = {"x_ptr": x, "out_ptr": out, "flag_ptr": torch.tensor(flag, dtype=torch.int32), "N": n, "M": m}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return Launch(_walk_kernel, (grid,), args, {"BLOCK": 128}, options)


@pytest.mark.parametrize(("n", "m", "flag"), [(5, 300, 1), (17, 128, 1), (40, 257, 0)])
def test_loops_of_a_compiled_kernel_run_as_its_arguments_say(n, m, flag):
    launch = walk(n, m, flag=flag)
    kernel = model.load(offline.compile_kernel(launch, 90))
    start = bank(kernel.ptx, launch.grid, kernel.warps, [(name, launch.args[name]) for name in kernel.names])
    for program in range(3):
        path = kernel.code.follow(start.state((program, 0, 0)))
        turns = (n - program * n // m) * -(-m // 128) if flag else 0
        exponentials = sum(one.opcode == "MUFU.EX2" for one in kernel.along(path))
        assert (exponentials, path.guesses) == (turns, 0), program


def test_more_programs_than_places_take_another_wave():
    def seconds(grid: int) -> float:
        """Return the time that the model of a GPU predicts for a grid of programs."""
        return model.predict_launch(walk(1, 6000, grid=grid), model.H100, model.QUICK).seconds

    places = 132 * model.predict_launch(walk(1, 6000), model.H100, model.QUICK).at_once
    assert seconds(places) > 1.1 * seconds(places // 2)
    assert 1.02 * seconds(places) < seconds(places + 1) == pytest.approx(seconds(places + 132), rel=0.02)


def test_where_the_kind_of_programs_changes_is_searched_for():
    def kind_of(number: int) -> int:
        """Return the kind of a program by its number, as the model of a GPU tells them apart."""
        return (number >= 64) + (number >= 700)

    assert runs({number: kind_of(number) for number in sample(1000, 8)}, kind_of) == [(0, 0), (64, 1), (700, 2)]
    changing = {number: number % 2 for number in range(0, 100, 9)}
    # The kind of program changes so often that no boundary is searched for.
    assert runs(changing, pytest.fail) == list(changing.items())


def test_paths_of_many_lengths_are_represented_by_a_few_that_do_as_much_work():
    paths = {number: Path(((0, 10 + 10 * number),), 0) for number in range(100)}
    found = kinds(paths, 4)
    assert sorted(number for _, numbers in found for number in numbers) == list(range(100))
    work = sum(path.length * len(numbers) for path, numbers in found)
    assert work == pytest.approx(sum(path.length for path in paths.values()), rel=0.01)


def test_bytes_are_those_of_what_is_loaded_and_stored():
    launch = walk(8, 1000)
    ttir = offline.compile_kernel(launch, 90).asm["ttir"]
    loads, stores = used(ttir)
    assert ({"x_ptr", "flag_ptr"} <= loads, "out_ptr" in loads, "out_ptr" in stores) == (True, False, True)
    assert moved_bytes(ttir, launch.args) == 4 * (8 * 1000 + 1 + 3 * 128)
    long_form = '"builtin.module"() ({\n^bb0(%p: !tt.ptr<f32>, %q: !tt.ptr<f32>):\n' \
        '%0 = "tt.splat"(%p) : x\n%1 = "tt.load"(%0) : x\n"tt.store"(%q, %1) : x\n'  # fmt: skip
    assert used(long_form) == ({"p"}, {"q"})


def test_a_kernel_for_another_gpu_has_no_model():
    with pytest.raises(model.NoModel, match="sm_80"):
        model.load(offline.compile_kernel(walk(8, 1000), 80))


def only_launch(op: str, part: str, **sizes: object) -> Launch:
    """Return the first launch of an op whose kernel's name contains ``part``.

    The op is called at its first benchmarked shape, with ``sizes`` changed.
    """
    spec = specs()[op]
    shape = dataclasses.replace(spec.bench["cuda"][0], **sizes)
    launches = forecast.op_work(spec, shape, "bf16").launches
    return next(one for one in launches if part in one.kernel.__name__ and "online" not in one.kernel.__name__)


def rounded_up(size: int, block: int) -> int:
    """Return a size rounded up to whole blocks, for the FLOPs that the model of a GPU counts."""
    return -(-size // block) * block


def assert_flops(launch: Launch, expected: int) -> None:
    """Check the FLOPs that the model of a GPU counts for a launch."""
    found = model.predict_launch(launch, model.H100, model.QUICK)
    assert (found.flops, found.guesses) == (expected, 0)


def test_products_are_those_of_the_tiles():
    launch = only_launch("contrastive_loss", "_stats", pairs=1000, embed_dim=200)
    m, n, k = (launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    assert_flops(launch, 2 * rounded_up(1000, m) * rounded_up(1000, n) * rounded_up(200, k))
    launch = only_launch("attention", "fwd", batch=8, tokens=50, heads=12, head_dim=64, causal=False)
    sizes = launch.constexprs
    keys = sum(sizes["N_PARTS"]) if "N_PARTS" in sizes else 50 // sizes["BLOCK_N"] * sizes["BLOCK_N"] + sizes["FIRST"]
    assert_flops(launch, 8 * 12 * 2 * 2 * rounded_up(50, sizes["BLOCK_M"]) * keys * 64)


# Kernels whose programs add a number of rows that depends on the values of the tokens.
DATA_DEPENDENT = ("_segment_sums_kernel",)
QUICK = ("attention", "bias_gelu", "layer_norm")


@pytest.mark.parametrize("op", [op if op in QUICK else pytest.param(op, marks=pytest.mark.slow) for op in specs()])
def test_the_paths_of_every_op_are_known(op):
    spec = specs()[op]
    for launch in forecast.op_work(spec, spec.small[0], "bf16").launches:
        name = launch.kernel.__name__
        assert model.predict_launch(launch, H100, model.QUICK).guesses == 0 or name in DATA_DEPENDENT, name
