"""Plans of training steps: few blocks against all of them, fake ranks against real ones, sums, and the command."""

import dataclasses
import json
from pathlib import Path

import pytest

from clipfast.cli import main
from clipfast.kernels.hardware import CARDS, Cluster
from clipfast.models import add_model_config
from clipfast.plan import training_command
from clipfast.plan.fit import (
    CONTEXT,
    MODELS,
    SLACK,
    Assumptions,
    combinations,
    describe,
    fit,
    largest_rows,
    length,
    memory_of,
)  # fmt: skip
from clipfast.plan.page import table_rows
from clipfast.plan.probe import BACKWARD, FORWARD, Sample, probe
from clipfast.plan.setup import CHECKPOINTINGS, IMAGES, TEXTS, Setup, staged
from clipfast.plan.training import Batch, StepPlan, exchange, held, overlap
from clipfast.plan.training_check import check_training

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs the path of the CPU, and records kernels")
add_model_config(Path(__file__).parent / "deep.json")  # 6 and 5 blocks: more than are run
H100 = Cluster(CARDS["h100"])
NOTHING = Assumptions(context_bytes=0.0, slack=0.0)
DDP, FSDP = Setup("deep", 4), Setup("deep", 4, "fsdp")


def plan_of(setup: Setup, cluster: Cluster = H100) -> StepPlan:
    return StepPlan(setup, cluster, H100.card, CHECKPOINTINGS)


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
@pytest.mark.parametrize("setup", [dataclasses.replace(DDP, gpus=1), FSDP], ids=["alone", "fsdp"])
def test_few_blocks_and_two_batches_tell_of_all_blocks_and_a_third_batch(setup, checkpointing):
    found = probe(setup, H100.card, CHECKPOINTINGS)[checkpointing]
    with staged(setup, setup.config, H100.card) as rank:
        for kind in ("none", checkpointing):  # FSDP2 allocates in the first step what it keeps
            rank.set_checkpointing(kind)
            rank.step(1000)
        whole = Sample.of(rank.ledger)
    for phase, peak in found.peaks(1000).items():
        assert peak.total() == pytest.approx(whole.peaks[phase].total(), rel=0.01), phase
    for phase in (*FORWARD, *BACKWARD):
        assert found.flops(phase, 1000) == pytest.approx(sum(flops for flops, _ in whole.kernels[phase]))


@pytest.mark.long
@pytest.mark.skipif(ON_GPU, reason="compares runs on a CPU")
def test_real_steps_take_what_is_planned():
    rows = check_training(Setup("deep", 2, has_ema=True), Batch(24, 24))
    assert len(rows) == 2 * len(CHECKPOINTINGS) * 6
    assert not [row for row in rows if not row["agrees"]]


@pytest.mark.long
@pytest.mark.skipif(ON_GPU, reason="compares runs on a CPU")
def test_real_steps_of_micro_batches_take_what_is_planned():
    rows = check_training(Setup("deep", 3, precision="fp32", opt="sgd"), Batch(101, 34))
    assert not [row for row in rows if not row["agrees"]]


def test_sharding_divides_what_lives_from_step_to_step():
    whole = held(DDP, H100).bytes
    for gpus in (2, 4, 16):
        part = held(dataclasses.replace(FSDP, gpus=gpus), H100).bytes
        for name in ("weights", "gradients", "optimizer state"):
            # what has fewer rows than there are ranks is not cut evenly
            assert whole[name] / gpus <= part[name] <= whole[name] / gpus + 0.01 * whole["weights"]
    # DDP divides nothing
    assert held(dataclasses.replace(DDP, gpus=16), H100).bytes == whole


