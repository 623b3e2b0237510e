"""Training on several processes: what one process does, on any number of them, however the run ends and goes on."""

import contextlib
import json
import pickle
import re
import shutil
from unittest import mock

import pytest
import torch

from clipfast.checkpoint import read_checkpoint
from clipfast.data.index import IndexCache
from clipfast.files import DiskFullError
from clipfast.models import CLIPConfig, build
from clipfast.ranks import run_ranks
from clipfast.tokenizer import Tokenizer
from clipfast.training import TrainConfig
from clipfast.training.build import build_device
from clipfast.training.data import TrainingData, whole_batch
from clipfast.training.ema import WeightAverage
from clipfast.training.errors import NotFiniteError, TrainingError
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.world import ALONE, World, _portable

from .conftest import sample, write_shard
from .distributed import CASES, CLIP, SHORT, assert_like, empty, folder_of, on_rank, trained
from .test_training import losses, saved_step


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """The folders of runs by one process."""
    logs = tmp_path_factory.mktemp("one")
    for case in CASES:
        assert trained(ALONE, options(logs, case)) is None
    return {case: RunFolder(logs / case) for case in CASES}


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_the_curve_of_one_process(size, one, options, together, tmp_path):
    assert together(size, *((options(tmp_path, case),) for case in CASES)) == [[None] * len(CASES)] * size
    assert len(losses(one["unique"])) == 30
    for case, expected in one.items():
        assert_like(RunFolder(tmp_path / case), expected)


@pytest.mark.long
@pytest.mark.parametrize(("size", "case"), [(2, "mix"), (3, "mix"), (2, "average")])
def test_the_evaluation_of_one_process(size, case, one, options, together, tmp_path):
    """A finished run that goes on is evaluated only."""
    shutil.copytree(one[case].path, tmp_path / case)
    together(size, (options(tmp_path, case), True))
    assert (tmp_path / case / "results.json").read_text() == (one[case].path / "results.json").read_text()
    assert json.loads((tmp_path / case / "results.json").read_text())["skipped_images"] == 7


@pytest.mark.long
def test_the_number_of_ranks_changes_within_an_epoch(one, options, together, tmp_path):
    # without --global-batch-size, the batch that the run began with stays
    given = options(tmp_path, "mix", global_batch_size=None, batch_size=6, save_every=7)
    assert together(2, (given, False, ("stop", (0, 1), 10))) == [["stopped"]] * 2
    assert saved_step(tmp_path / "mix") == 7
    assert trained(ALONE, given, True, ("stop", (0,), 17)) == "stopped"
    assert saved_step(tmp_path / "mix") == 14
    together(3, (given, True))
    assert_like(RunFolder(tmp_path / "mix"), one["mix"])
    log = (tmp_path / "mix" / "out.log").read_text()
    assert re.findall(r"pairs \((\d) on each of (\d) processes\)", log) == [("6", "2"), ("4", "3")]
    assert log.count("The run keeps its batch of 12 pairs; --global-batch-size is for another one.") == 2


def resumed_by_the_first(world, given):
    """Train, where only the machine of rank 0 has the checkpoint."""
    try:
        return train(TrainConfig(**given), folder_of(given).latest if world.is_main else None, world=world)
    except ValueError as error:
        return str(error)


def test_ranks_that_see_different_checkpoints_do_not_start(options, tmp_path):
    given = options(tmp_path, "mix", save_every=2)
    assert trained(ALONE, given, False, ("stop", (0,), 4)) == "stopped"
    found = run_ranks(on_rank, 2, 2, [(given,)], resumed_by_the_first, folder=empty(tmp_path))
    said = "the ranks would go on from different checkpoints: rank 0 after step 4, rank 1 after step 0; all machines"
    assert [one.startswith(said) for (one,) in found] == [True] * 2


@pytest.mark.parametrize(
    ("size", "now", "saved", "expected"),
    [
        (4, {"batch_size": 3}, {}, 12),
        (4, {"global_batch_size": 16}, {}, 16),
        (1, {"batch_size": 3}, {"batch_size": 3}, 12),
        (6, {"batch_size": 3}, {"batch_size": 3, "global_batch_size": None}, 12),
        (6, {"batch_size": 3, "global_batch_size": 18}, {"batch_size": 3}, 18),
        (1, {"batch_size": 5}, {"batch_size": 3}, 5),  # somebody wants another one
        (1, {"batch_size": 3}, {"batch_size": 3, "global_batch_size": 12}, 3),
        (5, {"batch_size": 3}, {"batch_size": 3}, "a batch of 12 pairs cannot be divided among 5 processes: .* of an"),
        (3, {"global_batch_size": 16}, {}, "a batch of 16 pairs cannot be divided among 3 processes: start a number"),
    ],
)
def test_the_batch_of_all_ranks(size, now, saved, expected):
    noted = {"config": saved, "stream": {"batch_size": 12}} if saved else {}
    config, world = TrainConfig(train_data="x.tar", **now), World(size=size)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            whole_batch(config, world, noted)
    else:
        assert whole_batch(config, world, noted) == expected


