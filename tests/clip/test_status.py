"""``clipfast status``: what it says of runs in every state, and of folders that are incomplete."""

import contextlib
import fcntl
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from clipfast.training.history import read_history
from clipfast.training.lock import LOCK_NAME, holder
from clipfast.training.loop import train
from clipfast.training.status import _trend, read_status

from .conftest import run_command
from .test_training import config, stopped_after

HOLD = """
import sys, time
from pathlib import Path
from clipfast.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
OPENCLIP_LOG = """\
2026-11-20,10:00:00 | INFO | Running in distributed mode with multiple processes. Device: cuda:0.Process (global: 0)
2026-11-20,10:00:10 | INFO | Train Epoch: 0 [  256/10240 (2%)] Data (t): 0.500 Batch (t): 1.000, 256.000/s, \
128.000/s/gpu LR: 0.000010 Logit Scale: 14.286 Contrastive_loss: 5.5452 (5.5452) Loss: 5.5452 (5.5452)
2026-11-20,10:00:30 | WARNING | Handling webdataset error (broken). Ignoring.
2026-11-20,10:01:10 | INFO | Train Epoch: 0 [10240/10240 (100%)] Data (t): 0.010 Batch (t): 0.500, 512.000/s, \
256.000/s/gpu LR: 0.000500 Logit Scale: 15.000 Contrastive_loss: 4.1000 (4.8000) Loss: 4.1000 (4.8000)
2026-11-20,10:01:40 | INFO | Eval Epoch: 1 imagenet-zeroshot-val-top1: 0.1230\timagenet-zeroshot-val-top5: 0.3000
2026-11-20,10:02:10 | INFO | Train Epoch: 1 [ 5120/10240 (50%)] Data (t): 0.010 Batch (t): 0.500, 512.000/s, \
256.000/s/gpu LR: 0.000400 Logit Scale: 16.000 Loss: 3.1000 (3.2"""


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The folder of a run of eight steps with two evaluations."""
    return train(config(shards, tmp_path_factory.mktemp("whole"), val_data=shards))[0].path


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it without its end."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "results.json").unlink()
    return folder


@pytest.fixture
def openclip(tmp_path):
    """The folder of OpenCLIP's trainer in the middle of its second epoch of three, with a last line that is cut."""
    folder = tmp_path / "theirs"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "out.log").write_text(OPENCLIP_LOG)
    (folder / "params.txt").write_text("accum_freq: 1\nbatch_size: 128\nepochs: 3\nlr: 0.0005\nworld_size: 2\n")
    result = {"imagenet-zeroshot-val-top1": 0.123, "image_to_text_R@1": 0.2, "epoch": 1}
    (folder / "checkpoints" / "results.jsonl").write_text(json.dumps(result) + '\n{"imagenet-zero')
    (folder / "checkpoints" / "epoch_1.pt").touch()
    return folder