def test_gathered_weights_are_a_block_and_what_is_in_no_block():
    peaks = plan_of(FSDP).probe.peaks(64)
    *of_blocks, root = exchange(FSDP).gathered
    for phase in FORWARD:
        assert root + min(of_blocks) <= peaks[phase]["gathered weights"] <= root + 2 * max(of_blocks)
    deeper = dataclasses.replace(plan_of(FSDP).probe, more_images=100, more_texts=100).peaks(64)
    assert all(deeper[phase]["gathered weights"] == peaks[phase]["gathered weights"] for phase in FORWARD)


@pytest.mark.parametrize("setup", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_more_is_computed_again_the_less_is_kept(setup):
    plans = [plan_of(dataclasses.replace(setup, checkpointing=kind)) for kind in CHECKPOINTINGS]
    kept = [sum(plan.memory(Batch(512, 512))[name] for name in (IMAGES, TEXTS)) for plan in plans]
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]
    totals = [plan.memory(Batch(512, 512)).total() for plan in plans]
    assert totals == sorted(totals, reverse=True)
    seconds = [plan.times(Batch(4096, 4096))["backward"] for plan in plans]
    assert seconds == sorted(seconds)


def test_activations_are_those_of_a_micro_batch():
    plan = plan_of(FSDP)
    few, many = (plan.memory(Batch(rows, 64), with_loss=False) for rows in (128, 4096))
    assert {name: few[name] for name in (IMAGES, TEXTS)} == {name: many[name] for name in (IMAGES, TEXTS)}
    assert few["features"] * 32 == many["features"] > 0
    # twice as many forward passes, of half the pairs: as long each if the host that starts kernels is what limits
    once, parts = plan.times(Batch(4096, 4096)), plan.times(Batch(4096, 2048))
    assert 1.9 * once["forward"] <= parts["forward"] <= 4.1 * once["forward"]
    assert parts["update"] == once["update"]


def test_what_is_sent():
    share, batch, parts = 3 / 4, Batch(32, 32), Batch(32, 8)
    weights = held(DDP, H100).bytes["gradients"]
    assert plan_of(DDP).sent(batch)["gradients"] == round(2 * share * weights)
    assert plan_of(DDP).sent(parts)["gradients"] == round(2 * share * weights)  # once in a step
    *of_blocks, root = exchange(FSDP).gathered
    kept = plan_of(dataclasses.replace(FSDP, reshards=False))
    assert plan_of(FSDP).sent(batch)["weights"] == round(share * (2 * sum(of_blocks) + root))
    assert plan_of(FSDP).sent(parts)["weights"] == round(share * 4 * (3 * sum(of_blocks) + root))
    assert kept.sent(batch)["weights"] == round(share * (sum(of_blocks) + root))
    assert sum(exchange(FSDP).reduced) == sum(exchange(FSDP).gathered)  # both in float32
    assert plan_of(Setup("deep", 1)).sent(batch) == {}


