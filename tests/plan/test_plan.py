"""Plans of training steps: fake tensors against real ones, few blocks against all blocks, sums, and the command."""

import contextlib
import dataclasses
import functools
import json
import re
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import clipfast
from clipfast.cli.plan import fit_cells
from clipfast.kernels import fp8_linear
from clipfast.kernels.contrastive.modes import choose_mode
from clipfast.kernels.hardware import CARDS, FP8_SPEEDUP, Cluster
from clipfast.kernels.spec import lengths_of
from clipfast.models import add_model_config
from clipfast.plan.fit import (
    MODELS,
    Assumptions,
    Batch,
    StepPlan,
    combinations,
    describe,
    fit,
    largest_rows,
    memory_of,
    overlap,
)
from clipfast.plan.ledger import Event, Ledger
from clipfast.plan.loss import figures, predict, seconds
from clipfast.plan.planned_step import CHECKPOINTINGS, OPENCLIP, Problem, Setup, _ledger_of, rank_of, run_loss
from clipfast.plan.probe import BACKWARD, FORWARD, STATIC, probe, sample_of

from ..conftest import INTERPRET, ON_GPU
from ..processes import run_ranks
from ..small_runs import commands, refusal_of, run_command

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs the path of the CPU, and records kernels")
on_cpu = pytest.mark.skipif(ON_GPU, reason="compares runs on a CPU")
add_model_config(Path(__file__).parent / "deep.json")  # towers of 6 and 5 blocks, more than a probe runs
H100 = Cluster(CARDS["h100"])
NOTHING = Assumptions(context_bytes=0.0, slack=0.0)
DDP, FSDP = Setup("deep", 4), Setup("deep", 4, "fsdp")
COPIES = "copies of gloo"


def with_card(**changes) -> Cluster:
    """Return a cluster of H100 whose GPUs have the changed properties ``changes``, for a plan."""
    return Cluster(dataclasses.replace(H100.card, **changes))


def plan_of(setup: Setup, cluster: Cluster = H100) -> StepPlan:
    """Return the plan of a setup, with one cached probe for all kinds of checkpointing, which several tests share."""
    return StepPlan(setup, cluster, H100.card, CHECKPOINTINGS)


class Settled(Ledger):
    """A ledger that waits at a new peak of memory, since gloo's thread frees a block a little after it has arrived."""

    def _update_peak(self):
        """Wait a little if the memory in a plan's ledger rises above its peak, then update the peak."""
        if self.live.total() > self.peak.total():
            time.sleep(0.01)
        super()._update_peak()


def measured_losses(_, problems):
    """Compute real losses, and return their memory and FLOPs, to compare a plan with, by problem, card and mode."""
    return [
        {(card, mode): figures(run_loss(problem, mode, CARDS.get(card), is_fake=False, ledger_type=Settled))
         for card in ("h100", "none") for mode in problem.modes}
        for problem in problems
    ]  # fmt: skip


@on_cpu
@pytest.mark.parametrize(
    "problems",
    [
        # The first problem has features that a CPU widens, and the second has rows that are not aligned for a GPU.
        [Problem(384, 3, torch.float32, 256), Problem(255, 3, torch.bfloat16, 300)],
        # With fewer pairs on one rank, a CPU would compute all logits at once.
        [Problem(1100, 1, torch.bfloat16, 256)],
    ],
    ids=["3 ranks", "1 rank"],
)
def test_a_fake_loss_takes_what_a_real_one_takes(problems, tmp_path, one_thread):
    gpus = problems[0].gpus
    ranks = run_ranks(measured_losses, gpus, problems, folder=tmp_path) if gpus > 1 else [measured_losses(0, problems)]
    for number, problem in enumerate(problems):
        for card, mode in ranks[0][number]:
            fake = figures(run_loss(problem, mode, CARDS.get(card)))
            for what, expected in fake.items():
                most = max(rank[number][card, mode][what] for rank in ranks)
                # A block of features that a rank has sent may take memory for a moment longer.
                assert most == (pytest.approx(expected, rel=0.03) if what == "memory" else expected), (card, mode, what)
        for mode in problem.modes:  # the matrix products on a CPU have the FLOPs of the GPU's kernels
            # Here the gradient G of the logits is one block on a GPU, so memory="min" computes no logits again.
            alike = "default" if mode == "min" else mode
            assert ranks[0][number]["none", alike]["FLOPs"] == ranks[0][number]["h100", mode]["FLOPs"] > 0


