"""A rank that is stuck is named in the errors of the others, in time, and says where it is if it still can."""

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

from clipfast import ranks
from clipfast.data.loader import PairBatches
from clipfast.ranks import error_of, run_ranks, start_ranks
from clipfast.training import TrainConfig, watchdog
from clipfast.training import world as world_module
from clipfast.training.checkpoints import Checkpoints
from clipfast.training.imagenet import ImageNet
from clipfast.training.watchdog import Watchdog, record_flights, write_flights_to

from .conftest import TINY, sample, write_shard
from .distributed import on_rank, trained
from .test_training import saved_step

ranks.PRELOAD.append("clipfast.training.trainer")
TIMEOUT = 4  # seconds


@pytest.fixture
def given(tmp_path):
    """Options of a run of twelve steps."""
    write_shard(tmp_path / "a.tar", [sample(index) for index in range(24)])
    return {
        "train_data": f"{tmp_path}/a.tar", "model": TINY, "global_batch_size": 12, "samples_seen": 144, "warmup": 2,
        "train_num_samples": 144, "workers": 0, "save_every": 3, "name": "run", "logs": str(tmp_path),
        "dist_timeout": TIMEOUT,
    }  # fmt: skip


def stalling(world, given, rank, seconds, number):
    """Train, with a data loader of one rank that sleeps before it makes a batch."""
    original = PairBatches.__getitem__

    def slow(batches, index):
        if world.rank == rank and index == number:
            time.sleep(seconds)
        return original(batches, index)

    with mock.patch.object(PairBatches, "__getitem__", slow):
        return trained(world, given)


@contextlib.contextmanager
def started(size, jobs, folder, do=trained):
    folder.mkdir()
    processes = start_ranks(on_rank, size, size, jobs, do, folder=folder)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def is_stopped(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] == "T"
    return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_stopped_is_named_by_all_others(size, given, tmp_path):
    folder = tmp_path / "ranks"
    with started(size, [(given, False, (signal.SIGSTOP, (1,), 5))], folder) as processes:
        wait_until(lambda: is_stopped(processes[1]))
        stopped = time.monotonic()
        others = [rank for rank in range(size) if rank != 1]
        for rank in others:
            processes[rank].join(20)
        # its collective fails at the timeout
        assert time.monotonic() - stopped < TIMEOUT + 1.5
        assert [processes[rank].exitcode for rank in others] == [1] * len(others)
        name = f"rank 1, process {processes[1].pid} on {os.uname().nodename} gives no sign of life; the last was"
        for rank in others:
            assert f"RuntimeError: rank {rank}: another rank is lost: {name} from step " in error_of(folder, rank)
            assert "_train_step" in (tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text()
        said = re.search(r"ERROR \| at step 6, this rank waits: rank 1,", (tmp_path / "run" / "out.log").read_text())
        assert said
    assert saved_step(tmp_path / "run") == 3


@pytest.mark.long
def test_a_rank_without_data_is_named_with_its_stack(given, tmp_path):
    folder = tmp_path / "ranks"
    with started(2, [(given, 1, 600, 5)], folder, stalling) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [1, 1]
    name = r"rank 0: another rank is lost: rank 1, process \d+ on \S+ has waited for its data for \d s at step 6 "
    assert re.search(name + r"\(of a.tar\); .*/stacks/rank_N.txt holds the stacks", error_of(folder, 0))
    stack = (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()
    assert "in slow" in stack
    assert "in _train_epoch" in stack


@pytest.mark.long
def test_slow_ranks_are_not_stuck(given, tmp_path):
    """A start, an evaluation and a checkpoint may take longer than the timeout, and data nearly as long."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    given |= {"dist_timeout": 4}
    assert run_ranks(on_rank, 2, 2, [(given, 1, 5.0, 0)], slowly, folder=folder) == [[None]] * 2
    assert "ERROR" not in (tmp_path / "run" / "out.log").read_text()
    assert not (tmp_path / "run" / "stacks").exists()


def slowly(world, *job):
    save = Checkpoints.save

    def slow(*args, **options):
        time.sleep(5)
        return save(*args, **options)

    with mock.patch.object(Checkpoints, "save", slow):
        return stalling(world, *job)


def meeting(rank, size):
    """Meet, where rank 0 comes later than a collective of the hosts may take."""
    with mock.patch.object(world_module, "PATIENCE", 1.0):
        (found,) = on_rank(rank, size, [({"dist_timeout": 1},)], lambda world, _: late(world))
    return found


def late(world):
    time.sleep(0 if world.rank else 4)
    world.meet(30)
    return True


def test_all_ranks_wait_for_rank_0(tmp_path):
    assert run_ranks(meeting, 2, 2, folder=tmp_path) == [True, True]


def classified(world, given):
    """Make the classifier of ImageNet, of which one rank's part takes longer than the timeout."""
    world.settle()

    def slow(*_):
        time.sleep(3 * world.rank)
        return torch.full((2, 3), world.rank)

    images = ImageNet(TrainConfig(**given, imagenet_val=None))
    with mock.patch("clipfast.training.imagenet.imagenet_classifier", slow):
        return images.evaluate(None, None, None, torch.device("cpu"), world)


def test_the_classifier_of_imagenet_may_take_longer_than_the_timeout(given, tmp_path):
    (tmp_path / "ranks").mkdir()
    given |= {"dist_timeout": 1}
    assert run_ranks(on_rank, 2, 2, [(given,)], classified, folder=tmp_path / "ranks") == [[{}]] * 2


def watched(rank, what):
    """Return what a watchdog says on rank 0, while rank 1 does something."""
    store = dist.distributed_c10d._get_default_store()
    dog = Watchdog(store, rank, 2, 1.0)
    dog.arm()
    dist.barrier()
    if rank == 1:
        with dog.phase("step" if what == "step" else what, lambda: "of x.tar"):
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
        ("data", r"rank 1, process \d+ on \S+ has waited for its data for 1 s at step 0 \(of x.tar\)"),
        ("evaluation", r"rank 1, .* is in the phase 'evaluation' since 1 s at step 0"),
        ("dead", r"rank 1, .* gives no sign of life; the last was from step 0, phase .*: stopped"),
        ("step", ""),
        ("wait", ""),
        ("later", ""),  # it went on
    ],
)
def test_who_holds_up_the_others(what, expected, tmp_path):
    (found,), _ = run_ranks(watched, 2, what, folder=tmp_path)
    assert re.match(expected or "$", found), found


