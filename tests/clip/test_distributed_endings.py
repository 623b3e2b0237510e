"""How a run on several processes ends, and goes on: signals, bad pairs, ranks that are lost or hang, and torchrun."""

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

from clipfast.evaluation.encoder import Encoder
from clipfast.ranks import error_of, run_ranks, start_ranks, wait_for
from clipfast.training import TrainConfig
from clipfast.training.loop import train
from clipfast.training.run import RunFolder
from clipfast.training.world import ALONE, joined

from .distributed import SHORT, empty, folder_of, on_rank, skipped_in, trained
from .test_training import same, saved_step, wait_for_checkpoint


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_after_the_same_step(options, together, tmp_path):
    given = {name: options(tmp_path, name, **SHORT) for name in ("whole", "early", "late")}
    found = together(
        2,
        (given["whole"],),
        (given["early"], False, (signal.SIGTERM, (1,), 0)),
        (given["early"], True, (signal.SIGINT, (0,), 5)),
        (given["early"], True),
        (given["late"], False, (signal.SIGTERM, (1,), 10)),
    )
    assert found == [[None, signal.SIGTERM, signal.SIGINT, None, signal.SIGTERM]] * 2
    log = (tmp_path / "early" / "out.log").read_text()
    assert re.findall(r"Stopping after step (\d+): (\w+) came", log) == [("2", "SIGTERM"), ("7", "SIGINT")]
    assert log.count("Interrupted. Saved ") == 2
    assert [saved_step(tmp_path / name) for name in given] == [12, 12, 12]
    for name in ("early", "late"):
        assert same(tmp_path / "whole", tmp_path / name)


@pytest.mark.long
def test_too_many_bad_pairs_stop_all_ranks(options, together, tmp_path):
    given = options(tmp_path, "faults", max_bad_fraction=0.01)
    first, second = together(2, (given,))
    assert first == second
    skipped, seen = map(int, re.match(r"(\d+) of (\d+) pairs could not be used, more than", first[0]).groups())
    assert len((tmp_path / "faults" / "skipped.tsv").read_text().splitlines()) == skipped
    assert seen == 12 * saved_step(tmp_path / "faults")
    alone = options(tmp_path, "faults", max_bad_fraction=0.01, name="alone")
    trained(ALONE, alone)
    assert set(skipped_in(RunFolder(tmp_path / "alone"))) <= set(skipped_in(RunFolder(tmp_path / "faults")))
    # the sum over ranks is known one step later
    assert saved_step(tmp_path / "faults") - saved_step(tmp_path / "alone") in (0, 1)


@pytest.mark.long
@pytest.mark.parametrize("what", ["error", signal.SIGKILL])
def test_a_rank_that_is_lost_ends_the_others(what, options, together, tmp_path):
    given, whole = (options(tmp_path, name, **SHORT) for name in ("run", "whole"))
    folder = empty(tmp_path)
    processes = start_ranks(on_rank, 3, 3, [(given, False, (what, (1,), 5))], folder=folder)
    wait_for(processes, 60)
    assert [process.exitcode for process in processes] == [1, 1 if what == "error" else -signal.SIGKILL, 1]
    errors = [error_of(folder, rank) for rank in range(3)]
    if what == "error":
        assert "RuntimeError: rank 1: shard x is gone" in errors[1]
        assert [errors[rank].strip().splitlines()[-1] for rank in (0, 2)] == ["SystemExit: 1"] * 2
    else:  # one of those that are left says so
        said = [error for error in errors if ": another rank is lost: " in error]
        assert len(said) == 1
        assert f"rank 1, process {processes[1].pid} on " in said[0]
        assert sum("SystemExit: 1" in error for error in errors) == 1
    assert saved_step(tmp_path / "run") == 3
    together(3, (given, True), (whole,))
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_a_rank_that_hangs_is_not_waited_for(options, tmp_path):
    folder, given = empty(tmp_path), options(tmp_path, "run", dist_timeout=5, **SHORT)
    processes = start_ranks(on_rank, 2, 2, [(given, False, ("hang", (1,), 5))], folder=folder)
    try:
        processes[0].join(60)  # at the start, ranks wait for ten minutes
        assert (processes[0].exitcode, processes[1].exitcode) == (1, None)
        assert "rank 0: another rank is lost: " in error_of(folder, 0)
        assert saved_step(tmp_path / "run") == 3
    finally:
        for process in processes:
            process.kill()


