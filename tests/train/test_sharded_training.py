"""Checkpoints that all ranks of ``--fsdp`` write together: any number of ranks can resume from them."""

import contextlib
import errno
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import fsspec
import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from clipfast.checkpoints import sharded
from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.checkpoints.of_run import Checkpoints, read_saved
from clipfast.runs.folder import RunFolder
from clipfast.runs.status import read_status
from clipfast.train.optim import parse_arguments
from clipfast.train.remote_sync import RemoteCopy

from ..processes import start_ranks, wait_for
from ..small_runs import output_of, refusal_of
from .distributed import assert_near, empty, on_rank, run_together
from .test_checkpointing import saved, state
from .test_endings import flip
from .test_training import losses, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


SHARDED = (
    "train_data=synthetic:400 train_num_samples=144 epochs=2 save_every=5 save_frequency=1 fsdp=True "
    "fsdp_checkpoint=sharded force_patch_dropout=0.5 grad_clip_norm=0.5 ema_decay=0.9"
)


@pytest.fixture(scope="module")
def given(options):
    """Return a function that returns options of a sharded run of 24 steps in two epochs, saved every 5 steps."""
    return lambda logs, **changes: options(logs, "run", **parse_arguments(SHARDED.split()) | changes)


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """Return the folder of an undisturbed sharded training run on 2 ranks."""
    logs = tmp_path_factory.mktemp("undisturbed")
    assert run_together(logs, 2, (given(logs),)) == [[None]] * 2
    return RunFolder(logs / "run")


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory):
    """Return the logs of a sharded run on 3 ranks that was stopped after 22 training steps, as by a kill."""
    logs = tmp_path_factory.mktemp("stopped")
    assert run_together(logs, 3, (given(logs), ("stop", (0, 1, 2), 22))) == [["stopped"]] * 3
    return logs


