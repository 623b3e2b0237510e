"""Plans: formulas against what runs really allocate, multiply and send, and what the command says."""

import dataclasses
import functools
import json
import re

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast.cli import main
from clipfast.kernels.contrastive import cpu_blocks as cpu
from clipfast.kernels.contrastive import distributed
from clipfast.kernels.launch import record_launches
from clipfast.plan import Machine, Problem, flops, largest_pairs, memory, predict, predict_all, traffic
from clipfast.plan import check as checks
from clipfast.plan.check import RECORDED_ARCH, check, scratch_of
from clipfast.plan.formulas import MODES_OF_MANY, MODES_OF_ONE, OPENCLIP, VECTORS, launches
from clipfast.plan.machine import CARDS
from clipfast.plan.measure import CPU, CUDA, RECORDED, Ledger, Measured, measure_rank
from clipfast.plan.scratch import Operand

from ..conftest import INTERPRET, ON_GPU
from ..process_group import run_ranks

measured_on_cpu = pytest.mark.skipif(INTERPRET or ON_GPU, reason="measures the CPU path")
# Copies of 16-bit operands on a CPU, and on a GPU of rows that are not aligned; two ranks, which hold fewer blocks than
# three do; more rows than a strip; products of pairs for the gradient of the scale.
PROBLEMS = [
    Problem(768, 256, 3, torch.float32),
    Problem(510, 300, 3, torch.bfloat16),
    Problem(512, 256, 2, torch.float16),
    Problem(1100, 256, 1, torch.float32),
    Problem(600, 256, 1, torch.bfloat16),
]


