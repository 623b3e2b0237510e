"""``clipfast eval zeroshot --watch``: every checkpoint of a run is evaluated once, during the run and after it."""

import json
import os
import re
import shutil
from unittest import mock

import pytest

from clipfast.checkpoints.of_run import read_saved
from clipfast.checkpoints.sharded import write_parts
from clipfast.distributed.world import ALONE
from clipfast.evaluate import watch
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.watch import Evaluator, Watch
from clipfast.runs.folder import RunFolder, read_lines
from clipfast.runs.status import read_status
from clipfast.train.loop import train

from ..train.test_logs import read_back
from ..train.test_training import config
from .benchmark_sets import coded, write_set
from .eval_commands import check_refused, evaluated, printed, wrong_inputs


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """Train the run to watch, with an average of its weights (EMA) and two evaluated checkpoints; return its folder."""
    given = config(shards, tmp_path_factory.mktemp("whole"), val_data=shards, save_frequency=1, ema_decay=0.5)
    return train(given)[0].path


@pytest.fixture
def run(whole, tmp_path):
    """Copy the watched run, with the times of its files."""
    return RunFolder(shutil.copytree(whole, tmp_path / "run"))


def lines_of(folder: RunFolder):
    """Return the lines of results that a watch has written."""
    return read_lines(folder.path / watch.NAME)


def watching(folder, shards, **options):
    """Return a Watch, which evaluates the checkpoints of a run."""
    return Watch(folder.path, Evaluator(LabelledSet(shards)), {"data": shards}, **options)


def steps_of(folder, shards, **options):
    """Return the steps of the checkpoints that a new watch of the run evaluates."""
    return [line["step"] for line in watching(folder, shards, **options).run(0.01)]


def just_before_a_read(event):
    """Call ``event(path)`` just before a watch reads a checkpoint."""
    original = watch.read_checkpoint
    return mock.patch.object(watch, "read_checkpoint", lambda path: event(path) or original(path))


def keep_some(run):
    """Remove the watched run's checkpoints of epoch 2 and step 8 except epoch_latest.pt, which is the same file."""
    for path in run.checkpoints.glob("*_[28].pt"):
        path.unlink()


def test_what_is_there_is_evaluated_from_the_oldest_on(run, shards, capsys):
    expected = [line["eval"] for line in run.metrics() if "eval" in line]
    # The watch does not compute clip_val_loss.
    assert all(0 < evaluation.pop("clip_val_loss") < 10 for evaluation in expected)
    out, _ = printed(capsys, "zeroshot", "--watch", run.path, "--data", shards)
    found = lines_of(run)
    assert [(line["step"], line["epoch"], line["samples_seen"]) for line in found] == [(4, 1, 32), (8, 2, 64)]
    assert [line["eval"] for line in found] == expected  # the watch evaluates averaged weights, as training does
    top1 = {step: evaluation["zero_shot"]["top1"] for step, evaluation in zip((4, 8), expected, strict=True)}
    assert out.startswith(f"step 4 (epoch_1.pt): zero-shot top-1 {100 * top1[4]:.1f}%")
    (board,) = (run.path / "tensorboard").glob("evaluations-*")
    assert dict(read_back(board)["val/zeroshot-val-top1"]) == pytest.approx(top1)
    assert read_status(run.path)["evaluation"]["step"] == 8


def test_nothing_is_evaluated_twice(run, shards):
    assert steps_of(run, shards) == [4, 8]
    assert steps_of(run, shards) == []
    # Checkpoints that differ only in their files' times are not evaluated again: a resumed run writes the same
    # checkpoint anew, and a copy of the folder has other times.
    for path in run.checkpoints.glob("*.pt"):
        os.utime(path, ns=(1, 1 + path.stat().st_mtime_ns))
    assert steps_of(run, shards) == []
    assert len(lines_of(run)) == 2
    expected = json.loads((run.path / "results.json").read_text())["raw"]
    del expected["clip_val_loss"]
    raw = list(watching(run, shards, average=False).run(0.01))
    assert [line["step"] for line in raw] == [4, 8]
    assert raw[-1]["eval"] == expected


