"""The trainer's use of its data: mixes, resampling, faulty pairs, and shards that change during a run."""

import dataclasses
import re
import resource
from pathlib import Path
from unittest import mock

import pytest

from clipfast.data import MAX_OPEN, open_limit
from clipfast.distributed.ending import TrainingError
from clipfast.runs.folder import RunFolder
from clipfast.train.data import SkipBudget
from clipfast.train.loop import train
from clipfast.train.trainer import Trainer

from ..small_runs import sample, write_shard
from .faults import PLACES, faults, faulty_samples
from .test_training import before_step, config, results_of, stopped_after

MIXED = {"unique_by": None, "epochs": 1, "train_num_samples": 64, "save_every": 3, "log_every_n_steps": 1}


@pytest.mark.parametrize(
    ("sources", "limits", "raised", "expected"),
    [
        (1, (1024, 4096), None, MAX_OPEN),
        (8, (1024, resource.RLIM_INFINITY), 8 * 128 + 512, 128),
        (16, (1024, 2048), 2048, 96),
        (16, (300, 300), None, 16),
        (1000, (1024, 1024), None, 1),
    ],
)
def test_shards_are_held_open_as_far_as_the_system_lets_them(sources, limits, raised, expected, monkeypatch):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: found.append(both))
    assert open_limit(sources) == expected
    assert found == ([] if raised is None else [(raised, limits[1])])


def test_the_data_cannot_change_within_an_epoch(tmp_path):
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [sample(index) for index in range(32)])
    shards = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    options = config(shards, tmp_path, **MIXED, train_data_upsampling_factors=(1.0, 3.0))
    with stopped_after(3):
        train(options)
    latest = RunFolder(tmp_path / "run").latest
    for change, flag in (
        ({"train_data_upsampling_factors": (1.0, 2.0)}, r"--train-data-upsampling-factors \(was \[1.0, 3.0\]\)"),
        ({"dataset_resampled": True}, r"--dataset-resampled \(was False\)"),
        ({"batch_size": 16}, r"--batch-size \(was 8\)"),
        ({"seed": 5}, r"--seed \(was 0\)"),
        ({"train_num_samples": 48}, r"--train-num-samples \(was 64\)"),
    ):
        with pytest.raises(ValueError, match=f"within an epoch.*: leave {flag}"):
            train(dataclasses.replace(options, **change), latest)
    write_shard(tmp_path / "b.tar", [sample(index) for index in range(40)])
    with pytest.raises(ValueError, match="the shards have other samples than they had"):
        train(options, latest)


def test_five_percent_of_faults(tmp_path):
    write_shard(tmp_path / "s.tar", faulty_samples())
    whole = {"train_num_samples": 180, "batch_size": 12, "epochs": 2, "workers": 2}
    step = Trainer._train_step
    with mock.patch.object(Trainer, "_train_step", autospec=True, side_effect=step) as steps:
        folder, _ = train(config(f"{tmp_path}/s.tar", tmp_path, **whole, max_bad_fraction=0.1))
    batches = [call.args[1] for call in steps.call_args_list]
    assert {(batch.images.shape, len(batch.texts)) for batch in batches} == {((12, 3, 32, 32), 12)}
    assert len(batches) == 30
    assert results_of(folder.path)["skipped_kinds"] == dict.fromkeys(faults(), 2)
    listed = [line.split("\t") for line in (folder.path / "skipped.tsv").read_text().splitlines()]
    assert sorted(line[1] for line in listed) == sorted([f"s.tar/{place:03d}" for place in PLACES] * 2)

    strict = config(f"{tmp_path}/s.tar", tmp_path, **whole, max_bad_fraction=0.01)
    with (
        mock.patch.object(Trainer, "_train_step", autospec=True, side_effect=step) as steps,
        pytest.raises(TrainingError, match=r"more than --max-bad-fraction 0.01: .*; they are listed in") as error,
    ):
        train(dataclasses.replace(strict, name="strict"))
    batches = [call.args[1] for call in steps.call_args_list]
    counts = sum(len(batch.skipped) for batch in batches), sum(map(len, batches))
    assert str(error.value).startswith("{} of {} pairs".format(*counts))


@pytest.mark.parametrize(
    ("limit", "skipped", "seen", "stops"),
    [
        (0.01, 6, 576, False),  # a share of 1.04% among so few pairs may be chance
        (0.01, 60, 3000, True),
        (0.01, 1, 8, False),
        (0.01, 8, 8, True),
        (0.01, 0, 0, False),
        (0.0, 1, 8, True),
        (1.0, 8, 8, False),
        (0.5, 9, 8, False),  # ranks may count their last bad pairs twice, and 8 bad pairs of 8 may be chance
    ],
)
def test_a_share_is_judged_when_the_number_allows_it(limit, skipped, seen, stops, tmp_path):
    assert SkipBudget(limit, tmp_path, "x.tar", seen).is_exceeded_by(skipped) == stops


def test_what_the_index_found_lost_stands_in_the_run(tmp_path):
    """Pairs lost in a damaged shard are in log, list of skipped pairs, and results; a resumed run counts none twice."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [sample(index) for index in range(20)])
    data = bytearray((tmp_path / "b.tar").read_bytes())
    places = [match.start() for match in re.finditer(rb"007\.(png|txt|json)\0", data)]
    assert len(places) == 3  # the tar headers of pair 007: image, text and json
    for place in places:
        data[place : place + 8] = bytes(8)
    (tmp_path / "b.tar").write_bytes(data)
    given = config(f"{tmp_path}/[ab].tar", tmp_path, batch_size=8, epochs=2, train_num_samples=32, max_bad_fraction=0.1)
    folder, _ = train(given)
    train(dataclasses.replace(given, epochs=3), folder.latest)
    listed = [line.split("\t") for line in (folder.path / "skipped.tsv").read_text().splitlines()]
    assert [line[1:3] for line in listed if line[0] == "0"] == [["b.tar", "damaged shard"]]
    results = results_of(folder.path)
    assert results["damaged_shards"] == {f"{tmp_path}/b.tar": results["skipped_kinds"]["damaged shard"]}
    assert results["skipped_pairs"] == sum(results["skipped_kinds"].values()) > 0
    loss = f"of shard {tmp_path}/b.tar are lost: byte {places[0]}"
    # The log names the loss once per session.
    assert [loss in line for line in (folder.path / "out.log").read_text().splitlines()].count(True) == 2


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
    # At most one shard stays open, so that each sample opens its shard again.
    monkeypatch.setattr("clipfast.train.data.open_limit", lambda sources: 1)
    options = config(
        f"{tmp_path}/{{a,b,c}}.tar", tmp_path, unique_by=None, train_num_samples=72, epochs=1, workers=0,
        max_bad_fraction=0.5,
    )  # fmt: skip
    with before_step(2, lambda trainer: change(tmp_path / "b.tar")):
        folder, _ = train(options)
    results = results_of(folder.path)
    assert set(results["skipped_kinds"]) == {kind}
    assert 10 < results["skipped_pairs"] <= 24
    listed = (folder.path / "skipped.tsv").read_text().splitlines()
    assert all(line.split("\t")[1].startswith("b.tar") for line in listed)
    assert folder.metrics()[-1]["step"] == 9  # the run reaches the end of the epoch
