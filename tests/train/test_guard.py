"""Steps whose loss or gradient is not finite: all ranks skip them, and the run records their pairs."""

import contextlib
import json
import math
import re
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipfast.data import Batch
from clipfast.distributed.ending import TrainingError
from clipfast.distributed.world import ALONE
from clipfast.models.tokenizer import Tokenizer
from clipfast.runs.folder import RunFolder
from clipfast.train.guard import Guard, GuardedLoss, SkippedSteps
from clipfast.train.optim import parse_arguments
from clipfast.train.schedule import set_lr
from clipfast.train.state import Progress
from clipfast.train.step import TrainingStep
from clipfast.train.trainer import Trainer

from ..processes import run_ranks
from ..small_runs import RESNET, sample
from .distributed import empty, folder_of, on_rank, trained
from .test_training import losses, weights

# Options of runs of ten steps of 12 pairs, by the name of the run.
CASES = {
    "plain": "ema_decay=0.9 grad_clip_norm=0.5",
    "micro": "micro_batch_size=2 opt=adam",
    "momentum": "opt=sgd momentum=0.9 ema_decay=0.9",
    "resnet": f"model={RESNET} ema_decay=0.9 grad_checkpointing=True",
    "resnet-micro": f"model={RESNET} micro_batch_size=2 opt=muon",
}
STRIKES = {3: "gradient", 6: "loss"}  # the steps to skip, counted from 0
STEP = 3


@pytest.fixture(scope="module")
def given(options):
    """Return a function that returns the options of a training run of ten steps for a case, with changes."""
    return lambda logs, case="plain", **changes: options(
        logs, case, **{"train_num_samples": 120} | parse_arguments(CASES[case].split()) | changes
    )


@contextlib.contextmanager
def struck(rank, what, victim):
    """Make training steps not finite on the rank ``victim``; ``what`` says how, by the number of the step.

    "gradient" and "loss" make it NaN, and "all" leaves the step out on every rank.
    """
    backward, original = TrainingStep.backward, Trainer._train_step
    trainers = []

    def remembered(trainer, batch):
        """Take a training step, or leave it out as if its loss and gradients were NaN."""
        trainers[:] = [trainer]
        if what.get(trainer.progress.step) == "all":
            set_lr(trainer.optimizer, trainer.schedule.at(trainer.progress.step))
            trainer.step.guard.figures.copy_(torch.tensor([math.nan, math.nan, 1, 1]))
            return trainer.step.guard.figures.clone()
        return original(trainer, batch)

    def ruined(step, images, texts):
        """Make the gradient or the loss of a training step NaN on the victim's rank."""
        struck = what.get(trainers[0].progress.step) if rank == victim else None
        if struck in (None, "all"):
            return backward(step, images, texts)
        if struck == "gradient":
            handle = step.model.text_projection.register_hook(lambda gradient: gradient.index_fill(0, ONE, math.nan))
            found = backward(step, images, texts)
            handle.remove()
            return found
        plain = step.loss
        step.loss = GuardedLoss(lambda *outputs: plain.loss(*outputs) + math.inf)
        found = backward(step, images, texts)
        step.loss = plain
        return found

    with mock.patch.object(Trainer, "_train_step", remembered), mock.patch.object(TrainingStep, "backward", ruined):
        yield


ONE = torch.tensor([1])


def run(world, given, strike):
    """Train while ``strike`` makes the loss or gradient of some steps NaN; return the error of training, or None."""
    with struck(world.rank, *strike):
        return trained(world, given)


@pytest.fixture
def together(tmp_path):
    """Return a function that runs training jobs on a group of ranks."""

    def do(size, *jobs):
        """Run training jobs on ``size`` ranks, and return the results of each rank."""
        if size == 1:
            return [[run(ALONE, *job) for job in jobs]]
        return run_ranks(on_rank, size, size, jobs, run, folder=empty(tmp_path), timeout=240)

    return do


def skips(folder):
    """Return the records of the training steps that were skipped because they were not finite."""
    return [json.loads(line) for line in folder.nonfinite_path.read_text().splitlines()]