@contextlib.contextmanager
def held(folder):
    """Let another process hold a run's folder, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def add_to_log(folder, message, level="INFO"):
    with (folder / "out.log").open("a") as file:
        file.write(f"2026-11-20,10:00:00 | {level} | {message}\n")


def add_metrics(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_finished_run(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    code, out, _ = run_command(capsys, "status", whole)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before  # nothing is written
    results = json.loads((whole / "results.json").read_text())
    lines = {line[:11].strip(): line[12:] for line in out.splitlines()}
    assert lines["run"] == "run: finished"
    assert lines["step"] == "8 of 8 (100.0%), epoch 2 of 2"
    assert lines["loss"].startswith(f"{results['train_loss']:.4g}; learning rate ")
    top1 = 100 * results["zero_shot"]["top1"]
    assert lines["evaluation"].startswith(f"after step 8: zero-shot top-1 {top1:.1f}%")
    assert lines["checkpoint"].startswith("epoch_latest.pt, 0:0")
    assert "ETA" not in lines
    (found,) = json.loads(run_command(capsys, "status", whole, "--json")[1])
    assert (found["run"], found["state"], found["step"]) == ("run", "finished", 8)
    assert found["evaluation"]["metrics"]["num_samples"] == 48


def test_a_run_is_running_until_its_process_is_killed(run):
    assert holder(run) is None
    last = read_history(run).lines[-1]["time"]
    with held(run) as process:  # which would fail if it were locked
        found = read_status(run, now=last + 30)
        assert (found["state"], found["process"].split()[:2]) == ("running", ["process", str(process.pid)])
        assert found["warnings"] == []
        (warning,) = read_status(run, now=last + 7200)["warnings"]
        assert re.match("the last line is 2:00:00 old, .* every 0:0", warning)
        assert holder(run) is not None
        with (run / LOCK_NAME).open("a") as file, pytest.raises(BlockingIOError):  # to ask did not take it away
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (run / LOCK_NAME).exists()
    found = read_status(run)
    assert (found["state"], found["process"]) == ("dead", None)


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("Interrupted. Saved x; go on with: clipfast train --resume x", "interrupted"),
        ("The last checkpoint is x; go on with: clipfast train --resume x", "failed"),
        ("Saved x", "dead"),
    ],
)
def test_how_a_run_ended(message, state, run):
    add_to_log(run, message)
    assert read_status(run)["state"] == state


def test_an_interrupted_run(small, tmp_path):
    with stopped_after(3):
        train(small(save_every=2))
    found = read_status(tmp_path / "run")
    assert (found["step"], found["total_steps"], found["eta"]) == (2, 8, None)
    assert found["state"] == "dead"  # as a kill leaves it


def test_results_of_a_run_that_went_on_for_longer_are_old(whole, run):
    shutil.copy(whole / "results.json", run)
    line = {"step": 10, "total_steps": 16, "epoch": 2, "epochs": 4, "loss": 1.0, "lr": 1e-3}
    add_metrics(run, json.dumps(line) + "\n")
    found = read_status(run)
    assert (found["state"], found["step"], found["total_steps"]) == ("dead", 10, 16)


def test_what_is_not_written_yet_is_no_error(run, capsys):
    add_metrics(run, '{"step": 10, "lo')
    assert read_status(run)["step"] == 8
    (run / "metrics.jsonl").write_text("")
    (run / "out.log").write_text("")
    shutil.rmtree(run / "checkpoints")
    code, out, _ = run_command(capsys, "status", run)
    assert (code, out.splitlines()) == (0, ["run         run: dead", "step        none is logged yet"])


def test_warnings_and_skipped_samples(run, capsys):
    add_to_log(run, "something is odd", "WARNING")
    add_to_log(run, "something is wrong", "ERROR")
    (run / "skipped.tsv").write_text("2\ta\tkind\treason\n4\tb\tkind\treason\n6\tcut")
    out = run_command(capsys, "status", run)[1]
    assert re.search("skipped +2 samples", out)
    assert re.search("warnings +2.*\n +something is odd\n +something is wrong\n$", out)


def test_the_trend_of_the_speed():
    assert _trend([1, 100, 100]) is None
    assert _trend([1] + [100] * 4 + [90] * 4) == pytest.approx(-0.1)
    assert _trend([1] + [100] * 40 + [100] * 19 + [5]) == pytest.approx(0)


def test_a_run_of_openclip(openclip, capsys):
    found = read_status(openclip)
    assert [found[key] for key in ("state", "step", "total_steps", "epoch", "epochs")] == ["unknown", 60, 120, 1, 3]
    assert [found[key] for key in ("loss", "lr", "logit_scale")] == [3.1, 0.0004, 16.0]
    assert found["pairs_per_second"] == 512
    assert found["evaluation"]["metrics"]["imagenet-zeroshot-val-top1"] == 0.123
    assert found["evaluation"]["step"] == 40
    assert found["eta"] == 30
    assert "Handling webdataset error (broken). Ignoring." in found["warnings"]
    out = run_command(capsys, "status", openclip)[1]
    assert "after step 40: ImageNet top-1 12.3%, image to text R@1 20.0%" in out
    with (openclip / "out.log").open("a") as file:
        file.write("\n" + OPENCLIP_LOG.splitlines()[3].replace("Train Epoch: 0", "Train Epoch: 2"))
    assert read_status(openclip)["state"] == "finished"


def test_several_runs_are_a_table_and_a_plot(whole, run, openclip, tmp_path, capsys):
    picture = tmp_path / "plot.png"
    code, out, _ = run_command(capsys, "status", whole, tmp_path, "--plot", picture)
    assert code == 0
    header, *rows = [line.split() for line in out.splitlines()]
    assert header[:4] == ["run", "state", "step", "epoch"]
    assert [row[:4] for row in rows] == [
        ["run", "finished", "8/8", "2/2"], ["run", "dead", "8/8", "2/2"], ["theirs", "unknown", "60/120", "2/3"],
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert {path.name for path in tmp_path.iterdir()} == {"run", "theirs", "plot.png"}


def test_evaluations_after_the_same_step_are_shown_together(run, capsys):
    imagenet = {"step": 8, "epoch": 2, "time": 1.0, "imagenet": {"imagenet-zeroshot-val-top1": 0.25}}
    add_metrics(run, json.dumps(imagenet) + "\n")
    out = run_command(capsys, "status", run)[1]
    (line,) = [line for line in out.splitlines() if line.startswith("evaluation")]
    assert "zero-shot top-1" in line.split("ImageNet")[0]
    assert "ImageNet top-1 25.0%" in line


def test_following_ends_with_the_run(run, whole, capsys, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        shutil.copy(whole / "results.json", run)
        process.kill()
        process.wait()

    monkeypatch.setattr(time, "sleep", sleep)
    with held(run) as process:
        code, out, _ = run_command(capsys, "status", run, "--follow", "--interval", "3")
    assert (code, slept) == (0, [3.0])
    assert re.findall("^run .*(running|finished)", out, re.MULTILINE) == ["running", "finished"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/nothing", "no run in {tmp}/nothing"),
        ("{tmp}", "no run in {tmp}"),
        ("{run} --interval 0 --follow", "--interval must be more than 0"),
        ("{run} --plot {tmp}/no/plot.png", "no folder {tmp}/no"),
    ],
)
def test_wrong_input(arguments, message, whole, tmp_path, capsys):
    code, out, err = run_command(capsys, "status", *arguments.format(tmp=tmp_path, run=whole).split())
    assert (code, out) == (2, "")
    assert message.format(tmp=tmp_path) in err
