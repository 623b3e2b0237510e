"""How a run ends, and goes on: what errors save, who holds a folder, what an option may change, and a full disk."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.checkpoint import CheckpointError, read_checkpoint
from clipfast.data import Skipped
from clipfast.files import DiskFullError, replace_file
from clipfast.training.errors import TrainingError
from clipfast.training.lock import LOCK_NAME, locked
from clipfast.training.run import RunFolder

from .conftest import run_command, sample, write_shard
from .test_training import before_step, command, results_of, saved_step, started, wait_for_checkpoint


def failing_after(step, error):
    """Raise ``error`` in place of the step that follows ``step``."""
    return before_step(step, mock.Mock(side_effect=error))


def log_of(folder):
    return (folder.path / "out.log").read_text()


@pytest.fixture
def lasting(shards, tmp_path):
    """A process that trains for long, has saved a step, and is killed in the end."""
    process = started(command(shards, tmp_path, "--epochs", "2000"), stderr=subprocess.DEVNULL)
    wait_for_checkpoint(process, tmp_path / "run", 1)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (ValueError("shard x cannot be read"), 1),
        (RuntimeError("DataLoader worker is killed"), 1),
        (RuntimeError("CUDA out of memory"), 0),
        (OSError("no terminal"), 1),
    ],
)
def test_an_error_saves_the_steps_before_it(run_small, tmp_path, error, workers):
    with failing_after(3, error), pytest.raises(type(error), match=str(error)):
        run_small(workers=workers)
    run = RunFolder(tmp_path / "run")
    assert saved_step(run.path) == 3
    assert f"Saved {run.latest}; go on with: clipfast train --resume {run.path}" in log_of(run)
    assert saved_step(run_small(run.latest).path) == 8


def test_a_data_worker_that_is_killed_during_a_step_is_named(run_small, tmp_path):
    def kill(trainer):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(30)  # PyTorch's report interrupts it

    with before_step(3, kill), pytest.raises(ValueError, match=r"a data worker died: .* memory, .*--workers"):
        run_small(workers=2)
    assert saved_step(tmp_path / "run") == 3


def test_too_many_bad_pairs_save_too(run_small, tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index, **({"png": b"x"} if index % 5 == 0 else {})) for index in range(50)])
    with pytest.raises(TrainingError, match=r"more than --max-bad-fraction 0.01: .* x not an image"):
        run_small(train_data=f"{tmp_path}/s.tar", train_num_samples=160, epochs=1, unique_by=None)
    assert saved_step(tmp_path / "run") == 3  # so many of 24 pairs are not bad by chance


def test_an_update_that_is_not_complete_is_not_saved(run_small, tmp_path):
    original, calls = torch.optim.AdamW.step, []

    def failing(self, *args, **kwargs):
        calls.append(original(self, *args, **kwargs))
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    with mock.patch.object(torch.optim.AdamW, "step", failing), pytest.raises(RuntimeError, match="out of memory"):
        run_small()
    # four steps are an epoch, and were saved then
    run = RunFolder(tmp_path / "run")
    assert saved_step(run.path) == 4
    assert f"The last checkpoint is {run.latest}" in log_of(run)


def test_weights_that_are_not_finite_are_not_saved(run_small, tmp_path):
    with pytest.raises(TrainingError, match="the last 3 steps changed nothing"):
        run_small(opt="sgd", lr=1e38, momentum=0.9, warmup=0, max_nonfinite_steps=3)
    assert RunFolder(tmp_path / "run").kept() == []


WRITES_FOR_EVER = """
import sys, torch
from unittest import mock
from clipfast.cli import main

def write(path, checkpoint):
    print("writing", flush=True)
    while True:
        torch.save(torch.zeros(2**24), "/dev/null")

with mock.patch("clipfast.training.checkpoints.write_checkpoint", write):
    sys.exit(main())
"""


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(shards, tmp_path):
    """It ends what Python's own exit would abort, a thread in the middle of C++ code."""
    line = [sys.executable, "-c", WRITES_FOR_EVER, *command(shards, tmp_path, "--workers", "0")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert any("press Ctrl-C to stop at once" in said for said in process.stderr)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "clipfast train: interrupted\n")