@pytest.fixture
def run(stopped, tmp_path):
    """Copy the stopped sharded training run, for a test to damage."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


def names(folder):
    """Return the names of all sharded and whole checkpoints of a training run, sorted."""
    return sorted(path.name for path in folder.checkpoints.iterdir())


def assert_same(folder, expected):
    """Assert that two sharded training runs have bit-equal losses and weights."""
    assert losses(folder) == losses(expected)
    assert same(folder.path, expected.path)


def assert_like(folder, expected):
    """Assert that two sharded training runs have the same losses and weights, but for rounding."""
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
    assert_near(weights(folder.path), weights(expected.path))


@pytest.mark.long
def test_names(undisturbed, stopped):
    assert names(undisturbed) == ["epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", "step_20", "step_24.pt"]
    assert names(RunFolder(stopped / "run")) == ["epoch_1.pt", "epoch_latest.pt", "step_15", "step_20"]
    assert read_status(stopped / "run")["checkpoint"]["name"] == "step_20"
    content = read_checkpoint(undisturbed.checkpoints / "epoch_1.pt")
    assert content["clipfast"]["progress"]["step"] == 12
    assert read_saved(stopped / "run/checkpoints/step_20")["state_dict"].keys() == content["state_dict"].keys()


def killed_in_a_write(rank):
    """Kill rank 1 while the sharded training state after 20 steps is written."""

    def seal(path):
        """Kill rank 1 before it seals its part of the sharded checkpoint of step 20."""
        if rank == 1 and path.parent.name == ".step_20.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path)

    original = sharded._seal
    return mock.patch.object(sharded, "_seal", seal)


@pytest.mark.long
def test_one_rank_is_killed_in_a_write_and_in_training(given, undisturbed, together, tmp_path):
    folder = RunFolder(tmp_path / "run")
    for fate, faults, newest in ((None, killed_in_a_write, "step_15"), ((signal.SIGKILL, (1,), 22), None, "step_20")):
        processes = start_ranks(on_rank, 2, 2, [(given(tmp_path), fate, faults)], folder=empty(tmp_path))
        wait_for(processes, 60)
        assert [process.exitcode for process in processes] == [1, -signal.SIGKILL]
        assert folder.kept()[0].name == newest
        assert (folder.checkpoints / ".step_20.tmp").exists() == (newest == "step_15")
    assert together(2, (given(tmp_path),)) == [[None]] * 2
    assert_same(folder, undisturbed)
    assert names(folder) == names(undisturbed)


@pytest.mark.long
def test_a_signal_saves_and_a_folder_is_gone_on_from(given, undisturbed, together, tmp_path):
    jobs = (given(tmp_path), (signal.SIGTERM, (1,), 6)), (given(tmp_path),)
    assert together(2, *jobs) == [[signal.SIGTERM, None]] * 2
    folder = RunFolder(tmp_path / "run")
    said = (folder.path / "out.log").read_text()
    at = re.search(rf"Interrupted. Saved {folder.checkpoints}/step_(\d+); go on with: torchrun", said)[1]
    assert f"Resuming from {folder.checkpoints}/step_{at} at step {at} of 24" in said
    assert_same(folder, undisturbed)


@pytest.mark.long
def test_ranks_and_kind_change(given, undisturbed, together, tmp_path):
    """A run changes from sharded checkpoints to single files and back, on 3 and 2 ranks, with and without FSDP."""
    sessions = [(3, True, "sharded"), (2, False, "full"), (2, True, "sharded")]
    for number, (size, fsdp, kind) in enumerate(sessions):
        fate = ("stop", range(size), 7 + 10 * number) if number < 2 else None
        together(size, (given(tmp_path, fsdp=fsdp, fsdp_checkpoint=kind), fate))
        if number < 2:
            newest = Checkpoints(tmp_path / "run/checkpoints").newest_whole()
            assert newest.content["clipfast"]["progress"]["step"] == 5 + 10 * number
            assert newest.path.is_dir() == (kind == "sharded")
    assert_like(RunFolder(tmp_path / "run"), undisturbed)


def failing(rank):
    """Let sharded checkpoints fail on a full disk: rank 1's part at step 5, its seal at 10, the manifest at 15.

    The checkpoint of step 20 is written late.
    """
    stack = contextlib.ExitStack()

    def fail(owner, name, step, victims, do):
        """Let ranks ``do`` something before they call a function that writes a sharded checkpoint of a step."""
        original = getattr(owner, name)

        def faulty(*args):
            """Call ``do`` if this rank fails at this step, then write the sharded checkpoint."""
            if rank in victims and f"/.step_{step}.tmp" in str(getattr(args[0], "path", args[0])):
                do()
            return original(*args)

        stack.enter_context(mock.patch.object(owner, name, faulty))

    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    fail(FileSystemWriter, "write_data", 5, (1,), full)
    fail(sharded, "_seal", 10, (1,), full)
    fail(sharded, "replace_text", 15, (0, 1), full)
    fail(sharded, "_written", 20, (0, 1), lambda: time.sleep(1))
    return stack


@pytest.mark.long
def test_a_full_disk_stops_nothing_and_what_is_written_late_is_a_copy(given, undisturbed, together, tmp_path):
    assert together(2, (given(tmp_path), None, failing)) == [[None]] * 2
    folder = RunFolder(tmp_path / "run")
    said = (folder.path / "out.log").read_text()
    for step, rank in ((5, " (rank 1)"), (10, " (rank 1)"), (15, "")):
        line = f"step_{step} cannot be written: No space left on device{rank}. Training goes on."
        assert said.count(line) == 1
    assert_same(folder, undisturbed)
    assert names(folder) == names(undisturbed)
    ours, theirs = (read_saved(run.checkpoints / "step_20") for run in (folder, undisturbed))
    assert all(value.equal(theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert all(value.equal(theirs["state_dict_ema"][name]) for name, value in ours["state_dict_ema"].items())


@pytest.mark.long
def test_a_damaged_folder_is_named_and_the_one_before_is_taken(run, undisturbed, capsys):
    flip(run.checkpoints / "step_20" / "__1_0.distcp")
    damaged = "step_20.*__1_0.distcp is not the file that was written"
    err = refusal_of(capsys, "train", "--resume", run.checkpoints / "step_20")
    assert re.search(f"{damaged}.*the one before is {run.checkpoints}/step_15$", err.strip())
    _, err = output_of(capsys, "train", "--resume", run.path)
    assert re.search(f"{damaged}.*; the run goes on from {run.checkpoints}/step_15", err)
    assert_like(run, undisturbed)


@pytest.mark.long
def test_one_process_goes_on_from_an_earlier_folder(run, undisturbed, capsys):
    given = ["--no-fsdp", "--fsdp-checkpoint", "full"]
    _, err = output_of(capsys, "train", "--resume", run.checkpoints / "step_15", *given)
    assert "step_15 at step 15 of 24" in err
    assert_like(run, undisturbed)
    assert names(run) == ["epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", "step_20.pt", "step_24.pt"]


@pytest.fixture
def store(store):
    """Return a store that keeps the last three training checkpoints, whole or sharded."""
    store.keep_last = 3
    return store


def kept(store):
    """Return the names of the training checkpoints that a store keeps."""
    return [path.name for path in store.kept()]


class TestOrder:
    """The order of checkpoints, which determines the newest one."""

    def test_by_steps(self, store):
        saved(store, "1", 2, "3")
        assert kept(store) == ["step_3", "epoch_latest.pt", "step_1"]
        assert store.newest_whole().damaged == []
        saved(store, "4", 5)
        assert kept(store) == ["epoch_latest.pt", "step_4", "step_3"]
        saved(store, "6", "7", "8")  # epoch_latest.pt is now the only name of its file
        assert kept(store) == ["step_8", "step_7", "step_6", "epoch_latest.pt"]

    def test_in_a_copy_without_links(self, store, tmp_path):
        saved(store, 1, "2")
        copy = Checkpoints(Path(shutil.copytree(store.folder, tmp_path / "copy")))
        assert kept(copy) == ["step_2", "epoch_latest.pt", "step_1.pt"]
        saved(store, 3)
        copy = Checkpoints(Path(shutil.copytree(store.folder, tmp_path / "other")))
        assert kept(copy) == ["epoch_latest.pt", "step_3.pt", "step_2", "step_1.pt"]

    @pytest.mark.parametrize(
        ("steps", "resumed", "expected"),
        [
            (["1", 2, "3"], "epoch_latest.pt", ["epoch_latest.pt", "step_1"]),
            (["1", 2, "3"], "step_1", ["step_1"]),
            ([1, "2", "3"], "step_2", ["step_2", "epoch_latest.pt"]),
        ],
    )
    def test_a_run_that_goes_on_from_an_earlier_one(self, steps, resumed, expected, store):
        saved(store, *steps)
        store.begin(store.folder / resumed)
        assert kept(store) == expected


def test_the_copy_elsewhere(store, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    put = []
    original = type(fs).put_file
    monkeypatch.setattr(type(fs), "put_file", lambda self, *args: (put.append(args[1]), original(self, *args))[1])
    saved(store, 1, "2", "3")
    shutil.copytree(store.folder / "step_3", store.folder / ".step_4.tmp")
    folder = RunFolder(store.folder.parent)
    RemoteCopy(folder, "memory://copies").sync()
    root = "/copies/run/checkpoints"
    sent = [path.removeprefix(f"{root}/step_3/") for path in put if "/step_3/" in path]
    assert sent == [".metadata", "__0_0.distcp", "rest.pt", "manifest.json"]
    assert not any(".step_4" in path for path in put)
    other = RunFolder(tmp_path / "other/run")
    assert RemoteCopy(other, "memory://copies").restore() == ["Step 3 was downloaded from memory://copies/run"]
    assert read_saved(other.checkpoints / "step_3")["clipfast"] == state(3)["clipfast"]
    # a damaged or incomplete remote checkpoint is not used
    fs.rm_file(f"{root}/step_3/manifest.json")
    fs.pipe_file(f"{root}/step_2/rest.pt", b"x")
    third = RunFolder(tmp_path / "third/run")
    copy = RemoteCopy(third, "memory://copies")
    said = copy.restore()
    assert "checkpoints/step_2 is not used: " in said[0]
    assert "rest.pt is not the file that was written" in said[0]
    assert said[1:] == ["Step 1 was downloaded from memory://copies/run"]
    assert kept(Checkpoints(third.checkpoints)) == ["epoch_latest.pt"]
    fs.store.clear()