def test_a_kill_within_the_watch_loses_one_evaluation_at_most(run, shards):
    next(watching(run, shards).run(0.01))
    with (run.path / watch.NAME).open("a") as file:
        file.write('{"step": 8, "wei')  # a kill has cut this line of results short
    assert steps_of(run, shards) == [8]
    assert steps_of(run, shards) == []


def test_a_checkpoint_that_vanishes_is_skipped_and_a_damaged_one_is_told(run, shards, capsys):
    content = (run.checkpoints / "step_4.pt").read_bytes()
    (run.checkpoints / "epoch_5.pt").write_bytes(content[: len(content) // 2])

    def vanish(path):
        """Remove checkpoints of the run that is watched, just before they are read."""
        if path.name == "epoch_1.pt":
            path.unlink()
            (run.checkpoints / "step_4.pt").unlink()

    with just_before_a_read(vanish):
        assert steps_of(run, shards) == [8]
    err = capsys.readouterr().err
    assert err.count("left out") == 1
    assert "epoch_5.pt" in err


def test_a_file_is_found_by_another_name_when_its_first_is_removed_or_moves_on(run, shards):
    last = run.checkpoints / "aside.pt"
    run.latest.rename(last)
    keep_some(run)
    for path in (run.checkpoints / "step_4.pt", run.latest):
        path.unlink(missing_ok=True)
        path.hardlink_to(run.checkpoints / "epoch_1.pt")

    def go_on(_):
        """Move the newest checkpoint of the run that is watched, as training does."""
        if last.exists():  # training goes on while the watch is about to read
            last.replace(run.latest)
            (run.checkpoints / "step_4.pt").unlink()

    with just_before_a_read(go_on):
        found = list(watching(run, shards).run(0.01))
    assert [(line["step"], line["checkpoint"]) for line in found] == [(4, "epoch_1.pt"), (8, "epoch_latest.pt")]


def in_parts(run):
    """Replace the checkpoint files of the watched run by folders, as ``--fsdp-checkpoint sharded`` writes them."""
    for step, path in ((4, run.checkpoints / "epoch_1.pt"), (8, run.latest)):
        write_parts(run.checkpoints / f"step_{step}", read_saved(path), ALONE)
    for path in run.checkpoints.glob("*.pt"):
        path.unlink()


def test_checkpoints_in_parts_are_evaluated_and_a_damaged_one_is_told(run, shards, capsys):
    expected = [line["eval"] for line in watching(run, shards).run(0.01)]
    (run.path / watch.NAME).unlink()
    in_parts(run)
    found = list(watching(run, shards).run(0.01))
    assert [(line["step"], line["checkpoint"]) for line in found] == [(4, "step_4"), (8, "step_8")]
    assert [line["eval"] for line in found] == expected
    assert steps_of(run, shards) == []
    (run.path / watch.NAME).unlink()
    part = next((run.checkpoints / "step_4").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert steps_of(run, shards) == [8]
    assert f"left out: {run.checkpoints / 'step_4'} is damaged: {part.name}" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_waited_for(run, shards):
    results, latest, aside = run.path / "results.json", run.latest, run.path / "aside.pt"
    results.rename(run.path / "aside.json")
    latest.rename(aside)
    keep_some(run)
    waits = []

    def come(seconds):
        """Let a checkpoint of the watched run arrive after some waits."""
        waits.append(seconds)
        if len(waits) == 2:
            aside.rename(latest)
        if len(waits) == 4:
            (run.path / "aside.json").rename(results)

    with mock.patch.object(watch.time, "sleep", come):
        assert [line["step"] for line in watching(run, shards).run(7.0)] == [4, 8]
    assert waits == [7.0] * 4


WRONG = {
    "": "--model or --watch is needed",
    "--watch nowhere": "--watch nowhere: there is no run in that folder",
    "--watch {run} --model x.pt": "--watch cannot be used with --model",
    "--watch {run} --features {run}": "--watch cannot be used with --features",
    "--model x.pt --interval 30": "--interval is for the checkpoints of a run: give --watch RUN",
    "--model x.pt --raw": "--raw is for the checkpoints of a run: give --watch RUN",
    "--watch {run} --interval inf": "--interval must be more than 0, and finite, got inf",
}


@wrong_inputs(WRONG)
def test_wrong_input(words, message, whole, shards, capsys):
    check_refused(capsys, whole, message, "zeroshot", "--data", shards, words=words, run=whole)


def test_the_suite_is_evaluated_on_each_checkpoint(run, tmp_path, capsys):
    root, plot = tmp_path / "root", tmp_path / "p.png"
    for name in ("vtab-cifar10", "vtab-dtd"):
        write_set(root / f"wds_{name}", images=12, shards=1, draw=coded)
    write_set(root / "wds_flickr8k", images=8, kind="retrieval", draw=coded)
    command = ["suite", "--watch", run.path, "--root", root, "--plot", plot, "--raw"]
    out, _ = printed(capsys, *command)
    drawn = plot.read_bytes()
    plot.unlink()
    printed(capsys, *command)
    assert plot.read_bytes() == drawn  # a watch that is started again shows earlier evaluations too
    assert drawn[:4] == b"\x89PNG"
    lines = read_lines(run.path / "suite.jsonl")
    sets = ["flickr8k", "vtab/cifar10", "vtab/dtd"]
    assert [(line["step"], line["sets"]) for line in lines] == [(4, sets), (8, sets)]
    last = lines[1]["eval"]
    (mean,) = last["means"][-1]["values"]
    assert mean == pytest.approx(sum(x["metrics"].get("acc1", 0) for x in last["results"]) / 2)
    assert re.search(rf"^step 8 .* mean of acc1 {mean:.1%}, flickr8k image_retrieval_recall@5 ", out, re.M)
    (board,) = (run.path / "tensorboard").glob("suite-*")
    assert [step for step, _ in read_back(board)["val/vtab/dtd acc1"]] == [4, 8]
    assert lines_of(run) == []  # results of the suite are in a file of their own
    # The suite gives the same results for the last checkpoint without --watch.
    output = ["--output", tmp_path / "out"]
    alone = evaluated(capsys, "suite", "--root", root, "--model", run.latest, *output)
    assert [found["metrics"] for found in last["results"]] == [found["metrics"] for found in alone["results"]]
    check_refused(capsys, run.path, "--watch cannot be used with --output", *command, "--overwrite", *output)


@pytest.mark.parametrize("task", ["zeroshot", "suite"])
def test_data_that_changed_under_the_same_path_is_evaluated_anew(task, run, shards, tmp_path, capsys):
    """The watch evaluates checkpoints again when images or prompts have changed under the same path."""
    folder = write_set(tmp_path / "root" / "wds_vtab-dtd", images=12, shards=1, draw=coded)
    shard, prompts = folder / "test" / "0.tar", folder / "zeroshot_classification_templates.txt"
    given = ["--root", tmp_path / "root"]
    if task == "zeroshot":
        shard = shutil.copy(shards.partition("::")[0], tmp_path)
        prompts.write_text("a {}\n")
        given = ["--data", shard, "--templates", prompts]

    def steps():
        """Return the steps that a watch by ``clipfast eval`` prints as evaluated."""
        return re.findall("step [0-9]+", printed(capsys, task, "--watch", run.path, *given)[0])

    assert (steps(), steps()) == (["step 4", "step 8"], [])
    os.utime(shard, ns=(1, 1))
    assert (steps(), steps()) == (["step 4", "step 8"], [])
    prompts.write_text("one {}\n" if task == "zeroshot" else "one {c}\n")
    assert steps() == ["step 4", "step 8"]
