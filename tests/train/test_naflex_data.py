"""The data of a NaFlex run: one order on any ranks and workers, epochs of pairs or tokens, and what can change."""

import hashlib

import pytest

from clipfast.data import BudgetedBatches
from clipfast.distributed.world import World
from clipfast.models import CLIPConfig, build
from clipfast.models.packed_images import PackedImages
from clipfast.models.tokenizer import Tokenizer
from clipfast.train.batches import epochs_in, plan_of
from clipfast.train.data import TrainingData

from ..small_runs import sample, write_shard
from .test_naflex_step import CONFIG
from .test_training import config

PAIRS = 48
NAFLEX = {
    "use_naflex": True, "unique_by": None, "naflex_seq_lens": (4, 9, 16), "naflex_seq_len_probs": (1.0, 2.0, 1.0),
    "naflex_max_tokens_per_batch": 36, "naflex_batch_divisor": 2, "train_num_samples": None, "epochs": 3,
}  # fmt: skip


@pytest.fixture
def given(tmp_path):
    """A function that returns the options of a NaFlex run on 48 pairs, with changes."""
    write_shard(tmp_path / "p.tar", [sample(index) for index in range(PAIRS)])
    return lambda **options: config(f"{tmp_path}/p.tar", tmp_path, **NAFLEX | options)


def begun(config, processes):
    """Return the entry of a checkpoint of a run that has begun with so many processes."""
    return {"stream": TrainingData(config, plan_of(config, World(size=processes), {})).state_dict()}


def test_the_order_does_not_know_of_ranks_and_workers(given):
    model, digests = build(CLIPConfig.from_dict(CONFIG)), set()
    for ranks, workers in ((1, 0), (2, 1), (3, 2)):
        found, options = hashlib.sha256(), given(workers=workers)
        saved = begun(options, 6)
        worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
        data = [TrainingData(options, plan_of(options, world, saved), world) for world in worlds]
        assert [each.total_steps for each in data] == [data[0].total_steps] * ranks
        made = [each.batches(2, model, Tokenizer(12), pin_memory=False) for each in data]
        for number, parts in enumerate(zip(*made, strict=True), 2):
            assert sum(map(len, parts)) == data[0].plan[number].pairs
            assert all(isinstance(part.images, PackedImages) for part in parts)
            names = [name for each in data for name in each.names(number)]
            texts = [[id_ for id_ in text if id_] for part in parts for text in part.texts.tolist()]
            assert len(names) == len(texts)
            found.update(repr((names, texts)).encode())
        assert number == data[0].total_steps - 1
        digests.add(found.hexdigest())
    assert len(digests) == 1


def test_epochs_of_pairs_and_of_tokens(given):
    data = TrainingData(given())
    sizes = [data.plan[number] for number in range(data.total_steps)]
    assert sum(size.pairs for size in sizes) >= 3 * PAIRS > sum(size.pairs for size in sizes[:-1])
    ends = [step for step in range(1, data.total_steps + 1) if data.epochs.ends_with(step)]
    assert ends == [data.epochs.steps_before(epoch) for epoch in (1, 2, 3)]
    assert [data.epochs.after(end).number for end in ends[:2]] == [1, 2]

    data = TrainingData(given(naflex_num_train_image_tokens=1000))
    tokens = [size.pairs * size.seq_len for size in (data.plan[number] for number in range(data.total_steps))]
    assert sum(tokens) >= 3000 > sum(tokens[:-1])
    for epoch in (1, 2, 3):
        steps = data.epochs.steps_before(epoch)
        assert sum(tokens[:steps]) >= 1000 * epoch > sum(tokens[: steps - 1])
    assert epochs_in(data.state_dict()).steps_before(2) == data.epochs.steps_before(2)

    data = TrainingData(given(samples_seen=70, epochs=type(data.config).epochs))
    assert (
        sum(data.plan[number].pairs for number in range(data.total_steps - 1))
        < 70
        <= data.epochs.plan.before(data.total_steps)
    )


@pytest.mark.parametrize(
    ("change", "processes"),
    [
        ({}, 6),
        ({"epochs": 5, "lr": 1e-4, "workers": 2}, 6),
        ({"naflex_max_tokens_per_batch": 72}, 3),
        ({"naflex_seq_len_probs": ()}, 3),
        ({"naflex_patch_sizes": (4, 8)}, 3),
    ],
)
def test_a_run_keeps_its_batches_unless_its_options_change(change, processes, given):
    saved = begun(given(), 6)
    plan = plan_of(given(**change), World(size=3), saved)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique_by": "label"}, "--unique-by label deals pairs to batches of equal sizes"),
        ({"naflex_max_tokens_per_batch": 400}, "hold 48 pairs, less than one batch of 100: lower --naflex-max-tokens"),
        ({"train_num_samples": 7}, "--train-num-samples 7 is less than one batch of 8 pairs"),
        ({"naflex_num_train_image_tokens": 31}, "image-tokens 31 is less than one batch of 36 tokens"),
        ({"naflex_num_train_image_tokens": 10**18}, "a run of 3000000000000000000 tokens has more than 2147483648 bat"),
    ],
)
def test_refused(options, message, given):
    with pytest.raises(ValueError, match=message):
        TrainingData(given(**options))


def test_synthetic_pairs_are_drawn_one_by_one(given):
    data = TrainingData(given(train_data="synthetic:40"))
    model = build(CLIPConfig.from_dict(CONFIG))
    batch = next(data.batches(0, model, Tokenizer(12), pin_memory=False))
    assert isinstance(batch.images, PackedImages)
    assert batch.images.grids.unique(dim=0).shape == (1, 2)