def test_messages_hide_behind_the_blocks_that_compute():
    # the first group is waited for; the others arrive while the one before them computes
    assert overlap([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0] * 3) == pytest.approx(1.0)
    # each takes 3 to gather: group 1 starts to compute at 6, group 2 at 9
    assert overlap([3.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0] * 3) == pytest.approx(3 + 1 + 1)
    # what is reduced at the end is seen whole; before that it hides
    assert overlap([0.0, 0.0], [2.0, 2.0], [1.0, 1.0]) == pytest.approx(1.0)
    # on one wire: gathered from 0 to 1 and from 1 to 2, reduced from 3 to 7 and, after the second block, from 7 to 11
    assert overlap([1.0, 1.0], [2.0, 2.0], [4.0, 4.0]) == pytest.approx(11 - 4)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("setup", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_largest_batch_fits_and_the_next_does_not(setup, micro_batches):
    cluster = Cluster(dataclasses.replace(H100.card, memory_bytes=200e6))
    plan, assumed = plan_of(setup, cluster), Assumptions(context_bytes=50e6, slack=0.1)
    rows = largest_rows(plan, assumed, micro_batches)
    step = 8 * micro_batches
    assert rows > 0
    assert rows % step == 0
    at = [memory_of(plan, Batch(n, n // micro_batches), assumed).total() <= 200e6 for n in (rows, rows + step)]
    assert at == [True, False]


def test_nothing_fits_a_card_that_is_too_small():
    cluster = Cluster(dataclasses.replace(H100.card, memory_bytes=1e6))
    assert largest_rows(plan_of(DDP, cluster), NOTHING) == 0
    (row,) = fit([DDP], cluster, NOTHING)
    assert (row["fits"], row["is_best"], row["batch_per_gpu"]) == (False, False, 0)
    assert "none fits" in training_command.fit_table([row])


def test_what_is_assumed_comes_on_top():
    plan, batch = plan_of(DDP), Batch(64, 64)
    bare, more = (memory_of(plan, batch, assumed) for assumed in (NOTHING, Assumptions(3e9, 0.5)))
    assert more.total() == pytest.approx(1.5 * bare.total() + 3e9)
    assert (more[CONTEXT], more[SLACK]) == (3e9, pytest.approx(0.5 * bare.total(), abs=1))


def test_the_length_of_a_training():
    # 12.8e9 pairs at 10,000 a second are 1,280,000 seconds
    found = length(Assumptions(samples_seen=12_800_000_000, price=2.5), 8, 10_000)
    assert found["days"] == pytest.approx(1_280_000 / 86_400)
    assert found["gpu_hours"] == pytest.approx(1_280_000 / 3600 * 8)
    assert found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    assert "cost" not in length(Assumptions(samples_seen=1), 8, 1.0)


def test_utilisation_does_not_count_what_is_computed_again():
    rows = [describe(plan_of(setup), Batch(512, 512), NOTHING) for setup in combinations(DDP, ["deep"], None, None)]
    flops = [row["mfu"] * row["time"] for row in rows]
    assert len(rows) == 6
    assert flops == pytest.approx([flops[0]] * 6)
    assert all(row["pairs_per_s"] == pytest.approx(4 * 512 / sum(row["time_by_part"].values())) for row in rows)


def test_fit_command(capsys, tmp_path):
    path = tmp_path / "fit.json"
    options = ["--samples-seen", "1e9", "--price-per-gpu-hour", "2", "--json", str(path), "--memory-gb", "2"]
    assert main(["plan", "--fit", "--gpus", "4", "--models", "deep", "--ema", *options]) == 0
    out = capsys.readouterr().out
    saved = json.loads(path.read_text())
    rows = saved["steps"]
    assert [(row["parallel"], row["checkpointing"]) for row in rows] == [
        (parallel, kind) for parallel in ("ddp", "fsdp") for kind in CHECKPOINTINGS
    ]
    assert [row["is_best"] for row in rows].count(True) == 1
    assert max(rows, key=lambda row: row["pairs_per_s"])["is_best"]
    assert all(row["memory"] <= 2e9 and row["memory_by_category"]["average of weights"] > 0 for row in rows)
    texts = ["never measured", "fsdp2", "selective", "GPU-hours", "cost", f"{rows[0]['global_batch']:,}"]
    assert all(text in out for text in texts), out
    assert sum(line.startswith("*") for line in out.splitlines()) == 1


def test_train_command(capsys, tmp_path):
    path = tmp_path / "step.json"
    options = [
        "--parallel",
        "fsdp",
        "--checkpointing",
        "full",
        "--accumulation",
        "2",
        "--json",
        str(path),
        "--samples-seen",
        "1e6",
    ]
    assert main(["plan", "--train", "--model", "deep", "--gpus", "4", "--pairs", "200", *options]) == 0
    out = capsys.readouterr().out
    (step,) = json.loads(path.read_text())["steps"]
    assert (step["batch_per_gpu"], step["micro_batch"], step["global_batch"]) == (50, 25, 200)
    assert step["memory"] == sum(step["memory_by_category"].values())
    assert step["time"] == pytest.approx(sum(step["time_by_part"].values()))
    parts = [*step["memory_by_category"], *step["time_by_part"], *step["sent_by_part"]]
    assert all(f"  {name} " in out for name in parts)
    assert "  fits into 80.0 GB" in out
    assert f"1,000,000 pairs: {24 * step['days']:.2g} hours, " in out
    assert "(assumed)" in out
    assert main(["plan", "--train", "--model", "deep", "--gpus", "1", "--memory-gb", "0.001"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fit", "--train", "--model", "deep"], "--fit and --train"),
        (["--ema"], "--ema belongs to a training step"),
        (["--samples-seen", "1e9"], "add --train or --fit"),
        (["--train"], "--train needs --model"),
        (["--fit", "--pairs", "8"], "--pairs has no effect with --fit"),
        (["--fit", "--batch-size", "8"], "--batch-size has no effect with --fit"),
        (["--fit", "--check"], "--check has no effect with --fit"),
        (["--fit", "--model", "deep", "--models", "deep"], "leave one out"),
        (["--fit", "--models", "deep,no-model"], "unknown model 'no-model'"),
        (["--fit", "--models", ""], "unknown model ''"),
        (["--train", "--model", "deep", "--models", "deep"], "--models has no effect with --train"),
        (["--train", "--model", "deep", "--largest"], "--largest has no effect with --train"),
        (["--train", "--model", "deep", "--dtype", "fp32"], "set --precision"),
        (["--train", "--model", "deep", "--price-per-gpu-hour", "2"], "needs --samples-seen"),
        (["--train", "--model", "deep", "--batch-size", "8", "--pairs", "8"], "leave one out"),
        (["--train", "--model", "deep", "--batch-size", "8", "--accumulation", "9"], "more than the 8 pairs"),
        (["--train", "--model", "deep", "--opt", "none-such"], "--opt must be one of"),
        (["--train", "--model", "deep", "--opt", "muon", "--parallel", "fsdp"], "set --parallel ddp"),
        (["--fit", "--models", "deep", "--opt", "muon"], "set --parallel ddp"),
        (["--train", "--model", "deep", "--no-reshard"], "--no-reshard is of FSDP2"),
        (["--train", "--model", "ViT-B-16-SigLIP"], "sigmoid loss"),
        (["--train", "--model", "deep", "--card", "h9000"], "--card: unknown"),
        (["--train", "--model", "deep", "--check", "--gpus", "9"], "2 to 8 ranks"),
        (["--train", "--model", "deep", "--check", "--parallel", "ddp"], "--check tries every value"),
        (["--train", "--model", "deep", "--check", "--samples-seen", "5"], "--samples-seen has no effect with --check"),
        (["--train", "--model", "deep", "--slack", "-1"], "at least 0"),
        (["--train", "--model", "deep", "--samples-seen", "nan"], "finite"),
        (["--train", "--model", "deep", "--samples-seen", "inf"], "finite"),
        (["--train", "--model", "deep", "--checkpointing", "some"], "invalid choice"),
    ],
)
def test_what_does_not_go_together(capsys, arguments, said):
    try:
        code = main(["plan", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_the_page_has_what_the_code_says():
    page = (Path(__file__).parent.parent.parent / "docs" / "plan.md").read_text()
    table = [row for row in page.splitlines() if row.startswith("| ViT-")]
    assert [row.split()[1] for row in table] == [model for model in MODELS for _ in range(6)]
    for row, expected in zip(table, table_rows(MODELS[:1]), strict=False):
        cells, wanted = ([cell.strip() for cell in line.strip("|").split("|")] for line in (row, expected))
        assert cells[:5] == wanted[:5]
        # Times are sums whose order may differ.
        pairs, expected_pairs = (float(found[7].replace(",", "")) for found in (cells, wanted))
        assert pairs == pytest.approx(expected_pairs, rel=1e-3)
