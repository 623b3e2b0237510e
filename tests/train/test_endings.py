"""Endings of a training run, and its resumption: saves after errors, damaged checkpoints, and a repeated command."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import pytest

from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.data import Skipped
from clipfast.runs.folder import RunFolder
from clipfast.train.adamw import AdamW
from clipfast.train.loop import train
from clipfast.train.trainer import Trainer

from ..small_runs import draw_pictures, output_of, refusal_of, run_command
from .test_training import before_step, command, same, saved_step


def signalled_after(step, signum):
    """Send a signal to the process during step ``step`` of training."""
    return before_step(step - 1, lambda trainer: os.kill(os.getpid(), signum))


def log_of(folder):
    """Return the text of a training run's ``out.log``."""
    return (folder.path / "out.log").read_text()


def test_an_error_saves_the_steps_before_it(run_small, tmp_path):
    failing = before_step(3, mock.Mock(side_effect=RuntimeError("shard x cannot be read")))
    with failing, pytest.raises(RuntimeError, match="shard x"):
        run_small(workers=1)
    run = RunFolder(tmp_path / "run")
    assert saved_step(run.path) == 3
    assert f"Saved {run.latest}; go on with: clipfast train --resume {run.path}" in log_of(run)
    assert saved_step(run_small(run.latest).path) == 8


def test_a_data_worker_that_is_killed_during_a_step_is_named(run_small, tmp_path):
    def kill(trainer):
        """Kill a data worker of the training run."""
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(30)  # PyTorch's report of the dead worker interrupts this sleep

    with before_step(3, kill), pytest.raises(ValueError, match=r"a data worker died: .* memory, .*--workers"):
        run_small(workers=2)
    assert saved_step(tmp_path / "run") == 3


def test_an_update_that_is_not_complete_is_not_saved(run_small, tmp_path):
    original, calls = AdamW.step, []

    def failing(self, *args, **kwargs):
        """Take AdamW's step in a training run; the sixth one fails after it has changed the weights."""
        calls.append(original(self, *args, **kwargs))
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    with mock.patch.object(AdamW, "step", failing), pytest.raises(RuntimeError, match="out of memory"):
        run_small()
    run = RunFolder(tmp_path / "run")
    assert saved_step(run.path) == 4  # the checkpoint is from the end of the first epoch
    assert f"The last checkpoint is {run.latest}" in log_of(run)


WRITES_FOR_EVER = """
import sys, torch
from unittest import mock
from clipfast.cli.main import main

def write(path, checkpoint):
    print("writing", flush=True)
    while True:
        torch.save(torch.zeros(2**24), "/dev/null")

with mock.patch("clipfast.checkpoints.of_run.write_checkpoint", write):
    sys.exit(main())
"""


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(shards, tmp_path):
    """The second Ctrl-C ends the process although a thread is in C++ code, where Python's own exit would abort."""
    line = [sys.executable, "-c", WRITES_FOR_EVER, *command(shards, tmp_path, "--workers", "0")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert any("press Ctrl-C to stop at once" in said for said in process.stderr)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "clipfast train: interrupted\n")


