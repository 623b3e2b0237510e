"""Checkpoints: written in the background, on failing disks, by time, and when a run is told to stop."""

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from clipfast.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from clipfast.checkpoints.of_run import Checkpoints
from clipfast.distributed.ending import Interruption
from clipfast.io.files import DiskFullError, replace_file
from clipfast.runs.folder import RunFolder
from clipfast.runs.lock import LOCK_NAME, FolderLostError, locked
from clipfast.train.logs import logging_to
from clipfast.train.trainer import Trainer

from ..small_runs import refusal_of
from .test_training import before_step, command, results_of, saved_step


def state(step, value=0.0):
    """Return a small state of a training run after ``step`` steps, for a checkpoint."""
    return {"epoch": step // 4, "state_dict": {"w": torch.full((8,), value)}, "clipfast": {"progress": {"step": step}}}


def saved(store, *steps, **options):
    """Save a training checkpoint after each of ``steps``: for an int as one file, for a str as a sharded folder."""
    for step in steps:
        store.save(state(int(step)), int(step), in_parts=isinstance(step, str), **options)
        store.finish()


def names(store):
    """Return the names of all files in the folder of training checkpoints, sorted."""
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Return a gate that holds back the writes of training checkpoints until a test opens it."""
    gate = SimpleNamespace(begun=threading.Semaphore(0), open=threading.Event(), written=[])

    def write(path, content):
        """Write a training checkpoint once the gate is open."""
        gate.begun.release()
        assert gate.open.wait(30)
        write_checkpoint(path, content)
        gate.written.append(path.name)

    monkeypatch.setattr("clipfast.checkpoints.of_run.write_checkpoint", write)
    return gate


def weights_of(path):
    """Return the weights in a training checkpoint as a list."""
    return read_checkpoint(path)["state_dict"]["w"].tolist()


class TestWriting:
    """Training checkpoints are written in the background."""

    def test_training_goes_on_meanwhile_and_changes_nothing(self, store, gate):
        content = state(1, 7.0)
        store.save(content, 1)
        assert gate.begun.acquire(timeout=10)
        content["state_dict"]["w"].fill_(8)
        content["clipfast"]["progress"]["step"] = 2
        assert not store.latest.exists()
        gate.open.set()
        store.finish()
        assert weights_of(store.latest) == [7.0] * 8
        assert saved_step(store.folder.parent) == 1

    def test_a_second_save_waits_for_the_first(self, store, gate):
        store.save(state(1, 1.0), 1)
        second = threading.Thread(target=store.save, args=(state(2, 2.0), 2))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.open.set()
        second.join(10)
        store.finish()
        assert gate.written == ["step_1.pt", "step_2.pt"]
        assert [weights_of(store.step_path(step)) for step in (1, 2)] == [[1.0] * 8, [2.0] * 8]

    def test_names(self, store):
        saved(store, 2)
        saved(store, 4, milestone=1)
        saved(store, 6, 8, 10)
        assert names(store) == ["epoch_1.pt", "epoch_latest.pt", "step_10.pt", "step_8.pt"]
        assert store.latest.samefile(store.step_path(10))
        assert read_checkpoint(store.folder / "epoch_1.pt")["clipfast"]["progress"]["step"] == 4
        assert [path.name for path in store.kept()] == ["epoch_latest.pt", "step_8.pt", "epoch_1.pt"]

    def test_without_links_there_are_copies(self, store, monkeypatch):
        refusing = mock.Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
        monkeypatch.setattr(Path, "hardlink_to", refusing)
        saved(store, 1, milestone=1)
        assert len({path.stat().st_ino for path in store.folder.iterdir()}) == 3
        assert len({path.read_bytes() for path in store.folder.iterdir()}) == 1

    def test_latest_moves_when_the_data_is_on_the_disk(self, store, monkeypatch):
        saved(store, 1)
        done, fsync, replace = [], os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(f"to {to.name}"), replace(self, to)))
        saved(store, 2)
        folder = str(store.folder)
        assert [name for name in done if name.startswith("to")] == ["to step_2.pt", "to epoch_latest.pt"]
        written, moved, latest = (
            done.index(n) for n in (f"{folder}/.step_2.pt.tmp", "to step_2.pt", "to epoch_latest.pt")
        )
        assert written < moved < done.index(folder) < latest
        assert done[-1] == folder

    def test_a_branch_that_was_left_is_removed_when_the_other_is_saved(self, store):
        saved(store, 2, 4)
        store.begin(store.step_path(2))
        assert [path.name for path in store.kept()] == ["epoch_latest.pt", "step_4.pt"]
        assert saved_step(store.folder.parent) == 2
        saved(store, 3)
        assert names(store) == ["epoch_latest.pt", "step_2.pt", "step_3.pt"]

    def test_leftovers_are_no_checkpoints_and_go(self, store):
        (store.folder / ".step_9.pt.tmp").write_bytes(b"x")
        (store.folder / ".step_9.tmp").mkdir()
        assert store.kept() == []
        assert store.newest_whole().path is None
        store.begin()
        assert names(store) == []


class TestFailingDisk:
    """Writes of checkpoints that fail during a run, and at its end."""

    @pytest.fixture
    def failing(self, monkeypatch):
        """Let writes of training checkpoints fail; return the dict, by file name, in which a test puts the errors."""
        errors, save = {}, torch.save

        def failing_save(content, path):
            """Write half of a training checkpoint and raise its next error; write all of it if there is none left."""
            if errors.get(path.name):
                path.write_bytes(b"half")
                raise errors[path.name].pop()
            save(content, path)

        monkeypatch.setattr(torch, "save", failing_save)
        return errors

    def test_training_goes_on_and_the_next_one_is_written(self, failing, run_small):
        failing[".step_3.pt.tmp"] = [OSError(errno.EIO, "Input/output error")]
        folder = run_small(save_every=1, epochs=1)
        said = (folder.path / "out.log").read_text()
        assert "step_3.pt cannot be written: Input/output error" in said
        assert f"last good checkpoint is {folder.latest}" in said
        assert saved_step(folder.path) == 4
        assert not list(folder.checkpoints.glob(".*"))

    def test_a_full_disk_is_told_in_bytes(self, failing, store, monkeypatch):
        """If the disk is full, the error states wanted and free bytes, since PyTorch's error does not mention space."""
        saved(store, 1)
        failing[".step_2.pt.tmp"] = [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")]
        monkeypatch.setattr("shutil.disk_usage", lambda path: mock.Mock(free=0))
        monkeypatch.setattr("clipfast.checkpoints.checkpoint._nbytes", lambda content: 10**9)
        with pytest.raises(DiskFullError, match=r"step_2\.pt cannot be written: .*1,000.0 MB are wanted and 0.0 MB"):
            saved(store, 2)
        monkeypatch.undo()
        assert names(store) == ["epoch_latest.pt", "step_1.pt"]
        # If a save fails for another reason than a full disk, its error is raised unchanged.
        with pytest.raises(RuntimeError, match=r"^broken$"):
            replace_file(store.folder / "x", mock.Mock(side_effect=RuntimeError("broken")), size=1000)
        assert not (store.folder / "x").exists()

    def test_the_last_one_is_tried_again(self, failing, run_small):
        failing[".step_4.pt.tmp"] = [OSError(errno.EIO, "Input/output error")]
        folder = run_small(epochs=1, save_frequency=1)
        assert failing == {".step_4.pt.tmp": []}
        assert (folder.checkpoints / "epoch_1.pt").samefile(folder.latest)
        assert saved_step(folder.path) == 4

    def test_the_failure_of_the_last_one_is_that_of_the_run(self, failing, shards, tmp_path, capsys):
        failing[".step_12.pt.tmp"] = [OSError(errno.EROFS, "Read-only file system") for _ in range(2)]
        err = refusal_of(capsys, *command(shards, tmp_path, "--workers", "0", "--epochs", "1"))
        assert f"error: {tmp_path}/run/checkpoints/step_12.pt cannot be written: Read-only file system" in err
        assert saved_step(tmp_path / "run") == 11

    def test_records_that_cannot_be_written_do_not_end_a_run(self, tmp_path):
        folder = RunFolder(tmp_path / "nowhere")
        with mock.patch.object(logging.getLogger("clipfast"), "error") as said:
            for step in (1, 2):
                folder.record(step=step)
        assert "metrics.jsonl cannot be written: No such file or directory" in said.call_args.args[0]

    def test_a_log_that_cannot_be_written_hides_no_error(self, tmp_path):
        (tmp_path / "out.log").symlink_to("/dev/full")
        with logging_to(RunFolder(tmp_path)):  # an error when it closes the log would hide that of the run
            logging.getLogger("clipfast").error("a line")


class TestFolderOfARun:
    """The folder of a run is removed or replaced while training goes on."""

    @pytest.mark.parametrize(("step", "is_renamed"), [(1, True), (3, False)])
    def test_is_made_again(self, step, is_renamed, run_small, tmp_path):
        def remove(trainer):
            """Rename or delete the folder of the run while it trains."""
            trainer.checkpoints.wait()
            trainer.folder.path.rename(tmp_path / "old") if is_renamed else shutil.rmtree(trainer.folder.path)

        with before_step(step, remove):
            folder = run_small(save_every=1, epochs=1, log_every_n_steps=1)
        assert saved_step(folder.path) == 4
        assert results_of(folder.path)["steps"] == 4
        said = (folder.path / "out.log").read_text()
        assert re.search(
            f"{folder.path} was renamed or removed: .*{f'now {tmp_path}/old' if is_renamed else 'gone'}", said
        )
        if is_renamed:
            assert saved_step(tmp_path / "old") == 1
        assert [line["step"] for line in folder.metrics() if "loss" in line][-1] == 4

    @pytest.mark.parametrize("is_held", [False, True])
    def test_stays_as_it_is_if_it_is_another_runs_by_now(self, is_held, run_small, tmp_path):
        other = tmp_path / "run"
        with contextlib.ExitStack() as stack:

            def replace(trainer):
                """Put the folder of another run in the place of the one that trains."""
                trainer.checkpoints.wait()
                other.rename(tmp_path / "old")
                stack.enter_context(locked(other))
                (other / "metrics.jsonl").touch()
                if not is_held:
                    stack.close()

            with before_step(2, replace), pytest.raises(FolderLostError, match=f"another folder .*{tmp_path}/old"):
                run_small(save_every=1, epochs=1, log_every_n_steps=1)
        assert {path.name for path in other.iterdir()} - {LOCK_NAME} == {"metrics.jsonl"}
        assert (other / "metrics.jsonl").read_text() == ""
        assert saved_step(tmp_path / "old") == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_scheduler_and_torchrun_both_signal(signum):
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signum)
    assert interruption.signum == signal.SIGTERM


def test_a_signal_during_a_save(run_small, gate):
    def open_later():
        """Send SIGTERM to training while a checkpoint is written, and let the write go on a little later."""
        assert gate.begun.acquire(timeout=30)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        gate.open.set()

    thread = threading.Thread(target=open_later)
    thread.start()
    folder = run_small(save_every=2, epochs=100)
    thread.join()
    assert gate.written[0] == "step_2.pt"
    newest = Checkpoints(folder.checkpoints).newest_whole()
    assert newest.damaged == []
    assert newest.content["clipfast"]["progress"]["step"] == int(gate.written[-1][5:-3]) < 400


def test_by_the_clock(run_small, monkeypatch):
    clock, original, steps = [time.monotonic()], Trainer._train_step, []

    def slow(trainer, batch):
        """Let a training step take 35 seconds by the clock of the test."""
        clock[0] += 35
        return original(trainer, batch)

    monkeypatch.setattr("clipfast.train.trainer.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Trainer, "_train_step", slow)
    monkeypatch.setattr(Checkpoints, "save", lambda store, state, step, **_: steps.append(step))
    run_small(epochs=1, save_every_minutes=1.0)
    assert steps == [2, 4]
