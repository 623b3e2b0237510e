"""Shared memory, host memory, disk and GPU memory that a run would need: what is refused before it is built."""

import contextlib
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.host import Memory
from clipfast.training import lock, loop
from clipfast.training import preflight as module
from clipfast.training.loop import train
from clipfast.training.preflight import preflight
from clipfast.training.run import RunFolder
from clipfast.training.world import World

from .conftest import write_shard
from .test_preflight import PAIRS
from .test_training import config


class TestMemory:
    """Shared memory of data workers, and memory of the host."""

    BATCH = 8 * (3 * 32 * 32 + 8 * 16)  # eight images of 32 pixels in bytes, and texts of 16 ids

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    def test_shared_memory(self, tmp_path, refusal, monkeypatch):
        needed, original = 3 * 2 * self.BATCH, module.free_bytes  # three workers with two batches each

        def free(path):
            return room if path == tmp_path else original(path)

        monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(module, "free_bytes", free)
        room = needed - 1
        line = refusal(workers=3)
        assert f"{tmp_path} has 150 KiB free, and 3 data workers hold 2 batches each of 25.0 KiB there: use" in line
        assert "--shm-size=1g" in line
        assert refusal(workers=2) == ""
        assert refusal(workers=0) == ""
        room = needed
        assert refusal(workers=3) == ""

    def test_host_memory(self, refusal, monkeypatch):
        for workers, needed in ((0, self.BATCH), (2, 5 * self.BATCH)):
            for available in (needed - 1, needed):
                monkeypatch.setattr(module, "process_memory", lambda available=available: Memory(2**40, available))
                line = refusal(workers=workers)
                said = f"of memory are available, and {2 * workers + 1} batch(es) of 25.0 KiB are held at a time: use"
                assert (said in line) == (available < needed)
        monkeypatch.setattr(module, "process_memory", lambda: None)  # where nothing says it
        assert refusal() == ""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch_size": 8, "workers": 2}, "20 batch(es) of 25.0 KiB"),
            ({"global_batch_size": 64, "workers": 2}, "20 batch(es) of 25.0 KiB"),  # on eight ranks
            ({"batch_size": 8, "workers": 0}, "4 batch(es) of 25.0 KiB"),
        ],
    )
    def test_the_processes_of_a_machine_share_it(self, options, said, tmp_path, monkeypatch):
        world = World(rank=5, size=8, local_rank=1, local_size=4)
        needed = int(said.split()[0]) * self.BATCH
        given = config(f"{tmp_path}/x.tar", tmp_path / "logs", train_num_samples=64, **options)
        for available in (needed - 1, needed):
            monkeypatch.setattr(module, "process_memory", lambda available=available: Memory(2**40, available))
            is_refused = available < needed
            with pytest.raises(ValueError, match=re.escape(said)) if is_refused else contextlib.nullcontext():
                preflight(given, RunFolder(tmp_path / "logs/run"), {}, world)

    def test_shared_memory_of_the_processes_of_a_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(module, "free_bytes", lambda _: 2**40 if world.is_main else 2 * 3 * 2 * self.BATCH - 1)
        given = config(f"{tmp_path}/x.tar", tmp_path / "logs", workers=3, batch_size=8)
        world = World(rank=1, size=2, local_rank=1, local_size=2)
        with pytest.raises(ValueError, match="and 6 data workers hold 2 batches each of "):
            preflight(given, RunFolder(tmp_path / "logs/run"), {}, world)


