"""Checkpoints that hold: written beside training, on failing disks, by time, and when a run is told to stop."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.checkpoint import read_checkpoint, write_checkpoint
from clipfast.files import DiskFullError
from clipfast.training.background import Background
from clipfast.training.checkpoints import Checkpoints
from clipfast.training.host_copy import HostCopy
from clipfast.training.interruption import Interruption
from clipfast.training.lock import LOCK_NAME, FolderLostError, locked
from clipfast.training.logs import logging_to
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.trainer import Trainer

from .conftest import run_command
from .test_training import command, config, saved_step


def state(step, value=0.0):
    return {"epoch": step // 4, "state_dict": {"w": torch.full((8,), value)}, "clipfast": {"progress": {"step": step}}}


def saved(store, *steps, **options):
    for step in steps:
        store.save(state(step), step, **options)
        store.finish()


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


class Gate:
    """Writes that wait until they may go on."""

    def __init__(self, monkeypatch):
        self.begun, self.open, self.written = threading.Semaphore(0), threading.Event(), []

        def write(path, content):
            self.begun.release()
            assert self.open.wait(30)
            write_checkpoint(path, content)
            self.written.append(path.name)

        monkeypatch.setattr("clipfast.training.checkpoints.write_checkpoint", write)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


class TestHostCopy:
    """What is written is the state at the moment of saving."""

    def test_it_is_a_copy_of_everything(self):
        weight = torch.arange(6.0).reshape(2, 3)
        content = {
            "transposed": weight.t(), "same": weight, "again": weight, "part": weight[0], "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.0), "halves": weight.bfloat16(), "list": [weight + 1, (weight.long(), "x")],
            "parameter": torch.nn.Parameter(torch.ones(2)), "none": None,
        }  # fmt: skip
        expected = json.dumps(content, default=lambda tensor: tensor.tolist())
        copied = HostCopy()(content)
        weight.fill_(-1)
        content["parameter"].data.fill_(-1)
        content["list"][0].fill_(-1)
        assert json.dumps(copied, default=lambda tensor: tensor.tolist()) == expected
        assert [copied["halves"].dtype, copied["list"][1][0].dtype] == [torch.bfloat16, torch.int64]
        assert copied["transposed"].stride() == (1, 3)
        assert copied["again"] is copied["same"]  # it is written once
        assert not any(value.requires_grad for value in copied.values() if isinstance(value, torch.Tensor))

    def test_its_memory_is_used_again(self):
        copies, content = HostCopy(), {"a": torch.ones(4), "b": {"c": torch.ones(3)}}
        first = copies(content)
        places = [first["a"].data_ptr(), first["b"]["c"].data_ptr()]
        content["a"].fill_(2)
        second = copies(content)
        assert [second["a"].data_ptr(), second["b"]["c"].data_ptr()] == places
        assert second["a"].tolist() == [2] * 4
        # another shape or type gets other memory
        third = copies({"a": torch.ones(5), "b": {"c": torch.ones(3, dtype=torch.half)}})
        assert (third["a"].tolist(), third["b"]["c"].dtype) == ([1] * 5, torch.half)

    def test_attributes_of_a_state_dict_stay(self):
        state = torch.nn.BatchNorm1d(2).state_dict()
        assert HostCopy()(state)._metadata == state._metadata


class TestWriting:
    """The writer beside training."""

    def test_training_goes_on_meanwhile_and_changes_nothing(self, store, gate):
        content = state(1, 7.0)
        store.save(content, 1)
        assert gate.begun.acquire(timeout=10)
        content["state_dict"]["w"].fill_(8)
        content["clipfast"]["progress"]["step"] = 2
        assert not store.latest.exists()
        gate.open.set()
        store.finish()
        found = read_checkpoint(store.latest)
        assert found["state_dict"]["w"].tolist() == [7.0] * 8
        assert found["clipfast"]["progress"]["step"] == 1

    def test_a_second_save_waits_for_the_first(self, store, gate):
        first = state(1, 1.0)
        store.save(first, 1)
        thread = threading.Thread(target=lambda: store.save(state(2, 2.0), 2))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        gate.open.set()
        thread.join(10)
        store.finish()
        assert gate.written == ["step_1.pt", "step_2.pt"]
        assert [read_checkpoint(store.step_path(n))["state_dict"]["w"][0].item() for n in (1, 2)] == [1.0, 2.0]

    def test_names(self, store):
        saved(store, 2)
        saved(store, 4, milestone=1)
        saved(store, 6, 8, 10)
        assert names(store) == ["epoch_1.pt", "epoch_latest.pt", "step_10.pt", "step_8.pt"]
        assert store.latest.samefile(store.step_path(10))
        assert read_checkpoint(store.folder / "epoch_1.pt")["clipfast"]["progress"]["step"] == 4
        assert [path.name for path in store.kept()] == ["epoch_latest.pt", "step_8.pt", "epoch_1.pt"]

    def test_without_links_there_are_copies(self, store, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
        saved(store, 1, milestone=1)
        assert len({path.stat().st_ino for path in store.folder.iterdir()}) == 3
        assert len({path.read_bytes() for path in store.folder.iterdir()}) == 1

    def test_latest_moves_when_the_data_is_on_the_disk(self, store, monkeypatch):
        saved(store, 1)
        synced, moved = [], []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        monkeypatch.setattr(
            Path, "replace", lambda self, to: (moved.append((to.name, list(synced))), replace(self, to))
        )
        saved(store, 2)
        assert [name for name, _ in moved] == ["step_2.pt", "epoch_latest.pt"]
        assert f"{store.folder}/.step_2.pt.tmp" in moved[0][1]
        assert str(store.folder) in moved[1][1]
        assert synced[-1] == str(store.folder)

    def test_a_branch_that_was_left_is_removed_when_the_other_is_saved(self, store):
        saved(store, 2, 4)
        store.begin(store.step_path(2))
        assert [path.name for path in store.kept()] == ["epoch_latest.pt", "step_4.pt"]
        assert saved_step(store.folder.parent) == 2
        saved(store, 3)
        assert names(store) == ["epoch_latest.pt", "step_2.pt", "step_3.pt"]

    def test_only_the_last_epoch_is_kept_of_a_new_branch_too(self, store):
        store.only_last_epoch = True
        for step, milestone in ((4, 1), (20, 5), (8, 2), (9, None)):
            saved(store, step, milestone=milestone)
        assert [name for name in names(store) if name[6].isdecimal()] == ["epoch_2.pt"]

    def test_leftovers_are_no_checkpoints_and_go(self, store):
        (store.folder / ".step_9.pt.tmp").write_bytes(b"x")
        (store.folder / ".step_9.tmp").mkdir()
        assert store.kept() == []
        assert store.newest_whole().path is None
        store.begin()
        assert names(store) == []


class TestFailingDisk:
    """Writes that fail within a run, and at its end."""

    @pytest.fixture
    def failing(self, monkeypatch):
        """The errors of the writes that are to fail, by the name of the file."""
        errors, save = {}, torch.save

        def failing_save(content, path):
            error = errors.get(path.name)
            if error is not None:
                path.write_bytes(b"half")
                raise error
            save(content, path)

        monkeypatch.setattr(torch, "save", failing_save)
        return errors

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
    def test_training_goes_on_and_the_next_one_is_written(self, code, failing, shards, tmp_path):
        failing[".step_3.pt.tmp"] = OSError(code, os.strerror(code))
        folder, _ = train(config(shards, tmp_path, save_every=1, epochs=1, workers=0))
        said = (folder.path / "out.log").read_text()
        assert f"step_3.pt cannot be written: {os.strerror(code)}" in said
        assert f"Training goes on. The last good checkpoint is {folder.latest}" in said
        assert saved_step(folder.path) == 4
        assert not list(folder.checkpoints.glob(".*"))

    def test_the_last_one_is_tried_again(self, failing, shards, tmp_path):
        error = failing[".step_4.pt.tmp"] = OSError(errno.EIO, "Input/output error")
        tried = []

        def log_tries(self, checkpoint, step, *others):
            tried.append(step)
            if len(tried) == 2:
                failing.clear()
            original(self, checkpoint, step, *others)

        original = Checkpoints._write
        with mock.patch.object(Checkpoints, "_write", log_tries):
            folder, _ = train(config(shards, tmp_path, epochs=1, save_frequency=1, workers=0))
        assert tried == [4, 4]
        assert (folder.checkpoints / "epoch_1.pt").samefile(folder.latest)
        assert saved_step(folder.path) == 4
        assert "Input/output" in (folder.path / "out.log").read_text()
        assert error.errno == errno.EIO

    def test_the_failure_of_the_last_one_is_that_of_the_run(self, failing, shards, tmp_path, capsys):
        failing[".step_24.pt.tmp"] = OSError(errno.EROFS, "Read-only file system")
        code, _, err = run_command(capsys, *command(shards, tmp_path, "--workers", "0"))
        assert code == 2
        assert f"error: {tmp_path}/run/checkpoints/step_24.pt cannot be written: Read-only file system" in err
        assert saved_step(tmp_path / "run") == 23

    def test_of_a_run_that_was_told_to_stop_too(self, failing, shards, tmp_path):
        failing[".step_1.pt.tmp"] = OSError(errno.ENOSPC, "No space left on device")
        with (
            signalled_after(1, signal.SIGTERM),
            pytest.raises(DiskFullError, match=r"step_1\.pt cannot be written: No space left on device"),
        ):
            train(config(shards, tmp_path, workers=0))

    def test_records_that_cannot_be_written_do_not_end_a_run(self, shards, tmp_path):
        folder = RunFolder(tmp_path / "nowhere")
        folder.record(step=1)
        with mock.patch.object(logging.getLogger("clipfast"), "error") as said:
            folder.record(step=2)
        assert "metrics.jsonl cannot be written: No such file or directory" in said.call_args.args[0]

    def test_a_log_that_cannot_be_opened_again_loses_its_line(self, tmp_path):
        folder, log, path = RunFolder(tmp_path), logging.getLogger("clipfast"), tmp_path / "out.log"
        with locked(tmp_path) as folder.lock, logging_to(folder):
            path.unlink()
            with mock.patch.object(logging.FileHandler, "_open", side_effect=OSError(errno.ENOSPC, "full")):
                log.info("lost")
            log.info("kept")
        assert path.read_text().endswith("kept\n")
        assert "lost" not in path.read_text()

    @pytest.mark.parametrize("what", ["removed", "renamed", "the last step"])
    def test_a_folder_that_is_removed_is_made_again(self, what, shards, tmp_path):
        original = Trainer._train_step

        def removing(trainer, batch):
            if trainer.progress.step == (3 if what == "the last step" else 1):
                trainer.checkpoints.wait()
                if what == "renamed":
                    trainer.folder.path.rename(tmp_path / "old")
                else:
                    shutil.rmtree(trainer.folder.path)
            return original(trainer, batch)

        with mock.patch.object(Trainer, "_train_step", removing):
            folder, _ = train(config(shards, tmp_path, save_every=1, epochs=1, workers=0, log_every_n_steps=1))
        assert saved_step(folder.path) == 4
        assert json.loads((folder.path / "results.json").read_text())["steps"] == 4
        log = (folder.path / "out.log").read_text()
        place = f"now {tmp_path}/old" if what == "renamed" else "gone"
        assert (
            f"{folder.path} was renamed or removed: it is made again for what comes; that of before is {place}" in log
        )
        if what == "renamed":
            assert saved_step(tmp_path / "old") == 1
        assert [line["step"] for line in folder.metrics() if "loss" in line][-1] == 4

    @pytest.mark.parametrize("is_held", [False, True])
    def test_a_folder_that_is_another_runs_by_now_stays_as_it_is(self, is_held, shards, tmp_path):
        original, other = Trainer._train_step, tmp_path / "run"

        def replacing(trainer, batch):
            if trainer.progress.step == 2:
                trainer.checkpoints.wait()
                other.rename(tmp_path / "old")
                stack.enter_context(locked(other))
                (other / "metrics.jsonl").touch()
                if not is_held:
                    stack.close()
            return original(trainer, batch)

        with (
            contextlib.ExitStack() as stack,
            mock.patch.object(Trainer, "_train_step", replacing),
            pytest.raises(FolderLostError, match=rf"another folder of that name .* of before is now {tmp_path}/old"),
        ):
            train(config(shards, tmp_path, save_every=1, epochs=1, workers=0, log_every_n_steps=1))
        assert {path.name for path in other.iterdir()} - {LOCK_NAME} == {"metrics.jsonl"}
        assert (other / "metrics.jsonl").read_text() == ""
        assert saved_step(tmp_path / "old") == 2


def signalled_after(step, signum):
    """A signal that comes while the step after ``step`` - 1 is done."""
    original = Trainer._train_step

    def signalled(trainer, batch):
        if trainer.progress.step == step - 1:
            os.kill(os.getpid(), signum)
        return original(trainer, batch)

    return mock.patch.object(Trainer, "_train_step", signalled)


class TestEndings:
    """A run that is told to stop."""

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    def test_saves_and_returns_0(self, signum, shards, tmp_path, capsys):
        with signalled_after(3, signum):
            code, out, err = run_command(capsys, *command(shards, tmp_path, "--workers", "0"))
        assert (code, out) == (0, "")
        assert f"Interrupted. Saved {tmp_path}/run/checkpoints/epoch_latest.pt; go on with: clipfast train" in err
        assert saved_step(tmp_path / "run") == 3

    def test_a_signal_during_a_save(self, shards, tmp_path, gate):
        def open_later():
            assert gate.begun.acquire(timeout=30)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            gate.open.set()

        thread = threading.Thread(target=open_later)
        thread.start()
        folder, signum = train(config(shards, tmp_path, save_every=2, epochs=100, workers=0))
        thread.join()
        assert signum == signal.SIGTERM
        assert gate.written[0] == "step_2.pt"
        newest = Checkpoints(folder.checkpoints).newest_whole()
        assert newest.damaged == []
        assert newest.content["clipfast"]["progress"]["step"] == int(gate.written[-1][5:-3])

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
    def test_a_scheduler_and_torchrun_both_signal(self, signum):
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signum)
        assert interruption.signum == signal.SIGTERM

    def test_a_second_ctrl_c_ends_at_once(self, shards, tmp_path, gate):
        original, waiting = Background.wait, threading.Event()

        def wait(self, *seconds):
            if self.is_busy:
                waiting.set()
            return original(self, *seconds)

        def interrupt_again():
            assert waiting.wait(30)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt_again)
        thread.start()
        with (
            mock.patch.object(Background, "wait", wait),
            signalled_after(3, signal.SIGINT),
            pytest.raises(KeyboardInterrupt),
        ):
            train(config(shards, tmp_path, save_every=2, workers=0))
        thread.join()
        assert gate.written == []
        gate.open.set()


def test_by_the_clock(shards, tmp_path):
    options = config(shards, tmp_path, epochs=1, save_every_minutes=1.0, workers=0)
    clock = [time.monotonic()]
    with mock.patch("clipfast.training.trainer.time.monotonic", side_effect=lambda: clock[0]):
        original, steps = Trainer._train_step, []

        def slow(trainer, batch):
            clock[0] += 35
            return original(trainer, batch)

        with (
            mock.patch.object(Trainer, "_train_step", slow),
            mock.patch.object(
                Checkpoints, "save", autospec=True, side_effect=lambda store, state, step, **_: steps.append(step)
            ),
        ):
            train(options)
    assert steps == [2, 4]