@pytest.mark.parametrize(
    ("local_rank", "name", "expected"),
    [
        (1, "auto", "cuda:1"),
        (2, "auto", "there is no GPU for process 3 of this machine, which has 2: start as many processes by --nproc"),
        (0, "cuda:1", "--device cuda:1 with 4 processes: give --device cuda, and each takes its own"),
    ],
)
def test_every_process_has_its_device(local_rank, name, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    world = World(local_rank, 4, local_rank)
    assert world.device("cpu").type == "cpu"
    if expected.startswith("cuda"):
        assert str(world.device(name)) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            world.device(name)


def test_what_does_not_work_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="--use-bn-sync needs GPUs, as PyTorch's SyncBatchNorm does, and this run is"):
        build_device(TrainConfig(train_data="x.tar", use_bn_sync=True, device="cpu"), World(size=2))
    with pytest.raises(ValueError, match="leave out one of --ddp-static-graph and --micro-batch-size"):
        TrainConfig(train_data="x.tar", ddp_static_graph=True, micro_batch_size=4)
    with pytest.raises(ValueError, match="--train-num-samples 20 is less than one batch of 24 pairs of all processes"):
        TrainingData(TrainConfig(**options(tmp_path, "mix", train_num_samples=20)), 24)


class TwoArgumentsError(Exception):
    def __init__(self, what, number):
        super().__init__(f"{what} {number}")


@pytest.mark.parametrize("error", [DiskFullError("full"), NotFiniteError("the loss is", 3), TrainingError("bad")])
def test_an_error_of_rank_0_is_the_same_on_others(error):
    again = pickle.loads(pickle.dumps(_portable(error)))
    assert (type(again), str(again)) == (type(error), str(error))
    assert repr(_portable(TwoArgumentsError("a", 1))) == "RuntimeError('a 1')"


def averaged_on(rank, size, given):
    """Return the average of the weights, and the weights, that a rank has at the end."""
    with mock.patch.object(WeightAverage, "update", autospec=True, side_effect=WeightAverage.update) as updated:
        on_rank(rank, size, [(given,)])
    average = updated.call_args.args[0]
    return {f"average of {name}": value for name, value in average.averages.items()} | average.model.state_dict()


@pytest.mark.long
def test_all_ranks_have_the_same_weights_and_averages(options, tmp_path):
    given = options(tmp_path, "run", **SHORT, ema_decay=0.9, opt="muon")
    first, second = run_ranks(averaged_on, 2, 2, given, folder=empty(tmp_path))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "epoch_latest.pt")["state_dict_ema"]
    assert all(saved[name].equal(first[f"average of {name}"]) for name in saved)
    assert not all(saved[name].equal(first[name]) for name in saved)


@pytest.mark.parametrize("data", [None, "synthetic:96"])
def test_the_part_of_a_rank(data, options, tmp_path):
    given = options(tmp_path, "run", train_num_samples=None, **({"train_data": data} if data else {}))
    config, model = TrainConfig(**given), build(CLIPConfig.from_dict(CLIP))
    loaders = []
    for rank in range(2):
        trained_on = TrainingData(config, 12, World(rank, 2, rank, 2))
        with mock.patch("clipfast.training.data.pair_loader") as loader:
            trained_on.batches(0, model, Tokenizer(12), pin_memory=False)
        loaders.append(loader.call_args)
    assert [call.kwargs["local_ranks"] for call in loaders] == [2, 2]
    with contextlib.closing(TrainingData(config, 12).batches(0, model, Tokenizer(12), pin_memory=False)) as whole:
        batch = next(whole)
    mine = [call.args[0][0] for call in loaders]
    assert [len(one) for one in mine] == [6, 6]
    images = torch.cat([one.images_on(torch.device("cpu")) for one in mine])
    assert images.equal(batch.images_on(torch.device("cpu")))


def indexing(rank, size, given):
    """Return how many shards this rank read, to index them and for the labels of their samples."""
    with (
        mock.patch.object(IndexCache, "_make", autospec=True, side_effect=IndexCache._make) as indexed,
        mock.patch.object(IndexCache, "keep_column", autospec=True, side_effect=IndexCache.keep_column) as labelled,
    ):
        on_rank(rank, size, [(given,)])
    return [indexed.call_count, labelled.call_count]


@pytest.mark.long
def test_one_process_of_a_machine_indexes(options, tmp_path):
    write_shard(tmp_path / "new.tar", [sample(index) for index in range(24)])
    given = options(tmp_path, "run", **(SHORT | {"train_data": f"{tmp_path}/new.tar", "train_num_samples": 12}))
    assert run_ranks(indexing, 2, 2, given, folder=empty(tmp_path)) == [[1, 1], [0, 0]]


def without_images(world, given):
    """Train where rank 0 finds, when it joins the parts, that not one image of the validation set can be used."""
    with mock.patch("clipfast.evaluation.features.join_parts", side_effect=ValueError("no image can be used")):
        try:
            return trained(world, given)
        except ValueError as error:
            return str(error)


def test_all_ranks_hear_that_a_validation_set_cannot_be_used(options, tmp_path):
    given = options(tmp_path, "average", samples_seen=24)
    found = run_ranks(on_rank, 2, 2, [(given,)], without_images, folder=tmp_path)
    assert found == [["no image can be used"]] * 2
