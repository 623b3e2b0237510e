"""``clipfast status`` on runs in every state, and on incomplete folders."""

import fcntl
import json
import shutil
import subprocess
import sys
import time

import pytest

from clipfast.runs.lock import LOCK_NAME
from clipfast.runs.status import read_status

from ..small_runs import commands, everything, output_of, run_command
from .test_training import results_of

HOLD = """
import sys, time
from pathlib import Path
from clipfast.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(copied):
    """Copy a finished training run without its last records."""
    (copied.path / "results.json").unlink()
    return copied.path


def add(path, line):
    """Append a line to a file of records of a training run."""
    with path.open("a") as file:
        file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def test_a_finished_run(finished, capsys):
    before = everything(finished.path)
    out, _ = output_of(capsys, "status", finished.path)
    results = results_of(finished.path)
    lines = {line[:11].strip(): line[12:] for line in out.splitlines()}
    assert lines["run"] == "run: finished"
    assert lines["step"] == "8 of 8 (100.0%), epoch 2 of 2"
    assert lines["loss"].startswith(f"{results['train_loss']:.4g}; learning rate ")
    assert lines["evaluation"].startswith(f"after step 8: zero-shot top-1 {100 * results['zero_shot']['top1']:.1f}%")
    assert lines["checkpoint"].startswith("epoch_latest.pt, ")
    assert "ETA" not in lines
    (found,) = json.loads(run_command(capsys, "status", finished.path, "--json")[1])
    assert (found["run"], found["state"], found["step"]) == ("run", "finished", 8)
    assert found["evaluation"]["metrics"]["num_samples"] == 48
    assert everything(finished.path) == before


def test_a_run_is_followed_while_its_process_lives(run, finished, capsys, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    slept = []

    def sleep(seconds):
        """End the followed training run in place of the wait before the next look at its status."""
        slept.append(seconds)
        process.kill()
        process.wait()
        shutil.copy(finished.path / "results.json", run)

    try:
        found = read_status(run)
        assert (found["state"], found["process"].split()[:2]) == ("running", ["process", str(process.pid)])
        with (run / LOCK_NAME).open("a") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # reading the status has not released the run's lock
        assert read_status(run, now=found["updated"] + 30)["warnings"] == []
        (warning,) = read_status(run, now=found["updated"] + 7200)["warnings"]
        assert warning.startswith("the last line is 2:00:00 old")
        monkeypatch.setattr(time, "sleep", sleep)
        code, out, _ = run_command(capsys, "status", run, "--follow", "--interval", "3")
    finally:
        process.kill()
        process.wait()
    assert (code, slept) == (0, [3.0])
    states = [line.split()[2] for line in out.splitlines() if line.startswith("run ")]
    assert states == ["running", "finished"]
    (run / "results.json").unlink()
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
    add(run / "out.log", f"2026-11-20,10:00:00 | INFO | {message}\n")
    assert read_status(run)["state"] == state


def test_results_of_a_run_that_went_on_for_longer_are_old(copied):
    add(copied.metrics_path, {"step": 10, "total_steps": 16, "epoch": 2, "epochs": 4, "loss": 1.0, "lr": 1e-3})
    add(copied.metrics_path, '{"step": 12, "lo')
    found = read_status(copied.path)
    assert (found["state"], found["step"], found["total_steps"]) == ("dead", 10, 16)


def test_what_is_not_written_yet_is_no_error(run, capsys):
    (run / "metrics.jsonl").write_text("")
    (run / "out.log").write_text("")
    shutil.rmtree(run / "checkpoints")
    code, out, _ = run_command(capsys, "status", run)
    assert (code, out.splitlines()) == (0, ["run         run: dead", "step        none is logged yet"])


def test_warnings_skipped_samples_and_several_evaluations(run, capsys):
    for level in ("WARNING", "ERROR"):
        add(run / "out.log", f"2026-11-20,10:00:00 | {level} | something is odd\n")
    (run / "skipped.tsv").write_text("2\ta\tkind\treason\n4\tb\tkind\treason\n6\tcut")
    imagenet = {"step": 8, "epoch": 2, "time": 1.0, "imagenet": {"imagenet-zeroshot-val-top1": 0.25}}
    add(run / "metrics.jsonl", imagenet)
    out = run_command(capsys, "status", run)[1]
    assert "skipped     2 samples" in out
    assert out.splitlines()[-3:] == ["warnings    2; the last:", *[" " * 12 + "something is odd"] * 2]
    assert "zero-shot top-1" in out
    assert "ImageNet top-1 25.0%" in out


def test_several_runs_are_a_table_and_a_plot(finished, run, tmp_path, capsys):
    picture = tmp_path / "plot.png"
    out, _ = output_of(capsys, "status", finished.path, tmp_path, "--plot", picture)
    header, *rows = [line.split() for line in out.splitlines()]
    assert header[:4] == ["run", "state", "step", "epoch"]
    assert [row[:4] for row in rows] == [["run", "finished", "8/8", "2/2"], ["run", "dead", "8/8", "2/2"]]
    assert picture.stat().st_size > 20_000


@commands("""
nothing => there is no run in nothing
theirs => there is no run in theirs
run --interval 0 --follow => --interval must be more than 0, got 0.0
""")
@pytest.mark.usefixtures("copied")
def test_wrong_input(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    for name in ("out.log", "params.txt"):  # OpenCLIP's trainer writes files of these names, too
        (tmp_path / "theirs" / name).touch()
    code, out, err = run_command(capsys, "status", *words)
    assert (code, out) == (2, "")
    assert said in err
