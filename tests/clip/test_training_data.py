"""What the trainer makes of its data: mixes, resampling, faulty pairs, and shards that change under it."""

import dataclasses
import hashlib
import json
import re
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfast.checkpoint import read_checkpoint
from clipfast.data import MAX_OPEN, Batch, open_limit
from clipfast.data.order import STREAMS
from clipfast.training.data import SkipBudget, TrainingData
from clipfast.training.errors import TrainingError
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.trainer import Trainer

from .conftest import sample, write_shard
from .faults import PLACES, faults, faulty_samples
from .test_training import config, same, stopped_after

MIXED = {"unique_by": None, "epochs": 1, "train_num_samples": 64, "save_every": 3, "log_every_n_steps": 1}


@pytest.fixture
def seen(monkeypatch):
    """The batches that the trainer takes steps on."""
    found: list[Batch] = []
    original = Trainer._train_step

    def watching(trainer, batch):
        found.append(batch)
        return original(trainer, batch)

    monkeypatch.setattr(Trainer, "_train_step", watching)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"train_data_upsampling_factors": (1.0, 3.0)},
        {"dataset_resampled": True},
        {"train_data_upsampling_factors": (0.5, 2.0), "dataset_resampled": True},
        {"train_data_upsampling_factors": (0.5, 2.0), "unique_by": "label"},
    ],
)
def test_a_run_goes_on_within_an_epoch_of_any_order(options, shards, tmp_path):
    whole = config(shards, tmp_path, **(MIXED | options))
    train(whole)
    again = dataclasses.replace(whole, name="again")
    with stopped_after(5):
        train(again)
    train(dataclasses.replace(again, workers=2), RunFolder(tmp_path / "again").latest)
    assert same(tmp_path / "run", tmp_path / "again")


