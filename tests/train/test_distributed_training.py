"""Training on several processes gives the results of one process, also when a run is stopped and resumed."""

import pickle
import re
import shutil
from unittest import mock

import pytest

from clipfast.distributed.ending import NotFiniteError, TrainingError
from clipfast.distributed.world import ALONE, World, _portable
from clipfast.io.files import DiskFullError
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig
from clipfast.train.batches import whole_batch
from clipfast.train.build import build_device
from clipfast.train.loop import train
from clipfast.train.optim import parse_arguments

from ..processes import run_ranks
from .distributed import CASES, assert_like, empty, folder_of, on_rank, skipped_in, trained
from .test_training import losses, results_of, saved_step


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """Return the folders of runs on one process with padded texts, to which runs on several ranks are compared."""
    logs = tmp_path_factory.mktemp("one")
    for case in CASES:
        assert trained(ALONE, options(logs, case, pack_text=False)) is None
    return {case: RunFolder(logs / case) for case in CASES}


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "cases", "changes"),
    [
        (2, ["siglip", "faults"], {}),
        (3, ["unique", "mix", "drawn"], {}),
        (2, ["drawn"], {"fsdp": True, "fsdp_no_reshard_after_forward": True}),
        (3, ["mix", "siglip"], {"fsdp": True, "fsdp_offload_cpu": True, "ddp_static_graph": False}),
    ],
    ids=["ddp on 2", "ddp on 3", "fsdp on 2", "fsdp on 3"],
)  # fmt: skip
def test_the_curve_and_the_evaluation_of_one_process(size, cases, changes, one, options, together, tmp_path):
    """Runs on several ranks equal runs on one process. With FSDP2, some of three ranks have empty shards of weights."""
    assert together(size, *((options(tmp_path, case, **changes),) for case in cases)) == [[None] * len(cases)] * size
    assert len(losses(one["unique"])) == 12
    for case in cases:
        assert_like(RunFolder(tmp_path / case), one[case])


@pytest.mark.long
def test_the_evaluation_of_one_process(one, options, together, tmp_path):
    """A finished run that is resumed is only evaluated."""
    cases = ("mix", "drawn")
    for case in cases:
        shutil.copytree(one[case].path, tmp_path / case)
    together(3, *((options(tmp_path, case, pack_text=False),) for case in cases))
    for case in cases:
        assert (tmp_path / case / "results.json").read_text() == (one[case].path / "results.json").read_text()
        assert results_of(tmp_path / case)["skipped_images"] == 7
        assert sum("\tval.tar/" in line for line in skipped_in(one[case])) == 7


@pytest.mark.long
def test_the_number_of_ranks_changes_within_an_epoch(one, options, together, tmp_path):
    # without --global-batch-size, the run keeps the global batch size with which it began
    given = options(tmp_path, "mix", global_batch_size=None, batch_size=6, save_every=3)
    assert together(2, (given, ("stop", (0, 1), 4))) == [["stopped"]] * 2
    assert saved_step(tmp_path / "mix") == 3
    assert trained(ALONE, given, ("stop", (0,), 7)) == "stopped"
    assert saved_step(tmp_path / "mix") == 6
    together(3, (given,))
    assert_like(RunFolder(tmp_path / "mix"), one["mix"])
    log = (tmp_path / "mix" / "out.log").read_text()
    assert re.findall(r"pairs \((\d) on each of (\d) processes\)", log) == [("6", "2"), ("4", "3")]
    assert log.count("--global-batch-size is for another one") == 2


def resumed_by_the_first(world, given):
    """Resume a training run of which only the machine of rank 0 has the checkpoint."""
    try:
        return train(TrainConfig(**given), folder_of(given).latest if world.is_main else None, world=world)
    except ValueError as error:
        return str(error)


def test_ranks_that_see_different_checkpoints_do_not_start(options, tmp_path):
    given = options(tmp_path, "mix", save_every=2)
    assert trained(ALONE, given, ("stop", (0,), 4)) == "stopped"
    found = run_ranks(on_rank, 2, 2, [(given,)], resumed_by_the_first, folder=empty(tmp_path))
    for (said,) in found:
        assert re.search("different checkpoints: rank 0 after step 4, rank 1 after step 0", said)


@pytest.mark.parametrize(
    ("size", "now", "saved", "expected"),
    [
        (4, "batch_size=3", "", 12),
        (4, "global_batch_size=16", "", 16),
        (1, "batch_size=3", "batch_size=3", 12),
        (6, "batch_size=3", "batch_size=3 global_batch_size=None", 12),
        (1, "batch_size=5", "batch_size=3", 5),  # the user asks for another batch size than that of the checkpoint
        (1, "batch_size=3", "batch_size=3 global_batch_size=12", 3),
        (5, "batch_size=3", "batch_size=3", "a batch of 12 pairs cannot be divided among 5 processes: .* of an"),
        (3, "global_batch_size=16", "", "a batch of 16 pairs cannot be divided among 3 processes: start a number"),
    ],
)
def test_the_batch_of_all_ranks(size, now, saved, expected):
    noted = {"config": parse_arguments(saved.split()), "stream": {"batch_size": 12}} if saved else {}
    config, world = TrainConfig(train_data="x.tar", **parse_arguments(now.split())), World(size=size)
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


def test_bn_sync_needs_gpus():
    with pytest.raises(ValueError, match="--use-bn-sync needs GPUs"):
        build_device(TrainConfig(train_data="x.tar", use_bn_sync=True, device="cpu"), World(size=2))


class TwoArgumentsError(Exception):
    def __init__(self, what, number):
        super().__init__(f"{what} {number}")


@pytest.mark.parametrize("error", [DiskFullError("full"), NotFiniteError("the loss is", 3), TrainingError("bad")])
def test_an_error_of_rank_0_is_the_same_on_others(error):
    again = pickle.loads(pickle.dumps(_portable(error)))
    assert (type(again), str(again)) == (type(error), str(error))
    assert repr(_portable(TwoArgumentsError("a", 1))) == "RuntimeError('a 1')"


def without_images(world, given):
    """Train with a validation set of unusable images: rank 0 finds none when it joins the features of all ranks."""
    with mock.patch("clipfast.evaluate.features.join_parts", side_effect=ValueError("no image can be used")):
        try:
            return trained(world, given)
        except ValueError as error:
            return str(error)


def test_all_ranks_hear_that_a_validation_set_cannot_be_used(options, tmp_path):
    given = options(tmp_path, "drawn", samples_seen=24)
    found = run_ranks(on_rank, 2, 2, [(given,)], without_images, folder=tmp_path)
    assert found == [["no image can be used"]] * 2