class TestDisk:
    """Space for checkpoints, and permission to write them."""

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    @pytest.mark.parametrize(("ema_decay", "said"), [(None, "19.7 MiB"), (0.9, "26.3 MiB")])
    def test_the_estimate_is_that_of_the_files(self, tmp_path, monkeypatch, ema_decay, said):
        monkeypatch.setattr(loop, "_pictures", lambda *_: [])
        options = {"ema_decay": ema_decay, "workers": 1}
        folder, _ = train(config(f"{tmp_path}/x.tar", tmp_path / "logs", train_num_samples=8, epochs=1, **options))
        found = preflight(config(f"{tmp_path}/x.tar", tmp_path / "logs", **options), folder, {})
        size = folder.latest.stat().st_size
        assert size * 0.98 < found.checkpoint < size
        log = (folder.path / "out.log").read_text()
        assert f"8 pairs in 1 shard(s); a checkpoint takes {said} of " in log
        assert "the batches that are made ahead 50.0 KiB of memory; 4 pairs were tried" in log

    def test_space(self, tmp_path, refusal, monkeypatch):
        weights = sum(p.nbytes for p in module.bare_model(config("x", tmp_path), {}, torch.device("cpu")).parameters())
        checkpoint = 3 * weights
        for there, needed in ((0, 3 * checkpoint + weights), (1, 2 * checkpoint + weights), (2, checkpoint + weights)):
            if there:
                folder = RunFolder(tmp_path / "logs/run")
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
                (folder.checkpoints / f"step_{there}.pt").touch()
            for free in (needed - 1, needed):
                monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: mock.Mock(free=free))
                options = config(f"{tmp_path}/x.tar", tmp_path / "logs", workers=0)
                if free == needed:
                    preflight(options, RunFolder(tmp_path / "logs/run"), {})
                    continue
                with pytest.raises(
                    ValueError,
                    match=r"free, and the run needs .* for each of --keep-last 2 checkpoints of .*; make room",
                ):
                    preflight(options, RunFolder(tmp_path / "logs/run"), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=2**20))
        preflight(options, RunFolder(tmp_path / "logs/run"), {}, World(rank=1, size=2))  # it writes nothing
        shutil.rmtree(tmp_path / "logs")
        assert f"--logs {tmp_path}/logs has 1.00 MiB free, and the run needs " in refusal(workers=0)

    def test_a_folder_that_cannot_be_written(self, tmp_path, refusal, monkeypatch):
        (tmp_path / "file").touch()
        line = refusal(logs=tmp_path / "file/logs", name="run")
        assert f"the folder {tmp_path}/file/logs/run cannot be written: Not a directory: " in line
        assert line.endswith("give a folder to --logs that can be")
        original = os.mkdir

        def refusing(path, *arguments, **options):
            if Path(path).name == "run":
                raise OSError(30, "Read-only file system", str(path))
            original(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", refusing)
            assert "logs/run cannot be written: Read-only file system: " in refusal(name="run")
        with monkeypatch.context() as patch:  # a disk on which folders can be made, and no files
            patch.setattr(lock, "LOCK_NAME", "none/run.lock")
            assert "logs/run cannot be written: No such file or directory: " in refusal(name="run")
        assert refusal(name="run") == ""
        assert not (tmp_path / "logs").exists()


class TestGPU:
    """A GPU that is not there, or is full. Nothing here needs one: a run is refused before it is asked for more."""

    @pytest.fixture(autouse=True)
    def shard(self, tmp_path):
        write_shard(tmp_path / "x.tar", PAIRS)

    def test_it_is_not_there(self, refusal, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no GPU for 'cuda': PyTorch finds none that CUDA or ROCm can use; use cpu or" in refusal(device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert "no GPU for 'cuda:2': there are 2" in refusal(device="cuda:2")
        assert refusal(device="cpu") == ""

    def test_it_is_full(self, tmp_path, refusal, monkeypatch):
        weights = sum(p.nbytes for p in module.bare_model(config("x", tmp_path), {}, torch.device("cpu")).parameters())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * weights - 1, 2**36))
        line = refusal(device="cuda")
        assert "cuda has 26.3 MiB of its 64.0 GiB free, and weights, gradients and the optimizer's state of " in line
        assert "take 26.3 MiB: end what else runs there (see nvidia-smi), take another GPU" in line
        assert refusal(device="cuda", precision="pure_bf16") == ""  # takes half of it
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * weights, 2**36))
        assert refusal(device="cuda") == ""

    @pytest.mark.parametrize(("size", "fsdp", "is_refused"), [(2, True, False), (2, False, True), (1, True, True)])
    def test_each_process_has_a_part(self, size, fsdp, is_refused, tmp_path, monkeypatch):
        given = config("x", tmp_path, fsdp=fsdp)
        model = module.bare_model(given, {}, torch.device("meta"))
        weights = sum(parameter.nbytes for parameter in model.parameters())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * weights, 2**36))
        with pytest.raises(ValueError, match="free") if is_refused else contextlib.nullcontext():
            module._check_gpu(given, model, torch.device("cuda"), World(size=size))