def blamed_twice(rank, folder, late):
    """Return the stacks of rank 1 after each of two waits for its data, of which the first one ends."""
    dog = Watchdog(dist.distributed_c10d._get_default_store(), rank, 2, 1.0)
    dog.folder = folder
    dog.arm()
    found = []
    for step in (3, 7):
        dog.step = step + late if rank == 0 else step
        dist.barrier()
        with dog.phase("data" if rank == 1 else "step", lambda: 1 / 0):  # what is told of a phase may fail
            time.sleep(1.5)
        found += [path.read_text() for path in folder.glob("rank_1.txt")]
        dist.barrier()
        if rank == 0:
            (folder / "rank_1.txt").unlink()
    dist.barrier()
    dog.close()
    return found, dog.diagnosis


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_can_be_named_again(late, tmp_path):
    (stacks, said), _ = run_ranks(blamed_twice, 2, tmp_path / "stacks", late, folder=tmp_path)
    assert len(stacks) == 2
    assert re.match(r"rank 1, process \d+ on \S+ has waited for its data for 1 s at step 7", said), said


def endless(rank, late):
    """Wait for ever in a phase of the step, as in a collective of GPUs that does not return."""
    dog = Watchdog(dist.distributed_c10d._get_default_store(), rank, 2, 1.0)
    dog.step = late if rank == 0 else 0
    dog.arm()
    dist.barrier()
    with mock.patch.object(watchdog, "GRACE", 0.2), dog.phase("step" if rank == 0 else "data"):
        time.sleep(60)


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_do_not_come_out_are_ended(late, tmp_path):
    processes = start_ranks(endless, 2, late, folder=tmp_path)
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [1, 1]


def test_the_flight_recorder_is_on_unless_the_user_says_else(monkeypatch, tmp_path):
    names = {
        "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    }  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    record_flights()
    write_flights_to(tmp_path)
    assert {name: os.environ[name] for name in names} == {
        "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl_", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/nccl_",
    }  # fmt: skip
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    record_flights()
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "0"
