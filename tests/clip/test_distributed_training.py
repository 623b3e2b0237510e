"""Training on several processes: what one process does, on any number of them, however the run ends and goes on."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import ranks
from clipfast.checkpoint import read_checkpoint
from clipfast.data.index import IndexCache, ShardError
from clipfast.files import DiskFullError
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.ranks import error_of, run_ranks, start_ranks, wait_for
from clipfast.tokenizer import Tokenizer
from clipfast.training import TrainConfig
from clipfast.training.build import build_device
from clipfast.training.data import TrainingData, whole_batch
from clipfast.training.ema import WeightAverage
from clipfast.training.errors import NotFiniteError, TrainingError
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.trainer import Trainer
from clipfast.training.world import ALONE, World, _portable, joined

from .conftest import picture, sample, write_shard
from .faults import faulty_samples
from .siglip import save_tokenizer
from .test_training import losses, same, saved_step, wait_for_checkpoint, weights

ranks.PRELOAD.append("clipfast.training.trainer")

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
SIGLIP = SigLIPConfig(16, VisionConfig(24, 1, 16, 8, 2.0, 8), TextConfig(12, 300, 8, 1, 1)).to_dict()
# Options of 30 steps of 12 pairs, by the name of the run. No epoch is a whole number of batches.
CASES = {
    "unique": {"unique_by": "label", "micro_batch_size": 2, "train_num_samples": 90, "epochs": 4},
    "mix": {
        "train_data_upsampling_factors": (1.0, 2.5), "force_patch_dropout": 0.5, "grad_checkpointing": True,
        "grad_clip_norm": 0.5, "micro_batch_size": 3,
    },
    "siglip": {"dataset_resampled": True, "ddp_static_graph": True, "grad_checkpointing": True},
    "faults": {"max_bad_fraction": 0.3, "log_every_n_steps": 4},
    "average": {"ema_decay": 0.9, "samples_seen": 100, "epochs": TrainConfig.epochs, "lock_image": True},
    "drawn": {
        "train_data": "synthetic:400", "ema_decay": 0.9, "lock_text": True, "lock_text_unlocked_layers": 1,
        "lock_image": True, "lock_image_unlocked_groups": 1, "micro_batch_size": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A function that returns the options of a case, with changes, for a run in a folder."""
    made = tmp_path_factory.mktemp("made")
    write_shard(made / "a.tar", [sample(index) for index in range(60)])
    write_shard(made / "b.tar", [sample(index, png=picture(100 + index)) for index in range(41)])
    write_shard(made / "faults.tar", faulty_samples())
    write_shard(made / "val.tar", [*faulty_samples(), *(sample(index, png=picture(3)) for index in range(40))])
    for name, content in (("clip", CLIP), ("siglip", SIGLIP)):
        (made / f"{name}.json").write_text(json.dumps(content))
    save_tokenizer(made / "tokenizer")

    def of_case(logs, case="unique", **changes):
        data = f"{made}/faults.tar" if case == "faults" else f"{made}/a.tar::{made}/b.tar"
        tokenizer = f"{made}/tokenizer" if case == "siglip" else None
        given = {
            "train_data": data, "model": f"{made}/{'siglip' if tokenizer else 'clip'}.json", "tokenizer": tokenizer,
            "global_batch_size": 12, "train_num_samples": 357, "epochs": 1, "warmup": 2, "lr": 1e-3, "workers": 0,
            "log_every_n_steps": 1, "save_frequency": 0, "name": case, "logs": str(logs),
            "val_data": f"{made}/val.tar" if case in CASES else None,
        }  # fmt: skip
        return given | CASES.get(case, {}) | changes

    return of_case


def folder_of(given):
    return RunFolder(Path(given["logs"]) / given["name"])


@contextlib.contextmanager
def befalling(rank, what, victims, step):
    """Let something happen to some ranks before the step that follows ``step``; in a "stop" they do not save again."""
    original = Trainer._train_step

    def befallen(trainer, batch):
        if trainer.progress.step == step:
            trainer.checkpoints.wait()
        if trainer.progress.step == step and rank in victims:
            if what == "stop":
                raise KeyboardInterrupt
            if what == "hang":
                time.sleep(600)
            if what == "error":
                raise ShardError("shard x is gone")
            os.kill(os.getpid(), what)
        return original(trainer, batch)

    with mock.patch.object(Trainer, "_train_step", befallen):
        yield


