"""Batches of packed images: equal for any number of ranks and workers, each image once, within the token budget."""

import dataclasses
import hashlib
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from clipfast.data import BudgetedBatches, CroppedToSequence, PackedBatches, TokenBudget, pair_loader
from clipfast.models.packed_images import pack_images
from clipfast.models.tokenizer import Tokenizer

from ..models.test_images import encoded, jpeg, photograph
from ..small_runs import sample, write_shard
from ..train.faults import faults, faulty_samples
from .conftest import opened, ordered

PAIRS = 60
BUDGET = TokenBudget((4, 9, 16), (1.0, 2.0, 1.0), max_tokens=108, divisor=6, processes=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write a shard of pictures of many shapes, JPEG and PNG, each with another caption."""
    shapes = [(40, 30), (30, 40), (90, 20), (16, 16), (25, 100)]
    samples = [sample(index) for index in range(PAIRS)]
    for index, files in enumerate(samples):
        picture = photograph(*shapes[index % 5], index)
        files["png"] = jpeg(picture) if index % 2 else encoded(picture)
    return write_shard(tmp_path_factory.mktemp("pictures") / "p.tar", samples)


def batches(shard, seed=3, budget=BUDGET, **options):
    """Return packed batches of a shard."""
    source, plan = opened(shard), BudgetedBatches(budget, seed)
    order = ordered(source, seed)
    return PackedBatches(
        [source], order, None, Tokenizer(16), plan.largest, seed, plan=plan, patch_size=8, **options
    )  # fmt: skip


def unpacked(images):
    """Return the grid and the patches of each packed image, in the order of the batch."""
    counts = images.grids.prod(1).tolist()
    parts = images.patches[: sum(counts)].split(counts)
    return [(images.grids[place].tolist(), parts[place]) for place in images.order.tolist()]


def digest(parts, count):
    """Return the SHA-256 of all pixels and texts in ``count`` batches; ``parts`` has each rank's part of a batch."""
    found, numbers = hashlib.sha256(), 0
    for ranks in zip(*parts, strict=True):
        for batch in ranks:
            for (grid, patches), text in zip(unpacked(batch.images), batch.texts, strict=True):
                found.update(repr((grid, text[text != 0].tolist())).encode() + patches.numpy().tobytes())
        numbers += 1
    assert numbers == count
    return found.hexdigest()


def test_the_order_does_not_know_of_ranks_and_workers(pictures):
    digests = set()
    for world_size, workers in ((1, 0), (2, 1), (3, 2)):
        made = [batches(pictures, rank=rank, world_size=world_size) for rank in range(world_size)]
        digests.add(digest([pair_loader(each, 2, 12, workers) for each in made], 10))
    assert len(digests) == 1
    whole = batches(pictures)
    assert digests != {digest([[batches(pictures, seed=4)[number] for number in range(2, 12)]], 10)}
    assert digests == {digest([[pickle.loads(pickle.dumps(whole))[number] for number in range(2, 12)]], 10)}


def test_no_batch_exceeds_the_budget_and_no_image_is_lost(pictures):
    made = batches(pictures, keeps_padding=True)
    texts, number = [], 0
    while len(texts) < 2 * PAIRS:
        batch, planned = made[number], made.plan[number]
        assert planned.first == len(texts)
        assert len(batch) == len(batch.texts) == planned.pairs
        counts = batch.images.grids.prod(1)
        assert counts.max() == batch.images.max_patches <= planned.seq_len
        assert counts.sum() == len(batch.images.patches) <= BUDGET.max_tokens * BUDGET.processes
        assert (counts.diff() <= 0).all()
        assert batch.images.patches.shape[1] == 8 * 8 * 3
        texts += map(tuple, batch.texts.tolist())
        number += 1
    assert {made.plan[index].seq_len for index in range(number)} == set(BUDGET.seq_lens)
    for begin in (0, PAIRS):
        assert max(Counter(texts[begin : begin + PAIRS]).values()) == 1


def test_images_are_crops_in_the_order_of_the_texts(pictures):
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    made = batches(pictures, crops=whole, keeps_padding=True)
    batch, planned, places = made[1], made.plan[1], made.samples(1)
    crop = CroppedToSequence(8, planned.seq_len, **whole)
    for (grid, patches), number, text in zip(unpacked(batch.images), places.sample.tolist(), batch.texts, strict=True):
        raw = made.sources[0].read(number)
        one = pack_images([crop(raw["png"])], 8)
        assert grid == one.grids[0].tolist()
        assert torch.equal(patches, one.patches)
        assert torch.equal(made.tokenizer([raw["txt"].decode()])[0], text)


def test_batches_draw_their_patch_size(pictures):
    sizes = dataclasses.replace(BUDGET, patch_sizes=(8, 16), patch_size_probs=(1.0, 1.0))
    made = batches(pictures, budget=sizes)
    widths = [made[number].images.patches.shape[1] for number in range(8)]
    assert widths == [3 * made.plan[number].patch_size ** 2 for number in range(8)]
    assert set(widths) == {3 * 64, 3 * 256}


def test_for_a_gpu_the_number_of_patches_is_rounded_up(pictures):
    plain, rounded = (batches(pictures, for_gpu=for_gpu)[0].images for for_gpu in (False, True))
    used = len(plain.patches)
    assert used % 64 != 0
    assert len(rounded.patches) == used + -used % 64
    assert torch.equal(rounded.patches[:used], plain.patches)
    assert not rounded.patches[used:].any()


def test_patches_are_made_in_shared_memory(pictures, monkeypatch):
    """A data worker packs patches in shared memory, so that they need not be copied to be sent."""
    monkeypatch.setattr("clipfast.data.loader.get_worker_info", lambda: SimpleNamespace(id=0))
    assert batches(pictures)[0].images.patches.is_shared()


def test_faulty_pairs_are_replaced(tmp_path):
    write_shard(tmp_path / "s.tar", faulty_samples())
    made = batches(tmp_path / "s.tar")
    count = made.plan.batches_for(180)
    found = [made[number] for number in range(count)]
    assert [len(batch) for batch in found] == [made.plan[number].pairs for number in range(count)]
    whole = Counter(skipped.kind for batch in found for skipped in batch.skipped)
    # Faults of the json stay unnoticed, since it is not read.
    assert set(whole) == set(faults()) - {"no such field", "broken json"}
    parts = [batches(tmp_path / "s.tar", rank=rank, world_size=2) for rank in (0, 1)]
    assert digest([[part[number] for number in range(count)] for part in parts], count) == digest([found], count)


def test_ranks_that_do_not_divide_a_batch(pictures):
    with pytest.raises(ValueError, match="cannot be divided among 5"):
        batches(pictures, world_size=5)