def test_nothing_is_said_to_be_saved_that_is_not(run_small):
    with mock.patch("clipfast.training.loop._log_start", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        folder = run_small()
    assert folder.kept() == []
    assert "No step was finished" in log_of(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_a_folder_has_one_holder_whose_data_workers_die_with_it(lasting, shards, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
    for arguments in (["train", "--resume", tmp_path / "run"], command(shards, tmp_path)):
        code, _, err = run_command(capsys, *arguments)
        assert code == 2
        assert re.search(f"run is in use by process {lasting.pid} on .* since 20", err)
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
    workers = Path(f"/proc/{lasting.pid}/task/{lasting.pid}/children").read_text().split()
    assert workers
    lasting.kill()
    lasting.wait()
    deadline = time.monotonic() + 2  # the loader's own watch takes five seconds
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.02)
    # A process that was killed holds no lock.
    assert (tmp_path / "run" / LOCK_NAME).exists()
    with locked(tmp_path / "run"):
        pass


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_cannot_start_leaves_nothing(run_small, tmp_path):
    with pytest.raises(ValueError, match="less than one batch"):
        run_small(logs=str(tmp_path / "new" / "logs"), batch_size=4000, train_num_samples=None)
    assert not (tmp_path / "new").exists()


class TestOptions:
    """Options that a resumed run is given anew."""

    @pytest.fixture
    def half(self, run_small, tmp_path):
        """The folder of a run of two epochs that was stopped after the first."""
        with failing_after(4, ValueError("stop")), pytest.raises(ValueError, match="stop"):
            run_small()
        return tmp_path / "run"

    @pytest.fixture
    def resumed(self, half, capsys):
        """A function that goes on with that run, and returns exit code and errors."""

        def resume(*words):
            code, _, err = run_command(capsys, "train", "--resume", half, *words)
            return code, err

        return resume

    @pytest.fixture
    def refused(self, half, resumed):
        """A function that asserts that flags are refused and change no file."""

        def refuse(said, *words):
            before = {path: path.read_bytes() for path in half.iterdir() if path.is_file() and path.name != LOCK_NAME}
            code, err = resumed(*words)
            assert code == 2
            assert said in err
            assert before == {path: path.read_bytes() for path in half.iterdir() if path in before}

        return refuse

    def test_another_model_is_refused(self, half, refused):
        refused("those of its own model: --model ", "--model", "RN50")
        refused("--model", "--model", "RN50", "--name", "other")  # nor does another folder make it another model
        assert not (half.parent / "other").exists()

    def test_a_change_is_recorded_from_its_step_on(self, half, resumed):
        started_with = json.loads((half / "config.json").read_text())
        assert resumed("--lr", "0.002", "--log-every-n-steps", "1")[0] == 0
        recorded = json.loads((half / "config.json").read_text())
        assert recorded.pop("changes") == [{"after_step": 4, "lr": 0.002, "log_every_n_steps": 1}]
        assert recorded == started_with
        assert "--lr 0.001 -> 0.002, --log-every-n-steps 2 -> 1" in (half / "out.log").read_text()

    def test_a_finished_run_does_not_change(self, half, resumed, refused):
        assert resumed()[0] == 0
        refused("finished after 8 steps, and its options cannot change any more: --batch-size 8 -> 4",
                "--lr", "1", "--batch-size", "4")  # fmt: skip
        assert resumed("--epochs", "3")[0] == 0
        assert saved_step(half) == 12


class TestDamage:
    """Checkpoints that are damaged or missing."""

    def test_a_flipped_bit_is_found_and_the_one_before_offered(self, run_small, capsys):
        folder = run_small(save_frequency=1)
        content = bytearray(folder.latest.read_bytes())
        content[len(content) // 2] ^= 1
        folder.latest.write_bytes(content)
        code, _, err = run_command(capsys, "train", "--resume", folder.latest)
        assert code == 2
        assert re.search(f"epoch_latest.pt is damaged: the checksum of .*{folder.checkpoints}/step_4.pt", err)
        assert run_command(capsys, "train", "--resume", folder.checkpoints / "epoch_1.pt")[0] == 0

    def test_every_bit_of_a_tensor_counts(self, tmp_path):
        path = tmp_path / "x.pt"
        values = torch.arange(100.0)
        torch.save({"state_dict": {"a": values}}, path)
        whole = path.read_bytes()
        start = whole.index(values.numpy().tobytes())
        for place in range(start, start + values.nbytes, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match="is damaged: the checksum of"):
                read_checkpoint(path)

    def test_the_newest_that_there_is_is_resumed(self, store):
        newest_first = ["step_8.pt", "step_4.pt", "epoch_10.pt", "epoch_2.pt", "epoch_1.pt"]
        for name in sorted(newest_first):
            (store.folder / name).touch()
        assert [path.name for path in store.kept()] == newest_first


class TestFullDisk:
    """Writes that fail for lack of space."""

    @pytest.fixture(params=["PyTorch's words", "the system's"])
    def full(self, request, monkeypatch):
        """Make every checkpoint after the first fail, as PyTorch or the system does, with no space left."""
        saves, original = [], torch.save
        error = OSError(errno.ENOSPC, "No space left on device")
        if request.param == "PyTorch's words":
            error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")

        def save(content, path):
            saves.append(path)
            original(content, path)
            if len(saves) > 1:
                raise error

        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr("shutil.disk_usage", lambda path: mock.Mock(free=0 if len(saves) > 1 else 10**12))
        # The part that was written is smaller than the file that was wanted.
        monkeypatch.setattr("clipfast.checkpoint._nbytes", lambda content: 10**9)

    def test_training_goes_on_and_says_what_is_lost(self, full, run_small, tmp_path):
        with pytest.raises(DiskFullError, match=r"step_12\.pt cannot be written: .*1,000.0 MB are wanted and 0.0 MB"):
            run_small(epochs=3)
        run = RunFolder(tmp_path / "run")
        assert f"The last good checkpoint is {run.latest}" in log_of(run)
        assert log_of(run).count("step_12.pt cannot be written: ") == 2  # at the end of the epoch, and of the run
        assert saved_step(run.path) == 4

    def test_what_fails_for_another_reason_is_not_a_full_disk(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"^broken$"):
            replace_file(tmp_path / "x", mock.Mock(side_effect=RuntimeError("broken")), size=1000)
        assert not list(tmp_path.iterdir())


def test_a_file_limit_is_like_a_full_disk(tmp_path):
    program = (
        "import resource, signal, torch\n"
        "from clipfast import create_model, export_open_clip\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "export_open_clip(create_model('ViT-T-8-32'), 'x')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert "DiskFullError: x/open_clip_model.safetensors cannot be written: " in done.stderr
    assert list((tmp_path / "x").iterdir()) == []


def test_what_a_run_of_its_own_options_leaves(run_small, monkeypatch):
    """Files have the mode of other files, a warm-up that never ends is told, and pictures need matplotlib."""
    monkeypatch.setitem(sys.modules, "clipfast.evaluation.pictures", None)
    previous = os.umask(0o027)
    try:
        folder = run_small(warmup=2000)
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in folder.path.iterdir() if path.is_file()} == {0o640}
    assert re.search("--warmup 2000 .* 8 steps: .* 4e-06 of 0.001", log_of(folder))
    assert "matplotlib" in log_of(folder)
    assert (folder.path / "results.json").exists()


def test_a_bad_validation_image_is_left_out_and_counted(run_small, tmp_path, capsys):
    data = write_shard(tmp_path / "v.tar", [sample(0), sample(1, png=b"x"), sample(2)])
    folder = run_small(val_data=str(data))
    results = results_of(folder.path)
    assert (results["images"], results["skipped_images"]) == (2, 1)
    assert "v.tar/001\tnot an image" in folder.skipped_path.read_text()
    code, out, err = run_command(capsys, "eval", "zeroshot", "--model", f"local-dir:{folder.path}", "--data", data)
    assert code == 0
    assert json.loads(out)["skipped_images"] == 1
    assert "v.tar/001: not an image" in err


def test_a_damaged_shard_is_trained_on_and_named(run_small, tmp_path):
    shard = write_shard(tmp_path / "s.tar", [sample(index) for index in range(48)])
    with tarfile.open(shard) as tar:
        (place,) = [member.offset for member in tar if member.name == "020.png"]
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    folder = run_small(train_data=str(shard), train_num_samples=None, epochs=1, max_bad_fraction=0.1)
    results = results_of(folder.path)
    assert (results["steps"], results["skipped_pairs"]) == (6, 1)
    assert "s.tar/020\tno image" in folder.skipped_path.read_text()


def test_names_of_skipped_samples_are_printable(tmp_path):
    folder = RunFolder(tmp_path)
    folder.record_skipped(3, [Skipped("s.tar/\x1b[31mred\x07", "broken image", "a\nb\x00")])
    assert folder.skipped_path.read_text() == "3\ts.tar/\\x1b[31mred\\x07\tbroken image\ta b\\x00\n"