def trained(world, given, resume=False, fate=None):
    """Train, and return the signal that ended it, an error that all ranks met, or None."""
    with (
        mock.patch("clipfast.training.loop._pictures", return_value=[]),
        mock.patch("clipfast.training.validation.BATCH_SIZE", 16),
        befalling(world.rank, *fate) if fate else contextlib.nullcontext(),
    ):
        try:
            return train(TrainConfig(**given), folder_of(given).latest if resume else None, world=world)[1]
        except KeyboardInterrupt:
            return "stopped"
        except TrainingError as error:
            return str(error)


def on_rank(rank, size, jobs, do=trained):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    found = []
    for job in jobs:
        with joined("cpu", job[0].get("dist_timeout", 30)) as world:
            found.append(do(world, *job))
    return found


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """The folders of runs by one process."""
    logs = tmp_path_factory.mktemp("one")
    for case in CASES:
        assert trained(ALONE, options(logs, case)) is None
    return {case: RunFolder(logs / case) for case in CASES}


def skipped_in(folder):
    return sorted(folder.skipped_path.read_text().splitlines())


def assert_like(folder, expected):
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
    assert skipped_in(folder) == skipped_in(expected)
    assert_near(weights(folder.path) | averages(folder), weights(expected.path) | averages(expected))
    ours, theirs = (json.loads((run.path / "results.json").read_text()) for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    for key in ("steps", "samples_seen", "skipped_pairs", "skipped_kinds", "images", "skipped_images", "classes"):
        assert ours[key] == theirs[key], key


def assert_near(found, expected):
    """Compare weights. AdamW divides a gradient by its size, so the rounding of one near zero moves a weight."""
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-7, name


def averages(folder):
    """Return the average of the weights, if there is one, in the latest checkpoint of a run."""
    found = read_checkpoint(folder.latest).get("state_dict_ema", {})
    return {f"average of {name}": value for name, value in found.items()}


@pytest.fixture
def together(tmp_path):
    """A function that does jobs, one after the other, on so many ranks, and returns what each rank found."""

    def run(size, *jobs):
        return run_ranks(on_rank, size, size, jobs, folder=empty(tmp_path), timeout=240)

    return run


def empty(tmp_path):
    """A folder for what the processes tell each other."""
    path = tmp_path / f"ranks {time.monotonic_ns()}"
    path.mkdir()
    return path


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


SHORT = {"train_num_samples": 144, "save_every": 3, "unique_by": "label", "log_every_n_steps": 5}


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_after_the_same_step(options, together, tmp_path):
    given = {name: options(tmp_path, name, **SHORT) for name in ("whole", "early", "late")}
    found = together(
        2,
        (given["whole"],),
        (given["early"], False, (signal.SIGTERM, (1,), 0)),
        (given["early"], True, (signal.SIGINT, (0,), 5)),
        (given["early"], True),
        (given["late"], False, (signal.SIGTERM, (1,), 10)),
    )
    assert found == [[None, signal.SIGTERM, signal.SIGINT, None, signal.SIGTERM]] * 2
    log = (tmp_path / "early" / "out.log").read_text()
    assert re.findall(r"Stopping after step (\d+): (\w+) came", log) == [("2", "SIGTERM"), ("7", "SIGINT")]
    assert log.count("Interrupted. Saved ") == 2
    assert [saved_step(tmp_path / name) for name in given] == [12, 12, 12]
    for name in ("early", "late"):
        assert same(tmp_path / "whole", tmp_path / name)


@pytest.mark.long
def test_too_many_bad_pairs_stop_all_ranks(options, together, tmp_path):
    given = options(tmp_path, "faults", max_bad_fraction=0.01)
    first, second = together(2, (given,))
    assert first == second
    skipped, seen = map(int, re.match(r"(\d+) of (\d+) pairs could not be used, more than", first[0]).groups())
    assert len((tmp_path / "faults" / "skipped.tsv").read_text().splitlines()) == skipped
    assert seen == 12 * saved_step(tmp_path / "faults")
    alone = options(tmp_path, "faults", max_bad_fraction=0.01, name="alone")
    trained(ALONE, alone)
    assert set(skipped_in(RunFolder(tmp_path / "alone"))) <= set(skipped_in(RunFolder(tmp_path / "faults")))
    # the sum over ranks is known one step later
    assert saved_step(tmp_path / "faults") - saved_step(tmp_path / "alone") in (0, 1)


@pytest.mark.long
@pytest.mark.parametrize("what", ["error", signal.SIGKILL])
def test_a_rank_that_is_lost_ends_the_others(what, options, together, tmp_path):
    given, whole = (options(tmp_path, name, **SHORT) for name in ("run", "whole"))
    folder = empty(tmp_path)
    processes = start_ranks(on_rank, 3, 3, [(given, False, (what, (1,), 5))], folder=folder)
    wait_for(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1 if what == "error" else -signal.SIGKILL, 1]
    errors = [error_of(folder, rank) for rank in range(3)]
    if what == "error":
        assert "RuntimeError: rank 1: shard x is gone" in errors[1]
        assert [errors[rank].strip().splitlines()[-1] for rank in (0, 2)] == ["SystemExit: 1"] * 2
    else:  # one of those that are left says so
        said = [error for error in errors if ": another rank is lost: " in error]
        assert len(said) == 1
        assert f"rank 1, process {processes[1].pid} on " in said[0]
        assert sum("SystemExit: 1" in error for error in errors) == 1
    assert saved_step(tmp_path / "run") == 3
    together(3, (given, True), (whole,))
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_a_rank_that_hangs_is_not_waited_for(options, tmp_path):
    folder, given = empty(tmp_path), options(tmp_path, "run", dist_timeout=5, **SHORT)
    processes = start_ranks(on_rank, 2, 2, [(given, False, ("hang", (1,), 5))], folder=folder)
    try:
        processes[0].join(60)  # at the start, ranks wait for ten minutes
        assert (processes[0].exitcode, processes[1].exitcode) == (1, None)
        assert "rank 0: another rank is lost: " in error_of(folder, 0)
        assert saved_step(tmp_path / "run") == 3
    finally:
        for process in processes:
            process.kill()


def started(given, size, *extra, restarts=0):
    """Start the command with torchrun; "--" keeps torchrun from taking --logs for a flag of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    launcher = f"-m torch.distributed.run --nproc-per-node {size} --max-restarts {restarts} --monitor-interval 0.2"
    command = f"{launcher} -m clipfast -- train".split()
    return subprocess.Popen([sys.executable, *command, *flags, *extra], stderr=subprocess.PIPE, text=True)


def ranks_of(process):
    """Return the process of each rank that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(line[5:]): int(pid) for line in variables if line.startswith(b"RANK=")}
    return found


