"""The data of a NaFlex run: ranks' parts of a batch, epochs of pairs or tokens, and options that change batches."""

import itertools

import pytest

from clipfast.data import BudgetedBatches
from clipfast.distributed.world import World
from clipfast.models import build
from clipfast.models.packed_images import PackedImages
from clipfast.models.registry import read_model_config
from clipfast.models.tokenizer import Tokenizer
from clipfast.train import TrainConfig
from clipfast.train.batches import epochs_in, plan_of
from clipfast.train.data import TrainingData
from clipfast.train.optim import parse_arguments

from ..small_runs import NAFLEX, cases, sample, write_shard
from .test_training import config

PAIRS = 48
OPTIONS = {
    "use_naflex": True, "unique_by": None, "naflex_seq_lens": (4, 9, 16), "naflex_seq_len_probs": (1.0, 2.0, 1.0),
    "naflex_max_tokens_per_batch": 36, "naflex_batch_divisor": 2, "train_num_samples": None, "epochs": 3,
}  # fmt: skip


@pytest.fixture
def given(tmp_path):
    """Return a function that returns the options of a NaFlex run on 48 pairs, with changes."""
    write_shard(tmp_path / "p.tar", [sample(index) for index in range(PAIRS)])
    return lambda **options: config(f"{tmp_path}/p.tar", tmp_path, **OPTIONS | options)


def begun(config, processes):
    """Return the checkpoint's entry about the data of a run that began on this number of processes."""
    return {"stream": TrainingData(config, plan_of(config, World(size=processes), {})).state_dict()}


def test_each_rank_names_its_part_of_a_batch(given):
    options = given()
    saved, worlds = begun(options, 6), [World(rank=rank, size=3) for rank in range(3)]
    named = [TrainingData(options, plan_of(options, world, saved), world).names(2) for world in worlds]
    whole = TrainingData(options, plan_of(options, World(), saved))
    assert list(itertools.chain(*named)) == whole.names(2)
    assert len(whole.names(2)) == whole.plan[2].pairs


@pytest.mark.parametrize(
    ("options", "amount", "unit"),
    [
        ({}, 3 * PAIRS, "pairs"),
        ({"naflex_num_train_image_tokens": 1000}, 3000, "tokens"),
        ({"samples_seen": 70, "epochs": TrainConfig.epochs}, 70, "pairs"),
    ],
)
def test_epochs_and_runs_are_of_pairs_or_tokens(options, amount, unit, given):
    data = TrainingData(given(**options))
    assert data.total_steps == data.plan.batches_for(amount, unit)
    two_epochs = data.plan.batches_for(2 * data.epochs.length, unit)
    assert data.epochs.steps_before(2) == epochs_in(data.state_dict()).steps_before(2) == two_epochs


@pytest.mark.parametrize(
    ("change", "processes"),
    [
        ("", 6),
        ("epochs=5 lr=1e-4 workers=2", 6),
        ("naflex_max_tokens_per_batch=72", 3),
        ("naflex_seq_len_probs=()", 3),
        ("naflex_patch_sizes=(4,8)", 3),
    ],
)
def test_a_run_keeps_its_batches_unless_its_options_change(change, processes, given):
    saved = begun(given(), 6)
    plan = plan_of(given(**parse_arguments(change.split())), World(size=3), saved)
    assert plan.budget.processes == processes
    before = epochs_in(saved["stream"])
    assert isinstance(before.plan, BudgetedBatches)
    same = [plan[number] for number in range(20)] == [before.plan[number] for number in range(20)]
    assert same == (processes == 6)


def test_ranks_that_do_not_divide_the_batches(given):
    saved = begun(given(), 6)
    with pytest.raises(ValueError, match="48 pairs, whose images have up to 4 patches, cannot be divided among 5"):
        plan_of(given(), World(size=5), saved)
    assert plan_of(given(), World(size=5), {}).largest == 40


@cases("""
unique_by=label: --unique-by label deals pairs to batches of equal sizes
naflex_max_tokens_per_batch=400: hold 48 pairs, less than one batch of 100: lower --naflex-max-tokens
train_num_samples=7: --train-num-samples 7 is less than one batch of 8 pairs
naflex_num_train_image_tokens=31: image-tokens 31 is less than one batch of 36 tokens
naflex_num_train_image_tokens=1000000000000000000: a run of 3000000000000000000 tokens has more than 2147483648 bat
""")
def test_refused(options, said, given):
    with pytest.raises(ValueError, match=said):
        TrainingData(given(**options))


def test_synthetic_pairs_are_drawn_one_by_one(given):
    data = TrainingData(given(train_data="synthetic:40"))
    model = build(read_model_config(NAFLEX))
    batch = next(data.batches(0, model, Tokenizer(12), pin_memory=False))
    assert isinstance(batch.images, PackedImages)
    assert batch.images.grids.unique(dim=0).shape == (1, 2)
