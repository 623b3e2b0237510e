"""The watchdog: a stuck rank is named in the errors of the others, in time, and writes its stacks if it can."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from clipfast.checkpoints.of_run import Checkpoints
from clipfast.data.loader import PairBatches
from clipfast.distributed import watchdog
from clipfast.distributed.watchdog import Watchdog
from clipfast.train import TrainConfig
from clipfast.train.validation import ImageNet

from ..processes import error_of, run_ranks, start_ranks, wait_for
from .distributed import SHORT, empty, on_rank, trained
from .test_training import saved_step

TIMEOUT = 4  # seconds that a collective may take


@pytest.fixture
def given(options, tmp_path):
    """Return the options of a training run of twelve steps, for the watchdog."""
    return options(tmp_path, "run", **SHORT, dist_timeout=TIMEOUT)


def stalling(world, given, rank, seconds, number):
    """Train while the data loader of one rank sleeps before it makes a batch."""
    original = PairBatches.__getitem__

    def slow(batches, index):
        """Make a training batch; on one rank, batch ``number`` takes ``seconds`` longer."""
        if world.rank == rank and index == number:
            time.sleep(seconds)
        return original(batches, index)

    with mock.patch.object(PairBatches, "__getitem__", slow):
        return trained(world, given)


def is_stopped(process):
    """Return True if a training process is stopped by a signal such as SIGSTOP."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] == "T"
    return False


def wait_until(condition, seconds=60.0):
    """Wait until a condition on the training processes holds; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_by_all_others(given, tmp_path):
    folder = empty(tmp_path)
    processes = start_ranks(on_rank, 3, 3, [(given, (signal.SIGSTOP, (1,), 5))], folder=folder)
    wait_until(lambda: is_stopped(processes[1]))
    stopped = time.monotonic()
    for rank in (0, 2):
        processes[rank].join(20)
    assert time.monotonic() - stopped < TIMEOUT + 1.5  # the collective fails at the timeout
    assert [processes[rank].exitcode for rank in (0, 2)] == [1, 1]
    name = f"rank 1, process {processes[1].pid} on {os.uname().nodename} gives no sign of life; the last was"
    for rank in (0, 2):
        assert f"RuntimeError: rank {rank}: another rank is lost: {name} from step " in error_of(folder, rank)
        assert "_train_step" in (tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text()
    assert "ERROR | at step 6, this rank waits: rank 1," in (tmp_path / "run" / "out.log").read_text()
    assert saved_step(tmp_path / "run") == 3


@pytest.mark.long
def test_a_rank_without_data_is_named_with_its_stack(given, tmp_path):
    folder = empty(tmp_path)
    processes = start_ranks(on_rank, 2, 2, [(given, 1, 600, 5)], stalling, folder=folder)
    wait_for(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1]
    name = r"rank 0: another rank is lost: rank 1, process \d+ on \S+ has waited for its data for \d s at step 6"
    assert re.search(name + r"; .*/stacks/rank_N.txt holds the stacks", error_of(folder, 0))
    stack = (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()
    assert "in slow" in stack
    assert "in _train_epoch" in stack


@pytest.mark.long
def test_slow_ranks_are_not_stuck(given, tmp_path):
    """Ranks are not stuck if a first batch, a checkpoint, or ImageNet's classifier takes longer than the timeout."""
    given |= {"dist_timeout": 3, "train_num_samples": 48}
    assert run_ranks(on_rank, 2, 2, [(given,)], slowly, folder=empty(tmp_path)) == [[(None, {})]] * 2
    assert "ERROR" not in (tmp_path / "run" / "out.log").read_text()
    assert not (tmp_path / "run" / "stacks").exists()


def slowly(world, given):
    """Train on ranks that are slow to save and to evaluate on ImageNet, but alive."""

    def slow(*_):
        """Compute the classifier of ImageNet on a training rank, which takes longer on rank 1."""
        time.sleep(4 * world.rank)
        return torch.full((2, 3), world.rank)

    def save(*args, **options):
        """Save a training checkpoint four seconds late."""
        time.sleep(4)
        return original(*args, **options)

    original, images = Checkpoints.save, ImageNet(TrainConfig(**given, imagenet_val=None))
    with mock.patch.object(Checkpoints, "save", save):
        ended = stalling(world, given, 1, 4.0, 0)
    with mock.patch("clipfast.train.validation.imagenet_classifier", slow):
        return ended, images.evaluate(None, None, None, torch.device("cpu"), world)


def watched(rank, what):
    """Return the diagnosis of rank 0's training watchdog while rank 1 stays in the phase ``what``."""
    store = dist.distributed_c10d._get_default_store()
    dog = Watchdog(store, rank, 2, 1.0)
    dog.arm()
    dist.barrier()
    if rank == 1:
        with dog.phase(what):
            if what == "dead":
                dog.close()
            time.sleep(2.5)
        found = ""
    else:
        with dog.phase("step"):
            time.sleep(0.95)
            found = dog.diagnosis
            with dog.phase("exchange"):
                time.sleep(0.5)
            if what == "later":
                dog.step = 1
                time.sleep(0.2)
                found = dog.diagnosis
    dist.barrier()
    dog.close()
    return [found]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("data", r"rank 1, process \d+ on \S+ has waited for its data for 1 s at step 0"),
        ("evaluation", r"rank 1, .* is in the phase 'evaluation' since 1 s at step 0"),
        ("dead", r"rank 1, .* gives no sign of life; the last was from step 0, phase .*: stopped"),
        ("step", ""),
        ("later", ""),  # rank 0 has gone on to the next step, and blames nobody
    ],
)
def test_who_holds_up_the_others(what, expected, tmp_path):
    (found,), _ = run_ranks(watched, 2, what, folder=tmp_path)
    assert re.match(expected or "$", found), found


def blamed_twice(rank, folder):
    """Return the stacks that rank 1 wrote in each of two waits for its data, and the watchdog's diagnosis."""
    dog = Watchdog(dist.distributed_c10d._get_default_store(), rank, 2, 1.0)
    dog.folder = folder
    dog.arm()
    found = []
    for step in (3, 7):
        dog.step = step + 1 if rank == 0 else step
        dist.barrier()
        with dog.phase("data" if rank == 1 else "step"):
            time.sleep(1.5)
        found += [path.read_text() for path in folder.glob("rank_1.txt")]
        dist.barrier()
        if rank == 0:
            (folder / "rank_1.txt").unlink()
    dist.barrier()
    dog.close()
    return found, dog.diagnosis


def test_a_rank_can_be_named_again(tmp_path):
    (stacks, said), _ = run_ranks(blamed_twice, 2, tmp_path / "stacks", folder=tmp_path)
    assert len(stacks) == 2
    assert re.match(r"rank 1, process \d+ on \S+ has waited for its data for 1 s at step 7", said), said


def endless(rank):
    """Wait forever in a phase of the training step, like a collective of GPUs that does not return."""
    dog = Watchdog(dist.distributed_c10d._get_default_store(), rank, 2, 1.0)
    dog.step = 1 - rank
    dog.arm()
    dist.barrier()
    with mock.patch.object(watchdog, "GRACE", 0.2), dog.phase("step" if rank == 0 else "data"):
        time.sleep(60)


def test_ranks_that_do_not_come_out_are_ended(tmp_path):
    processes = start_ranks(endless, 2, folder=tmp_path)
    wait_for(processes, 20)
    assert [process.exitcode for process in processes] == [1, 1]