@pytest.mark.long
def test_the_command(options, tmp_path):
    given = options(tmp_path, "run", **(SHORT | {"workers": 1, "save_every": 1, "train_num_samples": 6000}))
    expected = tmp_path / "run" / "checkpoints" / "epoch_latest.pt"
    for what, message in (
        (signal.SIGTERM, "Interrupted. Saved"),
        (signal.SIGKILL, "error: rank 0: another rank is lost: "),
    ):
        process = started(given, 2) if what == signal.SIGTERM else started(given, 2, f"--resume={tmp_path}/run")
        before = saved_step(tmp_path / "run") if expected.exists() else 0
        wait_for_checkpoint(process, tmp_path / "run", before + 3)
        os.kill(ranks_of(process)[1], what)
        sent = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert (process.returncode == 0) == (what == signal.SIGTERM)
        assert time.monotonic() - sent < 40
        assert said.count(message) == 1, said
        assert said.count("Traceback") == (what == signal.SIGKILL), said  # torchrun's own
    assert saved_step(tmp_path / "run") > before
    # another run cannot be begun there, and of two ranks one says so
    process = started(given, 2)
    said = process.communicate(timeout=120)[1]
    assert said.count("holds a run already") == 1, said


@pytest.mark.long
def test_torchrun_starts_it_again_where_it_was(options, together, tmp_path):
    given, whole = (options(tmp_path, name, **SHORT | {"train_num_samples": 1200}) for name in ("run", "whole"))
    process = started(given, 2, restarts=1)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "Resuming from " in said
    together(2, (whole,))
    assert same(tmp_path / "run", tmp_path / "whole")


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