@pytest.fixture
def few_files():
    """A limit of open files that leaves no room for the shards of a mix, but may be raised."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_each_part_of_a_mix_holds_all_shards_open_that_it_reads_from(few_files, tmp_path):
    paths = [str(write_shard(tmp_path / f"{name}.tar", [sample(index) for index in range(8)])) for name in "abcd"]
    mixed = config("::".join(paths), tmp_path, train_data_upsampling_factors=(1.0,) * 4, unique_by=None)
    assert [source.max_open for source in TrainingData(mixed).sources] == [2 * STREAMS] * 4
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 4 * 2 * STREAMS


@pytest.mark.parametrize(
    ("sources", "limits", "raised", "expected"),
    [
        (1, (1024, 4096), None, MAX_OPEN),
        (8, (1024, 1 << 20), 8 * 128 + 512, 128),
        (8, (1 << 20, 1 << 20), None, 128),
        (8, (resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 128),
        (8, (1024, resource.RLIM_INFINITY), 8 * 128 + 512, 128),
        (16, (1024, 2048), 2048, 96),
        (16, (300, 300), None, 16),
        (1, (64, 64), None, MAX_OPEN),
        (1000, (1024, 1024), None, 1),
    ],
)
def test_shards_are_held_open_as_far_as_the_system_lets_them(sources, limits, raised, expected, monkeypatch):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: found.append(both))
    assert open_limit(sources) == expected
    assert found == ([] if raised is None else [(raised, limits[1])])


def test_the_checksum_of_identities_needs_no_copy_of_them(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", [sample(index) for index in range(8)])
    numbers = np.arange(1 << 19, dtype=np.uint64)
    monkeypatch.setattr("clipfast.training.data.identities", lambda *_: numbers)
    unique = config(str(path), tmp_path, unique_by="label")
    expected = hashlib.sha256(np.array([8], "<i8").tobytes() + numbers.astype("<u8").tobytes()).hexdigest()
    assert TrainingData(unique).content == expected
    tracemalloc.start()
    TrainingData(unique)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < numbers.nbytes / 2


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"train_data_upsampling_factors": (1.0, 2.0)}, r"--train-data-upsampling-factors \(was \[1.0, 3.0\]\)"),
        ({"dataset_resampled": True}, r"--dataset-resampled \(was False\)"),
        ({"unique_by": "label"}, r"--unique-by \(was None\)"),
    ],
)
def test_the_order_cannot_change_within_an_epoch(change, flag, shards, tmp_path):
    options = config(shards, tmp_path, **MIXED, train_data_upsampling_factors=(1.0, 3.0))
    with stopped_after(3):
        train(options)
    with pytest.raises(ValueError, match=f"from within an epoch, whose data cannot change: leave {flag} as it was"):
        train(dataclasses.replace(options, **change), RunFolder(tmp_path / "run").latest)


def test_other_shards_of_the_same_name_cannot_take_over_within_an_epoch(tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index) for index in range(32)])
    options = config(f"{tmp_path}/s.tar", tmp_path, **MIXED)
    with stopped_after(3):
        train(options)
    write_shard(tmp_path / "s.tar", [sample(index) for index in range(40)])
    with pytest.raises(ValueError, match="whose data cannot change: the shards have other samples than they had"):
        train(options, RunFolder(tmp_path / "run").latest)


@pytest.mark.parametrize(("epoch_ends", "step"), [(True, 8), (False, 9)])
def test_checkpoints_of_versions_with_another_order(epoch_ends, step, shards, tmp_path):
    """They are continued from the end of an epoch, and from nowhere else."""
    options = config(shards, tmp_path, train_num_samples=64, epochs=2, log_every_n_steps=1, save_every=9)
    with stopped_after(step):
        train(options)
    checkpoint = read_checkpoint(RunFolder(tmp_path / "run").latest)
    checkpoint["clipfast"]["stream"] = {
        "train_data": shards, "steps_per_epoch": 8, "batch_size": 8, "seed": 0, "unique_by": "label",
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "old.pt")
    elsewhere = dataclasses.replace(options, name="elsewhere")
    if epoch_ends:
        folder, _ = train(elsewhere, tmp_path / "old.pt")
        assert [line["step"] for line in folder.metrics() if "loss" in line] == list(range(9, 17))
        return
    with pytest.raises(ValueError, match="of an earlier version of clipfast, which had another order of the data"):
        train(elsewhere, tmp_path / "old.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_five_percent_of_faults(workers, seen, tmp_path):
    write_shard(tmp_path / "s.tar", faulty_samples())
    whole = {"train_num_samples": 180, "batch_size": 12, "epochs": 2, "workers": workers}
    folder, _ = train(config(f"{tmp_path}/s.tar", tmp_path, **whole, max_bad_fraction=0.1))
    assert {(batch.images.shape, len(batch.texts)) for batch in seen} == {((12, 3, 32, 32), 12)}
    assert len(seen) == 30
    results = json.loads((folder.path / "results.json").read_text())
    assert results["skipped_kinds"] == dict.fromkeys(faults(), 2)
    listed = [line.split("\t") for line in (folder.path / "skipped.tsv").read_text().splitlines()]
    assert sorted(line[1] for line in listed) == sorted([f"s.tar/{place:03d}" for place in PLACES] * 2)

    strict = config(f"{tmp_path}/s.tar", tmp_path, **whole, max_bad_fraction=0.01)
    with pytest.raises(TrainingError, match=r"more than --max-bad-fraction 0.01: .*; they are listed in") as error:
        train(dataclasses.replace(strict, name="strict"))
    counted = re.match(r"(\d+) of (\d+) pairs", str(error.value))
    assert counted is not None
    stopped = seen[30:]
    assert [int(number) for number in counted.groups()] == [
        sum(len(batch.skipped) for batch in stopped),
        sum(len(batch) for batch in stopped),
    ]


@pytest.mark.parametrize(
    ("limit", "skipped", "seen", "stops"),
    [
        (0.01, 6, 576, False),  # 1.04%, as of 31 among 3,000
        (0.01, 60, 3000, True),
        (0.01, 1, 8, False),
        (0.01, 8, 8, True),
        (0.01, 0, 0, False),
        (0.0, 1, 8, True),
        (1.0, 8, 8, False),
        (0.5, 9, 8, False),  # the last ones may be counted twice, and 8 of 8 are no proof
    ],
)
def test_a_share_is_judged_when_the_number_allows_it(limit, skipped, seen, stops, tmp_path):
    assert SkipBudget(limit, tmp_path, "x.tar", seen).is_exceeded_by(skipped) == stops


def test_what_the_index_found_lost_stands_in_the_run(tmp_path):
    """In its log, its list of skipped pairs and its results, though no batch has met it; and once if it goes on."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [sample(index) for index in range(20)])
    data = bytearray((tmp_path / "b.tar").read_bytes())
    places = [match.start() for match in re.finditer(rb"007\.(png|txt|json)\0", data)]
    assert len(places) == 3  # the headers of a pair and its json
    for place in places:
        data[place : place + 8] = bytes(8)
    (tmp_path / "b.tar").write_bytes(data)
    given = config(f"{tmp_path}/[ab].tar", tmp_path, batch_size=8, epochs=2, train_num_samples=32, max_bad_fraction=0.1)
    folder, _ = train(given)
    train(dataclasses.replace(given, epochs=3), folder.latest)
    listed = [line.split("\t") for line in (folder.path / "skipped.tsv").read_text().splitlines()]
    assert [line[1:3] for line in listed if line[0] == "0"] == [["b.tar", "damaged shard"]]
    results = json.loads((folder.path / "results.json").read_text())
    assert results["damaged_shards"] == {f"{tmp_path}/b.tar": results["skipped_kinds"]["damaged shard"]}
    assert results["skipped_pairs"] == sum(results["skipped_kinds"].values()) > 0
    loss = f"of shard {tmp_path}/b.tar are lost: byte {places[0]}"
    assert [loss in line for line in (folder.path / "out.log").read_text().splitlines()].count(True) == 2  # sessions


def changed_after_two_steps(monkeypatch, path: Path, change):
    """Change a shard while a run reads it, which must open it again for every sample."""
    original = Trainer._train_step

    def changing(trainer, batch):
        if trainer.progress.step == 2:
            change(path)
        return original(trainer, batch)

    monkeypatch.setattr(Trainer, "_train_step", changing)
    monkeypatch.setattr("clipfast.training.data.open_limit", lambda sources: 1)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("missing shard", Path.unlink),
        ("truncated shard", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("replaced shard", lambda path: write_shard(path, [sample(index + 50) for index in range(24)])),
    ],
)
def test_a_shard_that_changes_during_a_run_is_named(kind, change, monkeypatch, tmp_path):
    for name in "abc":
        write_shard(tmp_path / f"{name}.tar", [sample(index) for index in range(24)])
    changed_after_two_steps(monkeypatch, tmp_path / "b.tar", change)
    options = config(
        f"{tmp_path}/{{a,b,c}}.tar", tmp_path, unique_by=None, train_num_samples=72, epochs=1, workers=0,
        max_bad_fraction=0.5,
    )  # fmt: skip
    folder, _ = train(options)
    results = json.loads((folder.path / "results.json").read_text())
    assert set(results["skipped_kinds"]) == {kind}
    assert 10 < results["skipped_pairs"] <= 24
    listed = (folder.path / "skipped.tsv").read_text().splitlines()
    assert all(line.split("\t")[1].startswith("b.tar") for line in listed)
    assert folder.metrics()[-1]["step"] == 9  # the whole epoch
