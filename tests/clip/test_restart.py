"""Runs that go on: from the checkpoint before a damaged one, and by themselves after a restart."""

import gc
import os
import shutil
import signal
import weakref
from unittest import mock

import pytest

from clipfast.checkpoint import read_checkpoint
from clipfast.training.checkpoints import Checkpoints
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.trainer import Trainer

from .conftest import run_command
from .test_checkpointing import signalled_after
from .test_training import command, config, same, saved_step

DAMAGE = {
    "a flipped byte": lambda path: path.write_bytes(
        (whole := path.read_bytes())[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 1])
        + whole[len(whole) // 2 + 1 :]
    ),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: (path.unlink(), path.with_name("step_8.pt").unlink()),
}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    logs = tmp_path_factory.mktemp("whole")
    return train(config(shards, logs, save_every=3, workers=0))[0]


class TestDamage:
    """The newest checkpoint cannot be used."""

    @pytest.fixture
    def run(self, whole, tmp_path):
        shutil.copytree(whole.path, tmp_path / "run")
        store = Checkpoints(tmp_path / "run/checkpoints")
        store.latest.unlink()
        store.begin(store.step_path(8))  # the copy has no links
        return RunFolder(tmp_path / "run")

    @pytest.mark.parametrize("resume", ["latest", "folder"])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_the_one_before_is_taken(self, damage, resume, run, whole, capsys):
        DAMAGE[damage](run.latest)
        named = ["latest", "--name", "run", "--logs", run.path.parent] if resume == "latest" else [run.path]
        code, _, err = run_command(capsys, "train", "--resume", *named)
        assert code == 0, err
        assert f"; the run goes on from {run.checkpoints}/step_6.pt" in err
        assert str(run.latest) in err
        assert same(run.path, whole.path)
        assert [line["step"] for line in run.metrics() if "loss" in line] == [2, 4, 6, 8]

    def test_a_file_that_is_named_is_never_another_one(self, run, capsys):
        DAMAGE["truncated"](run.latest)
        code, _, err = run_command(capsys, "train", "--resume", run.latest)
        assert code == 2
        assert err.strip().endswith(f"the one before is {run.checkpoints}/step_6.pt")

    def test_nothing_begins_anew_where_all_are_damaged(self, run, capsys):
        for path in run.checkpoints.iterdir():
            os.truncate(path, 10)
        code, _, err = run_command(capsys, "train", "--resume", "latest", "--name", "run", "--logs", run.path.parent)
        assert code == 2
        assert "holds no checkpoint that is whole: " in err


def test_the_checkpoint_that_a_run_goes_on_from_is_not_kept_in_memory(shards, tmp_path):
    options = config(shards, tmp_path, workers=0, samples_seen=None, epochs=1)
    with signalled_after(3, signal.SIGTERM):
        folder, _ = train(options)
    kept, fit = [], Trainer.fit

    def read(path, **how):
        content = read_checkpoint(path, **how)
        kept.extend(map(weakref.ref, content["state_dict"].values()))
        return content

    def checked(trainer, interruption):
        gc.collect()
        assert kept
        assert [found for found in (reference() for reference in kept) if found is not None] == []
        return fit(trainer, interruption)

    with mock.patch("clipfast.training.checkpoints.read_checkpoint", read), mock.patch.object(Trainer, "fit", checked):
        train(options, folder.latest)


class TestRestart:
    """The same command again: by torchrun after a failure, and by a scheduler."""

    def test_latest_begins_a_run_that_has_none(self, shards, tmp_path, capsys):
        arguments = [*command(shards, tmp_path), "--resume", "latest"]
        with signalled_after(5, signal.SIGUSR1):
            code, _, err = run_command(capsys, *arguments)
        assert (code, saved_step(tmp_path / "run")) == (0, 5)
        assert f"{tmp_path}/run has no checkpoint yet: the run begins\n" in err
        code, _, err = run_command(capsys, *arguments)
        assert (code, saved_step(tmp_path / "run")) == (0, 24)
        assert "at step 5 of 24" in err

    @pytest.mark.parametrize("resume", ["nothing", "a file of its own"])
    def test_it_goes_on_by_itself(self, resume, shards, tmp_path, capsys, monkeypatch):
        arguments = command(shards, tmp_path, "--save-every", "2")
        with signalled_after(7, signal.SIGTERM):
            run_command(capsys, *arguments)
        extra = ["--resume", tmp_path / "run/checkpoints/step_6.pt"] if resume == "a file of its own" else []
        if not extra:
            assert "holds a run already" in run_command(capsys, *arguments)[2]
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        code, _, err = run_command(capsys, *arguments, *extra)
        assert code == 0, err
        assert "at step 7 of 24" in err

    def test_a_name_by_time_would_be_another_one(self, shards, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        arguments = [
            "train",
            "--train-data",
            shards,
            "--logs",
            tmp_path,
            "--train-num-samples",
            "999",
            "--print-config",
        ]
        for more in ([], ["--recipe", "emoji"]):
            code, _, err = run_command(capsys, *arguments, *more)
            assert code == 2
            assert "a name by time would be another one: give --name" in err
            assert run_command(capsys, *arguments, *more, "--name", "x")[0] == 0
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
        assert run_command(capsys, *arguments)[0] == 0
