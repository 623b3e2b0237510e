"""Endings of runs on several processes, and their resumption: signals, bad pairs, lost or stuck ranks, and torchrun."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from clipfast.distributed.world import ALONE, joined
from clipfast.evaluate.encoder import Encoder
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig
from clipfast.train.loop import train

from ..processes import error_of, run_ranks, start_ranks, wait_for
from .distributed import SHORT, empty, newest, on_rank, run_together, skipped_in, trained
from .test_training import same, saved_step, wait_for_checkpoint


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """Return the folder of an undisturbed training run on 3 ranks."""
    logs = tmp_path_factory.mktemp("whole")
    assert run_together(logs, 3, (options(logs, "whole", **SHORT),)) == [[None]] * 3
    return logs / "whole"


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_after_the_same_step(options, together, whole, tmp_path):
    given = options(tmp_path, "run", **SHORT)
    jobs = (given, (signal.SIGTERM, (1,), 0)), (given, (signal.SIGINT, (0,), 5)), (given,)
    assert together(3, *jobs) == [[signal.SIGTERM, signal.SIGINT, None]] * 3
    log = (tmp_path / "run" / "out.log").read_text()
    assert re.findall(r"Stopping after step (\d+): (\w+) came", log) == [("2", "SIGTERM"), ("7", "SIGINT")]
    assert log.count("Interrupted. Saved ") == 2
    assert same(whole, tmp_path / "run")


@pytest.mark.long
def test_too_many_bad_pairs_stop_all_ranks(options, together, tmp_path):
    given = options(tmp_path, "faults", max_bad_fraction=0.01, train_num_samples=357)
    first, second = together(2, (given,))
    assert first == second
    skipped, seen = map(int, re.match(r"(\d+) of (\d+) pairs could not be used, more than", first[0]).groups())
    assert len(skipped_in(RunFolder(tmp_path / "faults"))) == skipped
    assert seen == 12 * saved_step(tmp_path / "faults")
    trained(ALONE, given | {"name": "alone"})
    assert set(skipped_in(RunFolder(tmp_path / "alone"))) <= set(skipped_in(RunFolder(tmp_path / "faults")))
    # Several ranks know the number of pairs that they have skipped in all one step later than a single process does.
    assert saved_step(tmp_path / "faults") - saved_step(tmp_path / "alone") in (0, 1)


@pytest.mark.long
@pytest.mark.parametrize("what", ["error", signal.SIGKILL])
def test_a_rank_that_is_lost_ends_the_others(what, options, together, whole, tmp_path):
    given = options(tmp_path, "run", **SHORT)
    folder = empty(tmp_path)
    processes = start_ranks(on_rank, 3, 3, [(given, (what, (1,), 5))], folder=folder)
    wait_for(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1 if what == "error" else -signal.SIGKILL, 1]
    errors = [error_of(folder, rank) for rank in range(3)]
    assert saved_step(tmp_path / "run") == 3
    if what == "error":
        assert "RuntimeError: rank 1: shard x is gone" in errors[1]
        assert [errors[rank].strip().splitlines()[-1] for rank in (0, 2)] == ["SystemExit: 1"] * 2
        return
    # One of the remaining ranks prints which rank is lost.
    (said,) = (error for error in errors if ": another rank is lost: " in error)
    assert f"rank 1, process {processes[1].pid} on " in said
    assert sum("SystemExit: 1" in error for error in errors) == 1
    together(3, (given,))
    assert same(tmp_path / "run", whole)


def started(given):
    """Start the training command with torchrun; "--" keeps torchrun from taking --logs for a flag of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    launcher = "-m torch.distributed.run --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.2"
    command = f"{launcher} -m clipfast -- train".split()
    return subprocess.Popen([sys.executable, *command, *flags], stderr=subprocess.PIPE, text=True)


def ranks_of(process):
    """Return the process of each training rank that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        with contextlib.suppress(OSError):  # a child process may have ended since torchrun's children were listed
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(line[5:]): int(pid) for line in variables if line.startswith(b"RANK=")}
    return found


@pytest.mark.long
def test_torchrun_starts_lost_ranks_again_which_save_and_end_if_it_is_killed(options, tmp_path):
    given = options(tmp_path, "run", **SHORT | {"workers": 1, "save_every": 1, "train_num_samples": 60_000})
    process = started(given)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    first, before = ranks_of(process), saved_step(tmp_path / "run")
    os.kill(first[1], signal.SIGKILL)
    while set(ranks_of(process).values()) & set(first.values()):
        time.sleep(0.1)
    wait_for_checkpoint(process, tmp_path / "run", saved_step(tmp_path / "run") + 2)
    process.kill()
    said = process.communicate(timeout=60)[1]  # wait until torchrun and all ranks, which may write messages, have ended
    assert said.count("error: rank 0: another rank is lost: ") == said.count("Resuming from ") == 1
    # The first rank that notices the loss of torchrun says so.
    assert f"torchrun, process {process.pid}, is gone" in said
    assert (tmp_path / "run" / "out.log").read_text().count("Interrupted. Saved ") == 1
    assert before < saved_step(tmp_path / "run") < 5000


@pytest.mark.long
def test_a_rank_whose_torchrun_is_gone_does_not_start(options, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused.getsockname()[1], "RANK": 0, "WORLD_SIZE": 2}
    for name, value in {**place, "LOCAL_RANK": 0, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("clipfast.distributed.world.ANSWER", 1)
    # ANSWER limits the wait for torchrun's store, which has the timeout of ten minutes otherwise.
    with pytest.raises(RuntimeError, match="timed out"), joined("cpu", 10):
        pass


def signalled_in_evaluation(world, given, victim=None):
    """Train with a signal to one rank during an evaluation; return how training ended, and the encoded blocks."""
    encode, blocks = Encoder.images, []

    def slow(encoder, pixels):
        """Encode a block of an evaluation in training; one rank gets SIGTERM meanwhile, and the others are slow."""
        blocks.append(len(pixels))
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.0 if victim is None or world.rank == victim else 0.3)
        return encode(encoder, pixels)

    with mock.patch.object(Encoder, "images", slow), mock.patch("clipfast.train.validation.BATCH_SIZE", 1):
        ended = train(TrainConfig(**given), newest(given), world=world)[1]
    return ended, len(blocks)


@pytest.mark.long
def test_a_signal_ends_an_evaluation_on_all_ranks(options, tmp_path):
    given = options(tmp_path, "run", val_data=options(tmp_path, "mix")["val_data"], **SHORT)
    jobs = [(given, 1), (given, 1), (given,)]
    found = run_ranks(on_rank, 2, 2, jobs, signalled_in_evaluation, folder=empty(tmp_path), timeout=240)
    whole = found[0][2][1]
    for after_epoch, at_the_end, undisturbed in found:
        assert undisturbed[0] is None
        for ended, blocks in (after_epoch, at_the_end):
            assert ended == signal.SIGTERM
            assert blocks < whole
    assert [blocks for _, blocks in found[1][:2]] == [1, 1]
    assert (tmp_path / "run" / "out.log").read_text().count("Interrupted. Saved ") == 2
    assert (tmp_path / "run" / "results.json").exists()