def started(given, size, *extra, restarts=0):
    """Start the command with torchrun; "--" keeps torchrun from taking --logs for a flag of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    launcher = f"-m torch.distributed.run --nproc-per-node {size} --max-restarts {restarts} --monitor-interval 0.2"
    command = f"{launcher} -m clipfast -- train".split()
    return subprocess.Popen([sys.executable, *command, *flags, *extra], stderr=subprocess.PIPE, text=True)


def ranks_of(process):
    """Return the process of each rank that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(line[5:]): int(pid) for line in variables if line.startswith(b"RANK=")}
    return found


@pytest.mark.long
def test_the_command(options, tmp_path):
    given = options(tmp_path, "run", **(SHORT | {"workers": 0, "save_every": 1, "train_num_samples": 6000}))
    expected = tmp_path / "run" / "checkpoints" / "epoch_latest.pt"
    for what, message in (
        (signal.SIGTERM, "Interrupted. Saved"),
        (signal.SIGKILL, "error: rank 0: another rank is lost: "),
    ):
        process = started(given, 2) if what == signal.SIGTERM else started(given, 2, f"--resume={tmp_path}/run")
        before = saved_step(tmp_path / "run") if expected.exists() else 0
        wait_for_checkpoint(process, tmp_path / "run", before + 3)
        os.kill(ranks_of(process)[1], what)
        sent = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert (process.returncode == 0) == (what == signal.SIGTERM)
        assert time.monotonic() - sent < 40
        assert said.count(message) == 1, said
        assert said.count("Traceback") == (what == signal.SIGKILL), said  # torchrun's own
    assert saved_step(tmp_path / "run") > before
    # another run cannot be begun there, and of two ranks one says so
    process = started(given, 2)
    said = process.communicate(timeout=120)[1]
    assert said.count("holds a run already") == 1, said


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_save_and_end_if_torchrun_is_killed(size, options, tmp_path):
    given = options(tmp_path, "run", **SHORT | {"workers": 1, "save_every": 1, "train_num_samples": 60_000})
    process = started(given, size)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    ranks = ranks_of(process)
    assert len(ranks) == size
    process.kill()
    said = process.communicate(timeout=60)[1]  # until every process that could say something has ended
    assert f"torchrun, process {process.pid}, is gone: this process stops" in said  # by the rank that noticed first
    assert (tmp_path / "run" / "out.log").read_text().count("Interrupted. Saved ") == 1
    assert saved_step(tmp_path / "run") < 5000


@pytest.mark.long
def test_a_rank_whose_torchrun_is_gone_does_not_start(options, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused.getsockname()[1], "RANK": 0, "WORLD_SIZE": 2}
    for name, value in {**place, "LOCAL_RANK": 0, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("clipfast.training.world.ANSWER", 1)
    with pytest.raises(RuntimeError, match="timed out"), joined("cpu", 10):  # otherwise after ten minutes
        pass


@pytest.mark.long
def test_torchrun_starts_it_again_where_it_was(options, together, tmp_path):
    given, whole = (options(tmp_path, name, **SHORT | {"train_num_samples": 1200}) for name in ("run", "whole"))
    process = started(given, 2, restarts=1)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "Resuming from " in said
    together(2, (whole,))
    assert same(tmp_path / "run", tmp_path / "whole")


def signalled_in_evaluation(world, given, victim=None, resume=False):
    """Train, where a signal comes to one rank while it evaluates; return how it ended, and the blocks it encoded."""
    encode, blocks = Encoder.images, []

    def slow(encoder, pixels):
        blocks.append(len(pixels))
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.0 if victim is None or world.rank == victim else 0.3)
        return encode(encoder, pixels)

    with mock.patch.object(Encoder, "images", slow), mock.patch("clipfast.training.validation.BATCH_SIZE", 1):
        ended = train(TrainConfig(**given), folder_of(given).latest if resume else None, world=world)[1]
    return ended, len(blocks)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_ends_an_evaluation_on_all_ranks(size, options, tmp_path):
    given = options(tmp_path, "run", val_data=options(tmp_path, "mix")["val_data"], **SHORT)
    jobs = [(given, size - 1), (given, size - 1, True), (given, None, True)]
    found = run_ranks(on_rank, size, size, jobs, signalled_in_evaluation, folder=empty(tmp_path), timeout=240)
    whole = found[0][2][1]
    for after_epoch, at_the_end, undisturbed in found:
        assert undisturbed[0] is None
        for ended, blocks in (after_epoch, at_the_end):
            assert ended == signal.SIGTERM
            assert blocks < whole
    assert [blocks for _, blocks in found[size - 1][:2]] == [1, 1]
    assert (tmp_path / "run" / "out.log").read_text().count("Interrupted. Saved ") == 2
    assert (tmp_path / "run" / "results.json").exists()
