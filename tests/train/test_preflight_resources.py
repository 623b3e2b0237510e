"""Checks of shared memory, host memory, disk and GPU memory before a run is built."""

import re
import shutil
from unittest import mock

import pytest
import torch

from clipfast.distributed.world import ALONE, World
from clipfast.runs import lock
from clipfast.runs.folder import RunFolder
from clipfast.train import preflight as module
from clipfast.train.loop import train
from clipfast.train.preflight import preflight

from ..small_runs import write_shard
from .test_preflight import PAIRS
from .test_training import config

BATCH = 8 * (3 * 32 * 32 + 8 * 16)  # bytes of a batch: eight images of 32 pixels, and texts of 16 ids


@pytest.fixture(autouse=True)
def shard(tmp_path):
    """Write the training shard of the run whose resources are checked."""
    write_shard(tmp_path / "x.tar", PAIRS)


@pytest.fixture
def check(tmp_path):
    """Return a function that checks the resources of a training run, and returns the error, or "" without one."""

    def look(world=ALONE, **options):
        """Check the resources of a training run; return the error, or "" if nothing is missing."""
        given = config(f"{tmp_path}/x.tar", tmp_path / "logs", **{"workers": 0} | options)
        try:
            preflight(given, RunFolder(tmp_path / "logs/run"), {}, world)
        except ValueError as error:
            return str(error)
        return ""

    return look


@pytest.fixture
def weights(tmp_path):
    """Return the size of the trained model's weights in bytes."""
    model = module.bare_model(config("x", tmp_path), {}, torch.device("meta"))
    return sum(parameter.nbytes for parameter in model.parameters())


MACHINE = World(rank=5, size=8, local_rank=1, local_size=4)  # a process that shares its machine with three others


@pytest.mark.parametrize(
    ("world", "workers", "batches"), [(ALONE, 0, 1), (ALONE, 2, 5), (MACHINE, 0, 4), (MACHINE, 2, 20)]
)
def test_host_memory(world, workers, batches, check, monkeypatch):
    given = {"batch_size": 8, "train_num_samples": 64, "workers": workers}
    for missing in (1, 0):
        monkeypatch.setattr(module, "available_memory", lambda missing=missing: batches * BATCH - missing)
        assert (f" {batches} batch(es) of 25.0 KiB" in check(world, **given)) == bool(missing)
    monkeypatch.setattr(module, "available_memory", lambda: None)  # a machine that does not tell its free memory
    assert check(world, **given) == ""


def test_shared_memory(tmp_path, check, monkeypatch):
    original = module.free_bytes
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(module, "free_bytes", lambda path: room if path == tmp_path else original(path))
    room = 6 * BATCH - 1  # three data workers hold two batches each
    assert re.search("3 data workers hold 2 batches each of 25.0 KiB .*--shm-size=1g", check(workers=3))
    assert check(workers=2) == check(workers=0) == ""
    room = 6 * BATCH
    assert check(workers=3) == ""
    # a second process of the same machine has as many batches
    assert "6 data workers" in check(World(rank=1, size=2, local_rank=1, local_size=2), workers=3)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_estimate_of_a_checkpoint_is_that_of_the_file(ema_decay, tmp_path):
    options = config(f"{tmp_path}/x.tar", tmp_path / "logs", train_num_samples=8, epochs=1, ema_decay=ema_decay)
    folder, _ = train(options)
    found = preflight(options, folder, {})
    size = folder.latest.stat().st_size
    assert size * 0.98 < found.checkpoint < size
    assert str(found).split(" of ")[0] in (folder.path / "out.log").read_text()


def test_space_for_checkpoints(tmp_path, weights, check, monkeypatch):
    checkpoints = RunFolder(tmp_path / "logs/run").checkpoints
    checkpoints.mkdir(parents=True)
    for there in range(3):
        if there:
            (checkpoints / f"step_{there}.pt").touch()
        for missing in (1, 0):
            free = (3 - there) * 3 * weights + weights - missing
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: mock.Mock(free=free))
            assert ("--keep-last 2" in check()) == bool(missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=2**20))
    assert f"--logs {tmp_path}/logs has 1.00 MiB free" in check()
    assert check(World(rank=1, size=2)) == ""  # rank 1 writes no checkpoints, so it needs no disk


def test_a_folder_that_cannot_be_written(tmp_path, refusal, monkeypatch):
    (tmp_path / "file").touch()
    line = refusal(logs=tmp_path / "file/logs", name="run")
    assert re.search(f"{tmp_path}/file/logs/run cannot be written: Not a directory: .*--logs", line)
    # Lock files fail as on a disk on which folders can be made, but no files.
    monkeypatch.setattr(lock, "LOCK_NAME", "none/run.lock")
    assert "logs/run cannot be written: No such file or directory" in refusal(name="run")
    assert not (tmp_path / "logs").exists()


class TestGPU:
    """A GPU that is missing or full. The tests need no GPU, because the run is refused before it uses one."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        """Return a function that fakes a number of GPUs for the check before training, with the free bytes of each."""

        def set_gpus(count, free=0):
            """Let the check before training see ``count`` GPUs with ``free`` bytes each."""
            for name, value in (("is_available", count > 0), ("device_count", count), ("mem_get_info", (free, 2**36))):
                monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=value))

        return set_gpus

    def test_it_is_not_there_or_full(self, weights, refusal, gpu):
        gpu(0)
        assert "no GPU for 'cuda': PyTorch finds none" in refusal(device="cuda")
        gpu(2)
        assert "no GPU for 'cuda:2': there are 2" in refusal(device="cuda:2")
        gpu(1, 4 * weights - 1)
        assert re.search("cuda has .* of its 64.0 GiB free, .*nvidia-smi", refusal(device="cuda"))
        # Weights in bfloat16 take half the memory of float32.
        assert refusal(device="cuda", precision="pure_bf16") == ""
        gpu(1, 4 * weights)
        assert refusal(device="cuda") == ""

    @pytest.mark.parametrize(("size", "fsdp", "is_refused"), [(2, True, False), (2, False, True), (1, True, True)])
    def test_each_process_has_a_part(self, size, fsdp, is_refused, weights, check, gpu, monkeypatch):
        gpu(1, 2 * weights)
        monkeypatch.setattr(module, "build_device", lambda *_: torch.device("cuda"))
        assert ("GiB free" in check(World(size=size), fsdp=fsdp)) == is_refused