@pytest.mark.skipif(not ON_GPU, reason="measures the GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES_OF_ONE)
def test_memory_on_a_gpu(mode, dtype):
    problem = Problem(8192, 512, 1, dtype)
    predicted = memory(problem, mode, scratch_of(problem, CUDA)).total
    assert measure_rank(problem, mode, CUDA).peak_bytes == pytest.approx(predicted, rel=0.03)


class Launches(TorchDispatchMode):
    """Kernels that the host would start on a GPU: recorded ones, and operations of PyTorch that compute."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "promote_types", "scalar_tensor")

    def __init__(self, recorded):
        super().__init__()
        self.recorded, self.count = recorded, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        self.count += len(self.recorded) + (func.namespace == "aten" and not func.is_view and name not in self.FREE)
        self.recorded.clear()
        return func(*args, **(kwargs or {}))


def launches_of_a_rank():
    found = {}
    for mode in MODES_OF_MANY:
        image, text = (torch.randn(32, 64).bfloat16().requires_grad_() for _ in range(2))
        with record_launches(RECORDED_ARCH) as recorded, Launches(recorded) as seen:
            loss = distributed.distributed_contrastive_loss(image, text, 10.0, mode=mode)
            forward = seen.count
            loss.backward()
            found[mode] = forward, seen.count - forward
    return found


def open_clip_of_a_rank(**options):
    image, text = (torch.randn(200, 32, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    with Ledger([image, text, scale]) as ledger:
        open_clip.ClipLoss(**options)(image, text, scale).backward()
    return ledger.peak, ledger.flops, ledger.sent


def of_a_rank(rank):
    options = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": 3}
    return {"launches": launches_of_a_rank(), "open_clip": open_clip_of_a_rank(**options)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(of_a_rank, 3, folder=tmp_path_factory.mktemp("ranks"))


@measured_on_cpu
def test_kernels_that_the_host_starts(ranks):
    problem = Problem(96, 64, 3)
    blocks = {"gather": (1, 3), "ring": (3, 3), "scalars": (2, 2)}
    for mode, found in ranks[0]["launches"].items():
        pairs = zip(launches(problem, mode), blocks[mode], strict=True)
        assert list(found) == pytest.approx([whole + number * block for (whole, block), number in pairs], rel=0.05), (
            mode
        )


@measured_on_cpu
def test_open_clip(ranks):
    for gpus, measured in [(1, [open_clip_of_a_rank()]), (3, [rank["open_clip"] for rank in ranks])]:
        problem = Problem(200 * gpus, 32, gpus, torch.float32)
        for peak, count, sent in measured:
            assert peak == pytest.approx(memory(problem, OPENCLIP, scratch_of(problem, CPU)).total, rel=0.05)
            assert count == sum(flops(problem, OPENCLIP))
            assert sent == sum(exchange.bytes for exchange in traffic(problem, OPENCLIP))


@measured_on_cpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.gpus}-{p.pairs}-{p.embed_dim}-{p.dtype}")
def test_formulas_are_what_a_run_takes(problem, monkeypatch):
    if problem.gpus == 1:  # in this process: chunks of some rows only
        monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 2**17)
    rows = check(problem)
    assert {(row.path, row.mode) for row in rows} == {
        (path, mode) for path in (CPU, RECORDED) for mode in problem.modes
    }
    wrong = [row for row in rows if not row.agrees]
    assert not wrong, wrong


def test_ledger():
    given = torch.zeros(1000)
    with Ledger([given]) as ledger:
        one = given + 1  # 4000 bytes
        one[::2].add_(1)  # a view
        two = torch.cat([one, one])  # 8000
        del one
        torch.zeros(1000)  # 4000, in place of what was let go
        torch.mm(two.view(50, 40), two.view(40, 50), out=torch.empty(50, 50))  # 10000
        torch.zeros(50, 50).addmm_(two.view(50, 40), two.view(40, 50))
    assert ledger.peak == 18000
    assert ledger.flops == 2 * 2 * 50 * 50 * 40
    assert (ledger.sent, ledger.messages) == (0, 0)


class NoScratch:
    """Blocks that hold nothing."""

    packed_row = widened_rows = 0

    def operand(self, rows):
        return Operand()

    def stats(self, m, n):
        return 0

    gradients = stats

    def finish(self, rows):
        return 0


def test_docs_state_the_same_formulas():
    lines = re.findall(r"^    (gather|ring|scalars) +(.+?)  +(.+?)  +(.+?)  +(.+)$", distributed.__doc__, re.MULTILINE)
    assert [line[0] for line in lines] == list(MODES_OF_MANY)
    problem = Problem(4 * 100_000, 64, 4)
    row, wide = problem.features // problem.rows, problem.sums // problem.rows
    names = {"W": problem.gpus, "N": problem.total * row, "b": problem.features, "B": problem.rows * wide}
    for mode, *stated in lines:
        forward, backward, count, held = (
            re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula.replace("b'", "B")) for formula in stated
        )
        exchanges = [e for e in traffic(problem, mode) if "text" in e.what]
        for formula, when in ((forward, "forward"), (backward, "backward")):
            assert eval(formula, names) == sum(e.bytes for e in exchanges if e.when == when), (mode, when)
        sizes = {"b": problem.rows, "N": problem.total, "D": problem.embed_dim}
        assert eval(count, sizes) == sum(flops(problem, mode)), mode
        peak = memory(problem, mode, NoScratch())
        assert eval(held, names) == peak.total - peak.items[VECTORS], mode
        assert peak.items[VECTORS] == 4 * (12 * problem.total + problem.rows)


def test_pairs_are_the_same_on_every_gpu():
    problem = Problem(1000, 8, 3)
    assert (problem.rows, problem.total) == (334, 1002)


@pytest.mark.parametrize(("pairs", "gpus"), [(1024 * 9, 9), (8192, 8), (2**21, 8), (2**20, 64)])
def test_auto_is_what_the_loss_takes(pairs, gpus):
    problem = Problem(pairs, 512, gpus)
    expected = distributed.choose_mode([problem.rows] * gpus, 512, torch.bfloat16)
    assert [p.mode for p in predict_all(problem, Machine()) if p.is_auto] == [expected]


def test_one_gpu_has_no_auto_and_sends_nothing():
    predictions = predict_all(Problem(32768, 512), Machine())
    assert [p.mode for p in predictions] == [*MODES_OF_ONE, OPENCLIP]
    assert not any(p.is_auto or p.messages or any(p.sent) or p.exposed_s for p in predictions)
    ours = predictions[0]
    # 8 N^2 D at the card's rate, and the host's time for what is no block
    assert ours.seconds == pytest.approx(8 * 32768**2 * 512 / 794.5e12, rel=0.12)


def test_what_travels_while_a_block_is_computed_adds_nothing():
    """4 ranks of 1000 pairs: by hand, one second for each product of a block, and the wire that is said."""
    problem = Problem(4000, 100, 4)
    machine = functools.partial(Machine, tflops=2 * 1000 * 1000 * 100 / 1e12, latency_us=0, launch_us=0)
    texts, sums = problem.features / 1e9, problem.sums / 1e9  # in GB

    def seconds(mode, gbs):
        return predict(problem, mode, machine(link_gbs=gbs)).seconds

    # sums of a block in 1 s, texts in 0.5 s: 4 s forward after 1.5 s of texts; 4 blocks of 3 s, and 1 s for the last
    assert seconds("gather", sums) == pytest.approx(1.5 + 4 + 12 + 1, rel=0.1)
    # in 6 s: 9 s of texts, 4 s; 3 s for the first block, and 6 s for the sums of each
    assert seconds("gather", sums / 6) == pytest.approx(9 + 4 + 3 + 4 * 6, rel=0.15)
    # texts in 1 s, behind blocks of 1 s; backward sums as well, in 2 s, behind blocks of 3 s; the last in 2 s
    assert seconds("ring", texts) == pytest.approx(4 + 12 + 2, rel=0.15)
    # both in 0.5 s, 3 messages each, before 8 s of statistics; 16 s of gradients
    assert seconds("scalars", 2 * texts) == pytest.approx(2 * 1.5 + 8 + 16, rel=0.1)


def test_between_nodes_a_ring_has_one_adapter():
    machine = Machine("h100", network_gbs=20)
    assert [machine.wire_bytes_per_s(gpus, ring=ring) for gpus in (8, 9) for ring in (False, True)] == [
        450e9, 450e9, 160e9, 20e9,
    ]  # fmt: skip


@pytest.mark.parametrize("gpus", [1, 64])
def test_largest_pairs_fit_and_more_do_not(gpus):
    machine = Machine(memory_gb=10)
    problem = Problem(64, 512, gpus)
    for mode in (*problem.modes, OPENCLIP):
        most = largest_pairs(problem, mode, machine)
        at = [predict(dataclasses.replace(problem, pairs=pairs), mode, machine).fits for pairs in (most, most + gpus)]
        assert at == [True, False], mode
    assert largest_pairs(problem, "openclip", Machine(memory_gb=1e-6)) == 0


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_plan(capsys, card, dtype):
    assert main(["plan", "--pairs", "1048576", "--gpus", "64", "--card", card, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    expected = ["gather", "ring", "scalars", "openclip", "(auto)", "never measured on a GPU", f"16,384 pairs, {card}"]
    assert all(text in out for text in expected), out
    # OpenCLIP's logits: 16 bytes x 16,384 x 1,048,576
    assert re.search(r"openclip .* logits 256 GiB", out)


def test_json(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["plan", "--pairs", "32768", "--gpus", "256", "--json", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert plan["problem"] == {"pairs": 32768, "rows": 128, "embed_dim": 512, "gpus": 256, "dtype": "bfloat16"}
    (scalars,) = [mode for mode in plan["modes"] if mode["is_auto"]]
    assert scalars["mode"] == "scalars"
    assert sum(scalars["flops"].values()) == 12 * 128 * 32768 * 512
    assert scalars["memory_bytes"]["total"] == sum(scalars["memory_bytes"]["items"].values())
    assert "Predicted" in plan["note"]


def fake_measurement(problem, runs):
    found = []
    for path, mode in runs:
        exchanges = traffic(problem, mode)
        sent = tuple(sum(e.bytes for e in exchanges if e.when == when) for when in ("forward", "backward"))
        peak = memory(problem, mode, scratch_of(problem, path)).total
        found.append(Measured(peak, flops(problem, mode), sent, sum(e.messages for e in exchanges)))
    return found


@pytest.mark.parametrize("what", ["memory", "FLOPs", "sent forward", "sent backward", "messages"])
def test_check_says_which_formula_is_wrong(capsys, tmp_path, monkeypatch, what):
    def wrong(problem, runs):
        first, *rest = fake_measurement(problem, runs)
        change = {
            "memory": {"peak_bytes": int(first.peak_bytes * 1.05)},
            "FLOPs": {"flops": (first.flops[0] + 2, first.flops[1])},
            "sent forward": {"sent": (first.sent[0] + 1, first.sent[1])},
            "sent backward": {"sent": (first.sent[0], first.sent[1] + 1)},
            "messages": {"messages": first.messages + 1},
        }
        return [dataclasses.replace(first, **change[what]), *rest]

    monkeypatch.setattr(checks, "measure", fake_measurement)
    assert main(["plan", "--check"]) == 0
    assert "30 figures: 30 as predicted, 0 not." in capsys.readouterr().out
    monkeypatch.setattr(checks, "measure", wrong)
    path = tmp_path / "check.json"
    assert main(["plan", "--check", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert re.findall(r"(\w+) +(\w[\w ]*?)  .*WRONG", out) == [("gather", what)], out
    assert [row["what"] for row in json.loads(path.read_text())["check"] if not row["agrees"]] == [what]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ["clipfast plan --pairs 32768", "--check", "exit code", "These are predictions"])


BAD = [
    (["--pairs", "0"], "--pairs must be at least 1, got 0"),
    (["--gpus", "-2"], "--gpus must be at least 1, got -2"),
    (["--embed-dim", "0"], "--embed-dim must be at least 1, got 0"),
    (["--pairs", "many"], "argument --pairs: invalid int value: 'many'"),
    (["--dtype", "fp8"], "--dtype: unknown 'fp8'; known: bf16, fp16, fp32"),
    (["--card", "v100"], "--card: unknown 'v100'; known: a100, h100, h200, b200. For another, take the nearest"),
    (["--tflops", "0"], "--tflops must be more than 0, got 0.0"),
    (["--memory-gb", "nan"], "--memory-gb must be more than 0, got nan"),
    (["--latency-us", "-1"], "--latency-us must not be negative, got -1.0"),
    (["--gpus-per-node", "0"], "--gpus-per-node must be more than 0, got 0"),
    (["--check", "--gpus", "9"], "--gpus must be at most 8, got 9"),
    (["--check", "--pairs", "32768"], "--pairs must be at most 16384, got 32769"),
    (["--check", "--card", "h100"], "--card has no effect with --check: leave it out"),
    (["--json", "nowhere/plan.json"], "no folder nowhere to write plan.json in"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_clear_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["plan", *arguments])
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