def assert_equal(folder, expected):
    """Assert that the latest checkpoints of two training runs are bit-equal."""
    ours, theirs = weights(folder.path), weights(expected.path)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def assert_as_without(folder, expected):
    """Assert that a training run is bit-equal to a run without the skipped steps."""
    assert_equal(folder, expected)
    assert losses(folder) == losses(expected)
    assert len(losses(folder)) == 10 - len(STRIKES)
    skipped = [line["skipped_steps"] for line in folder.metrics() if "lr" in line]
    assert skipped == [step in STRIKES for step in range(10)]
    assert [line["step"] for line in skips(folder)] == [step + 1 for step in STRIKES]
    assert json.loads((folder.path / "results.json").read_text())["skipped_steps"] == len(STRIKES)


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (1, ["micro", "resnet"]),
        pytest.param(2, ["plain", "resnet-micro"], marks=pytest.mark.long),
        pytest.param(3, ["momentum"], marks=pytest.mark.long),
    ],
)
def test_no_rank_takes_the_step(size, cases, given, together, tmp_path):
    jobs = [given(tmp_path / kind, case) for kind in ("ours", "without") for case in cases]
    strikes = [(STRIKES, size - 1)] * len(cases) + [(dict.fromkeys(STRIKES, "all"), 0)] * len(cases)
    assert together(size, *zip(jobs, strikes, strict=True)) == [[None] * len(jobs)] * size
    for case in cases:
        folder = RunFolder(tmp_path / "ours" / case)
        assert_as_without(folder, RunFolder(tmp_path / "without" / case))
        for what, found in zip(STRIKES.values(), skips(folder), strict=True):
            lost = [rank["loss"] for rank in found["ranks"] if isinstance(rank["loss"], str)]
            assert lost == (["inf"] if what == "loss" else [])
            assert (found["grad_norm"], len(found["ranks"])) == ("nan", size)
            assert (found["parameters"] == ["text_projection"]) == (what == "gradient")


def test_what_is_written_of_a_batch_and_the_norm_that_is_logged(given, tmp_path):
    clipping = mock.patch.object(nn.utils, "clip_grads_with_norm_", side_effect=nn.utils.clip_grads_with_norm_)
    stepping = mock.patch.object(Trainer, "_train_step", autospec=True, side_effect=Trainer._train_step)
    with stepping as steps, clipping as clipped:
        run(ALONE, given(tmp_path), ({STEP: "gradient"}, 0))
    folder = folder_of(given(tmp_path))
    norms = [call.args[2].item() for call in clipped.call_args_list if call.args[2].isfinite()]
    assert [line["grad_norm"] for line in folder.metrics() if "loss" in line] == pytest.approx(norms)
    (found,) = skips(folder)
    (rank,) = found["ranks"]
    texts = [sample(int(key.partition("/")[2]))["txt"].decode() for key in rank["keys"]]
    batch = steps.call_args_list[STEP].args[1]
    assert Tokenizer(16)(texts)[:, : batch.texts.shape[1]].equal(batch.texts)
    assert found["logit_scale"] == pytest.approx(1 / 0.07, rel=0.1)
    said = "Step 4 changed nothing, .* norm is nan, with 1 parameter.* text_proj"
    assert re.search(said, (folder.path / "out.log").read_text())


@pytest.mark.long
def test_too_many_in_a_row_stop_all_ranks(given, together, tmp_path):
    job = given(tmp_path, max_nonfinite_steps=3)
    strike = (dict.fromkeys((1, 2, 4, 5, 6, 7, 8), "loss"), 1)
    found = together(2, (job, strike), (job, strike), (job, ({}, 0)))
    first, second, third = found[0]
    assert found[1] == found[0]
    folder = folder_of(job)
    assert re.search(f"the last 3 steps changed nothing, .* --max-.*{folder.nonfinite_path}", first)
    # The run was saved after step 7. It resumes there with its count of steps that were skipped in a row.
    assert second.startswith("the last 4 steps changed nothing")
    assert third is None
    assert [line["step"] for line in skips(folder)] == [2, 3, 5, 6, 7, 8]
    assert json.loads((folder.path / "results.json").read_text())["skipped_steps"] == 6
    assert all(value.isfinite().all() for value in weights(folder.path).values())


@pytest.mark.parametrize(("device", "waits"), [("cuda", True), ("cpu", False)])
def test_the_host_waits_for_the_verdict_if_it_has_the_weights(device, waits):
    with FakeTensorMode():
        model = nn.Linear(2, 2)
        model.logit_scale = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        optimizer = torch.optim.AdamW([model.weight], fused=True)
        assert Guard(model, optimizer, None).waits == waits


def on_gpu(*values):
    """Return a stand-in for a GPU's verdict on a training step, whose value is known only later."""
    held = torch.tensor(values)
    return mock.Mock(is_cuda=True, to=lambda *_, **__: held, clone=lambda: held)


def test_a_run_that_was_stopped_can_go_on_on_a_gpu(tmp_path):
    """On a GPU, the host learns later than at the end of a step whether the step was skipped."""
    guard, data = mock.Mock(figures=on_gpu(1.0, 2.0, 0.0, 14.0), norms=on_gpu(2.0), names=["w"]), mock.Mock()
    data.names.return_value = []
    progress = Progress(step=8, skipped_steps=3, skipped_in_a_row=3)
    skips = SkippedSteps(guard, data, progress, 3, RunFolder(tmp_path), ALONE)
    batch = Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 4), [])
    with mock.patch("torch.cuda.Event"):
        for progress.step in (9, 10):
            skips(batch)
        assert progress.skipped_in_a_row == 0
        guard.figures = on_gpu(1.0, math.nan, 1.0, 14.0)
        for progress.step in (11, 12, 13):
            skips(batch)
        with pytest.raises(TrainingError, match="the last 3 steps changed nothing"):
            skips.settle()