@pytest.mark.skipif(not ON_GPU, reason="measures the GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["default", "min"])
def test_memory_on_a_gpu(mode, dtype):
    major, _ = torch.cuda.get_device_capability()
    card = next(card for card in CARDS.values() if card.arch == 10 * major)
    image, text = (F.normalize(torch.randn(8192, 512, device="cuda"), dim=-1).to(dtype) for _ in range(2))
    for _ in range(2):  # the first of the two calls compiles the kernels
        sides = [side.detach().requires_grad_() for side in (image, text)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clipfast.contrastive_loss(*sides, 14.3, memory=mode).backward()
        measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(run_loss(Problem(8192, dtype=dtype), mode, card).peak["loss"], rel=0.03)


# The table in kernels/contrastive/distributed.py for four ranks: FLOPs over b N D, and the rows of features that are
# sent forward, sent backward and held. A pair of numbers counts rows in the features' dtype and rows in float32.
DOCUMENTED = {
    "gather": (8, (3, 0), (0, 3), (4, 4)),
    "ring": (8, (3, 0), (3, 4), (2, 5)),
    "scalars": (12, (6, 0), (0, 0), (10, 2)),
}


def test_a_step_is_planned_in_the_mode_of_its_nodes():
    problem = Problem(8192, 8, torch.bfloat16, 128)
    for gpus_per_node, mode in ((8, "gather"), (2, "scalars")):
        plan = StepPlan(Setup("ViT-T-8-32", 8), dataclasses.replace(H100, gpus_per_node=gpus_per_node), H100.card)
        assert len(plan._loss(Batch(1024, 1024)).events) == len(run_loss(problem, mode, H100.card).events)


@pytest.mark.parametrize("mode", DOCUMENTED)
def test_loss_takes_what_its_docs_say(mode):
    b, width = 1024, 4096
    flops, *rows = DOCUMENTED[mode]
    for dtype in (torch.bfloat16, torch.float32):
        ledger = run_loss(Problem(4 * b, 4, dtype, width), mode, H100.card)
        found = figures(ledger)
        forward, backward, held = (b * width * (dtype.itemsize * narrow + 4 * wide) for narrow, wide in rows)
        assert found["FLOPs"] == flops * b * 4 * b * width
        assert found["sent forward"] == forward + 4 * 3 * b * (0 if mode == "scalars" else 2)
        assert found["sent backward"] == backward + 4 * 3 * (6 * b + 1)
    # The last dtype of the loop is float32, so no features are widened. The peak also has vectors, at most 1% of it,
    # and the gradient of a block of logits, which has at most all columns.
    assert held <= ledger.peak["loss"] <= 1.01 * held + 4 * b * 4 * b


def test_open_clip():
    open_clip = pytest.importorskip("open_clip")
    b, width = 256, 64
    for gpus in (1, 4):
        found = figures(run_loss(Problem(b * gpus, gpus, torch.float32, width), OPENCLIP, None))
        assert found["FLOPs"] == 12 * b * b * gpus * width
        assert found["sent forward"] == found["sent backward"] == 2 * (gpus - 1) * b * width * 4
    image, text = (F.normalize(torch.randn(b, width), dim=-1).requires_grad_() for _ in range(2))
    with Ledger() as real:
        open_clip.ClipLoss()(image, text, torch.tensor(14.3, requires_grad=True)).backward()
    fake = run_loss(Problem(b, 1, torch.float32, width), OPENCLIP, None)
    assert figures(real)["memory"] == pytest.approx(figures(fake)["memory"], rel=0.05)


def test_clocks_hide_messages_behind_kernels():
    card = dataclasses.replace(H100.card, half_peak=1.0, half_reached=1.0, link_bytes_per_s=1.0)
    took = functools.partial(seconds, cluster=Cluster(card, launch_s=0.5, latency_s=0.25, short_latency_s=0.25), gpus=4)
    kernel, message = Event("a", 1, frozenset({1}), flops=3), Event("a", 4, frozenset({2}), 0, "reduce", 1)
    reader = Event("b", 1, frozenset({2}), flops=1)
    # The message starts at 3.5 and takes 4.25. The next kernel ends at 6.5, and the message's reader starts at 7.75.
    assert took([kernel, message, kernel, reader]) == {"a": 6.5, "b": 2.25}
    assert took([kernel, message, kernel, reader], with_messages=False) == {"a": 6.5, "b": 1.0}
    # In the first of these two runs, the host is slower than the GPU; in the second, no kernel waits for the message.
    assert took([dataclasses.replace(kernel, flops=0)] * 4)["a"] == pytest.approx(2.0)
    assert took([kernel, message])["a"] == pytest.approx(3.5 + 4.25)


def test_between_nodes_a_ring_has_one_adapter():
    cluster = with_card(network_bytes_per_s=20e9)
    rates = [cluster.bytes_per_s(gpus, is_ring=is_ring) for gpus in (8, 9) for is_ring in (False, True)]
    assert rates == [450e9, 450e9, 160e9, 20e9]


ALONE = dataclasses.replace(DDP, gpus=1)
CAPTIONS = dataclasses.replace(ALONE, captions=True)


# The number of tokens of packed captions is rounded, so it is not quite linear in the batch size.
@pytest.mark.parametrize(
    ("setup", "of_memory", "of_flops"), [(ALONE, 0.01, 1e-6), (CAPTIONS, 0.03, 0.03)], ids=["alone", "captions"]
)
def test_few_blocks_and_two_batches_tell_of_all_blocks_and_a_third_batch(setup, of_memory, of_flops):
    probes = probe(setup, H100.card, CHECKPOINTINGS)
    with rank_of(setup, setup.config, H100.card) as rank:
        for kind, found in probes.items():
            rank.set_checkpointing(kind)
            rank.step(1000)
            whole = sample_of(rank.ledger)
            for phase in whole.peaks:
                assert found.peak(phase, 1000).total() == pytest.approx(whole.peaks[phase].sum(), rel=of_memory), phase
            for phase in (*FORWARD, *BACKWARD):
                assert found.flops(phase, 1000) == pytest.approx(whole.kernels[phase][:, 0].sum(), rel=of_flops)


class WithoutCopies(Ledger):
    """A ledger that ignores peaks while gloo holds a copy of the gradients to reduce-scatter; NCCL makes no copies."""

    def _update_peak(self):
        """Update the peak of a plan's ledger, except while a copy of gloo is alive."""
        if not self.live[COPIES]:
            super()._update_peak()


@contextlib.contextmanager
def marking_copies(ledger):
    """Count the memory of gloo's copies in a reduce-scatter of FSDP2 as a phase of its own of the plan's ledger."""

    def marked(function, *args, **options):
        """Call a reduce-scatter of FSDP2 in a phase of its own of the plan's ledger."""
        phase, ledger.phase = ledger.phase, COPIES
        try:
            return function(*args, **options)
        finally:
            ledger.phase = phase

    with contextlib.ExitStack() as stack:
        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # reduce_scatter_single is new in PyTorch 2.13
            if hasattr(dist, name):
                replaced = functools.partial(marked, getattr(dist, name))
                stack.enter_context(mock.patch.object(dist, name, replaced))
        yield


def all_reduce_mean(_, bucket):
    """Reduce a bucket of gradients as DDP does by itself, but in Python, where the plan's ledger sees it."""
    gradients = bucket.buffer().div_(dist.get_world_size())
    dist.all_reduce(gradients)
    future = torch.futures.Future()
    future.set_result(gradients)
    return future


def measured_steps(_, jobs, config):
    """Take real training steps, to compare with a plan; return memory by category, peak memory, and bytes sent."""
    return [measured_step(setup, config, batch) for setup, batch in jobs]


def measured_step(setup, config, batch):
    """Take a real training step; return memory by category, peak memory, and bytes sent."""
    with rank_of(setup, config, None, is_fake=False, ledger_type=WithoutCopies) as rank, marking_copies(rank.ledger):
        ledger = rank.ledger
        rank.set_checkpointing(setup.checkpointing)
        if not setup.is_sharded:
            rank.optimizer.zero_grad()
            ledger.phase = "gradients"
            rank.trained = DistributedDataParallel(rank.model, gradient_as_bucket_view=True, init_sync=False)
            rank.trained.register_comm_hook(None, all_reduce_mean)
        # In the first step, FSDP2 allocates memory that it keeps, and DDP makes the gradients views of its buckets.
        rank.step(*batch, is_whole=True)
        if not setup.is_sharded:
            ledger.phase = "gradients"
            rank.trained.reducer._rebuild_buckets()
        rank.step(*batch, is_whole=True)
        sent = sum(event.bytes for event in ledger.events if event.collective)
        return {name: ledger.live[name] for name in STATIC} | {"memory": ledger.peak.total(), "sent": sent}


@pytest.mark.long
@on_cpu
def test_real_steps_take_what_is_planned(tmp_path, one_thread):
    ddp, fsdp = (Setup("deep", 2, way, kind, has_ema=True) for way, kind in (("ddp", "selective"), ("fsdp", "full")))
    single = dataclasses.replace(fsdp, checkpointing="none", precision="fp32")
    jobs = [(ddp, Batch(24, 24)), (single, Batch(24, 24)), (fsdp, Batch(67, 34))]
    ranks = run_ranks(measured_steps, 2, jobs, ddp.config, folder=tmp_path, timeout=600.0)
    for number, (setup, batch) in enumerate(jobs):
        plan = StepPlan(setup, H100, None)
        plan.batches_held = 1
        memory, most = plan.memory(batch), {name: max(r[number][name] for r in ranks) for name in ranks[0][number]}
        assert {name: most[name] for name in STATIC} == {name: memory[name] for name in STATIC}
        assert most["memory"] == pytest.approx(memory.total(), rel=0.03), setup
        assert most["sent"] == pytest.approx(sum(plan.sent(batch).values()), rel=1e-4), setup


def test_messages_hide_behind_the_blocks_that_compute():
    # The GPU waits only for the gather of the first group. Later gathers arrive while the group before computes.
    assert overlap([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0] * 3) == pytest.approx(1.0)
    # Each gather takes 3, so groups 0, 1 and 2 start to compute at 3, 6 and 9.
    assert overlap([3.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0] * 3) == pytest.approx(3 + 1 + 1)
    # Only the last reduction adds to the time. The reduction before it runs while a group computes.
    assert overlap([0.0, 0.0], [2.0, 2.0], [1.0, 1.0]) == pytest.approx(1.0)
    # One link serves gathers from 0 to 1 and from 1 to 2, and reductions from 3 to 7 and from 7 to 11.
    assert overlap([1.0, 1.0], [2.0, 2.0], [4.0, 4.0]) == pytest.approx(11 - 4)


@pytest.mark.parametrize(("setup", "micro_batches"), [(DDP, 3), (FSDP, 1)], ids=["ddp", "fsdp"])
def test_the_largest_batch_fits_and_the_next_does_not(setup, micro_batches):
    plan, assumed = plan_of(setup, with_card(memory_bytes=200e6)), Assumptions(context_bytes=50e6, slack=0.1)
    rows = largest_rows(plan, assumed, micro_batches)
    step = 8 * micro_batches
    assert rows > 0
    assert rows % step == 0
    at = [memory_of(plan, Batch(n, n // micro_batches), assumed).total() for n in (rows, rows + step)]
    assert at[0] <= 200e6 < at[1]
    bare = memory_of(plan, Batch(rows, rows // micro_batches), NOTHING)
    assert at[0] == pytest.approx(1.1 * bare.total() + 50e6)


def test_nothing_fits_a_card_that_is_too_small():
    (row,) = fit([DDP], with_card(memory_bytes=1e6), NOTHING)
    assert (row["fits"], row["is_best"], row["batch_per_gpu"]) == (False, False, 0)
    assert "none fits" in fit_cells(row)


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", pytest.param(None, marks=pytest.mark.slow)])
def test_the_page_has_what_the_code_says(parallel):
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| ViT-" in line]
    assert [row[0].removesuffix(" *") for row in table] == [model for model in MODELS for _ in range(6)]
    rates = [float(row[7].replace(",", "")) for row in table]
    best = [max(range(first, first + 6), key=rates.__getitem__) for first in range(0, len(table), 6)]
    assert [number for number, row in enumerate(table) if row[0].endswith("*")] == best
    rows = fit(combinations(Setup("", 8), [MODELS[0]], parallel, "none"), H100, Assumptions())
    for number, row in enumerate(rows):
        assert table[3 * number][1:5] == fit_cells(row)[1:5]
        # Rates are near, not equal, since times are sums whose order may differ.
        assert rates[3 * number] == pytest.approx(row["pairs_per_s"], rel=1e-3)


class TestCommand:
    @pytest.fixture
    def planned(self, capsys, tmp_path):
        """Return a function that runs ``clipfast plan``, and returns its output and the plan from its JSON file."""

        def run(words):
            """Run ``clipfast plan``, and return its output and the plan from its JSON file."""
            code, out, error = run_command(capsys, "plan", *words.split(), "--json", tmp_path / "plan.json")
            assert (code, error) == (0, "")
            assert "never measured on a GPU" in out
            return out, json.loads((tmp_path / "plan.json").read_text())

        return run

    def test_loss(self, planned):
        out, saved = planned("--pairs 2304 --gpus 9 --card b200")
        assert "9 ranks of 256 pairs" in out
        assert [saved["problem"][key] for key in ("pairs", "rows", "gpus", "dtype")] == [2304, 256, 9, "bf16"]
        assert [mode["mode"] for mode in saved["modes"]] == ["gather", "ring", "scalars", "openclip"]
        (auto,) = [mode for mode in saved["modes"] if mode["is_auto"]]
        assert auto["mode"] == choose_mode([256] * 9, 512, torch.bfloat16) == "scalars"
        assert auto["FLOPs"] == 12 * 256 * 2304 * 512
        assert auto["memory"] == sum(auto["memory by category"].values())
        assert auto["time"] == pytest.approx(sum(auto["time by phase"].values()))
        assert auto["sent forward"] + auto["sent backward"] == auto["sent by collective"]["allgather"]["bytes"]
        assert not any(mode["is_auto"] for mode in predict(Problem(64), H100))

    def test_fit(self, planned):
        # The card has its published memory, so that the probes of the tests above are in the cache.
        options = "--ema --samples-seen 1e9 --price-per-gpu-hour 2 --context-gb 79.8"
        out, saved = planned(f"--fit --gpus 4 --model deep {options}")
        rows = saved["steps"]
        assert [(row["parallel"], row["checkpointing"]) for row in rows] == [
            (parallel, kind) for parallel in ("ddp", "fsdp") for kind in CHECKPOINTINGS
        ]
        assert [row["is_best"] for row in rows].count(True) == 1
        assert max(rows, key=lambda row: row["pairs_per_s"])["is_best"]
        for row in rows:
            assert 79.8e9 < row["memory"] <= 80e9
            assert row["memory_by_category"]["average of weights"] > 0
            assert row["pairs_per_s"] == pytest.approx(row["global_batch"] / row["time"])
            assert row["days"] == pytest.approx(1e9 / row["pairs_per_s"] / 86_400)
            assert row["cost"] == pytest.approx(2 * row["gpu_hours"]) == pytest.approx(2 * 4 * 24 * row["days"])
        assert sum(line.startswith("*") for line in out.splitlines()) == 1

    def test_train(self, planned):
        options = "--parallel fsdp --checkpointing full --accumulation 2 --samples-seen 1e6"
        out, saved = planned(f"--train --model deep --gpus 4 --pairs 200 --memory-gb 1.6 {options}")
        (step,) = saved["steps"]
        assert (step["batch_per_gpu"], step["micro_batch"], step["global_batch"]) == (50, 25, 200)
        assert step["memory"] == sum(step["memory_by_category"].values())
        assert step["time"] == pytest.approx(sum(step["time_by_part"].values()))
        parts = [*step["memory_by_category"], *step["time_by_part"], *step["sent_by_part"]]
        assert all(f"  {name} " in out for name in parts)
        assert "  fits into 1.60 GB" in out

    def test_captions(self, planned):
        captions = planned("--train --model ViT-T-8-32 --gpus 1 --pairs 512 --captions --launch-us 0")[1]["steps"][0]
        cluster = dataclasses.replace(H100, launch_s=0.0)
        texts = describe(StepPlan(Setup("ViT-T-8-32", 1), cluster, H100.card), Batch(512, 512), Assumptions())
        shares = [
            captions[part][name] / texts[part][name]
            for part, name in (("memory_by_category", "activations of texts"), ("time_by_part", "forward"))
        ]
        # Packed texts take more memory than their share of the tokens, since numbers of tokens are rounded up.
        assert sum(lengths_of(512, 77)) / (512 * 77) < shares[0] < 0.3
        assert shares[1] < 0.9

    @commands("""
--fit --train --model deep => --fit and --train
--ema => --ema has no effect
--model deep => --model has no effect .*--train
--train => --train needs --model
--fit --pairs 8 => --pairs has no effect on --fit
--fit --models deep,no-model => unknown model 'no-model'
--train --model deep --price-per-gpu-hour 2 => needs --samples-seen
--train --model deep --batch-size 8 --pairs 8 => leave one out
--train --model deep --batch-size 8 --accumulation 9 => more than the 8 pairs
--train --model deep --opt none-such => --opt must be one of
--fit --model deep --opt muon => set --parallel ddp
--train --model deep --no-reshard => --no-reshard is of FSDP2
--train --model ViT-B-16-SigLIP => sigmoid loss
--train --model deep --precision amp_fp8 --card a100 => --card a100 has no fp8
--train --model deep --fp8-recipe full => --fp8-recipe needs --precision amp_fp8
--captions => --captions has no effect
--train --model deep --slack -1 => at least 0
--train --model deep --samples-seen inf => finite
""")
    def test_what_does_not_go_together(self, capsys, words, said):
        error = refusal_of(capsys, "plan", *words)
        assert re.search(said, error), error


def test_a_step_in_8_bits_keeps_fewer_activations_and_takes_the_published_rate_of_a_product():
    kept, flops = {}, set()
    for precision, recipe in (("amp_bf16", "switchback"), ("amp_fp8", "full"), ("amp_fp8", "switchback")):
        plan = StepPlan(Setup("deep", 1, precision=precision, fp8_recipe=recipe), H100, H100.card)
        memory = plan.memory(Batch(64, 64))
        flops.add(plan.model_flops(64))
        kept[precision, recipe] = memory["activations of images"] + memory["activations of texts"]
    of_bf16, of_full, of_switchback = kept.values()
    # A block keeps 32 bytes a token and column in 16 bits, 27 by ``full``, and 20 without inputs of linear layers.
    assert 0.8 < of_full / of_bf16 < 0.95
    assert 0.55 < of_switchback / of_bf16 < 0.7
    assert len(flops) == 1
    with _ledger_of(H100.card, {}, Ledger, is_fake=True) as ledger:
        fp8_linear(torch.zeros(64, 32), torch.zeros(48, 32))
    assert [event.flops for event in ledger.events if event.is_fp8] == [round(2 * 64 * 32 * 48 / FP8_SPEEDUP)]