def test_nothing_is_said_to_be_saved_that_is_not(run_small):
    with mock.patch("clipfast.train.loop._log_start", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        folder = run_small()
    assert folder.kept() == []
    assert "Interrupted. No step was finished." in log_of(folder)


def test_a_run_that_cannot_start_leaves_nothing(run_small, tmp_path):
    with pytest.raises(ValueError, match="less than one batch"):
        run_small(logs=str(tmp_path / "new" / "logs"), batch_size=4000, train_num_samples=None)
    assert not (tmp_path / "new").exists()


def flip(path):
    """Flip a bit in the middle of a training checkpoint."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: (path.unlink(), path.with_name("step_8.pt").unlink()),
}


class TestDamage:
    """Runs are resumed although the newest checkpoint cannot be used."""

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_the_one_before_is_taken(self, damage, copied, finished, capsys):
        DAMAGE[damage](copied.latest)
        named = ["latest", "--name", "run", "--logs", copied.path.parent] if damage == "empty" else [copied.path]
        if damage != "missing":  # a checkpoint that the user names is never replaced by another one
            err = refusal_of(capsys, "train", "--resume", copied.latest)
            assert err.strip().endswith(f"the one before is {copied.checkpoints}/step_6.pt")
        _, err = output_of(capsys, "train", "--resume", *named, "--val-frequency", "0")
        assert re.search(f"{copied.latest}.*; the run goes on from {copied.checkpoints}/step_6.pt", err)
        assert same(copied.path, finished.path)
        assert [line["step"] for line in copied.metrics() if "loss" in line] == [2, 4, 6, 8]

    def test_nothing_begins_anew_where_all_are_damaged(self, copied, capsys):
        for path in copied.checkpoints.iterdir():
            os.truncate(path, 10)
        named = ["latest", "--name", "run", "--logs", copied.path.parent]
        err = refusal_of(capsys, "train", "--resume", *named)
        assert "no checkpoint that is whole" in err


def test_the_same_command_again_goes_on(shards, tmp_path, capsys, monkeypatch):
    """A scheduler repeats a command with --resume latest. After a failure, torchrun repeats a command without it."""
    arguments = command(shards, tmp_path, "--workers", "0", "--epochs", "1")
    latest = ["--resume", "latest"]
    with signalled_after(5, signal.SIGUSR1):
        code, out, err = run_command(capsys, *arguments, *latest)
    assert (code, out, saved_step(tmp_path / "run")) == (0, "", 5)
    assert f"{tmp_path}/run has no checkpoint yet" in err
    with signalled_after(8, signal.SIGTERM):
        assert "at step 5 of 12" in run_command(capsys, *arguments, *latest)[2]
    assert "holds a run already" in run_command(capsys, *arguments)[2]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with signalled_after(11, signal.SIGTERM):
        assert "at step 8 of 12" in run_command(capsys, *arguments)[2]
    code, _, err = run_command(capsys, *arguments, "--resume", tmp_path / "run/checkpoints/step_10.pt")
    assert (code, saved_step(tmp_path / "run")) == (0, 12)
    assert "at step 11 of 12" in err  # after a restart by torchrun, the run goes on from its newest checkpoint


def test_a_name_by_time_would_be_another_one_after_a_restart(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    arguments = ["train", "--train-data", shards, "--logs", tmp_path, "--print-config"]
    for more in ([], ["--recipe", "emoji"]):
        err = refusal_of(capsys, *arguments, *more)
        assert "give --name" in err
        output_of(capsys, *arguments, *more, "--name", "x")


def test_the_checkpoint_that_a_run_goes_on_from_is_not_kept_in_memory(copied, small):
    kept, fit = [], Trainer.fit

    def read(path, **how):
        """Read a checkpoint for a resumed training run, and keep weak references to its weights."""
        content = read_checkpoint(path, **how)
        kept.extend(map(weakref.ref, content["state_dict"].values()))
        return content

    def checked(trainer, interruption):
        """Assert that no tensor of the checkpoint that was read is still alive, then train."""
        gc.collect()
        assert kept
        assert [found for found in (reference() for reference in kept) if found is not None] == []
        # A file that is mapped stays on the disk after it is removed.
        assert str(copied.latest) not in Path("/proc/self/maps").read_text()
        return fit(trainer, interruption)

    with mock.patch("clipfast.checkpoints.of_run.read_checkpoint", read), mock.patch.object(Trainer, "fit", checked):
        train(small(epochs=3), copied.latest)


def test_a_file_limit_is_like_a_full_disk(tmp_path):
    program = (
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from clipfast.io.files import replace_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "replace_file(Path('x'), lambda path: path.write_bytes(bytes(2000)), size=2000)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert "DiskFullError: x cannot be written: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_of_its_own_options_leaves(run_small, monkeypatch):
    """Files have the usual mode, a warm-up longer than the run is logged, and curves are drawn only with matplotlib."""
    monkeypatch.setattr("clipfast.train.loop._pictures", draw_pictures)
    monkeypatch.setitem(sys.modules, "clipfast.evaluate.pictures", None)
    previous = os.umask(0o027)
    try:
        folder = run_small(warmup=2000, epochs=1)
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in folder.path.iterdir() if path.is_file()} == {0o640}
    assert re.search("--warmup 2000 .* 4 steps", log_of(folder))
    assert "matplotlib" in log_of(folder)
    assert (folder.path / "results.json").exists()


def test_names_of_skipped_samples_are_printable(tmp_path):
    folder = RunFolder(tmp_path)
    folder.record_skipped(3, [Skipped("s.tar/\x1b[31mred\x07", "broken image", "a\nb\x00")])
    assert folder.skipped_path.read_text() == "3\ts.tar/\\x1b[31mred\\x07\tbroken image\ta b\\x00\n"
