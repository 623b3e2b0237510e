"""The data workers of clipfast embed: their number, and the error if one of them is lost."""

import multiprocessing
import os
import re
import signal
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch

from clipfast import host
from clipfast.cli import embed as embed_command
from clipfast.evaluate.encoder import Encoder
from clipfast.search.embed import SMALL_BATCH, Work
from clipfast.search.source_samples import Samples

from ..small_runs import refusal_of
from .embedding import options


@pytest.fixture
def work(faulty, tmp_path) -> Work:
    """Return the Work of embedding the samples of a shard."""
    encoder = Encoder.load(f"local-dir:{faulty}/model", device="cpu")
    return Work(encoder, Samples(f"{faulty}/b.tar"), tmp_path, batch_size=4)


@pytest.mark.parametrize("method", ["_encode", "_write"])
def test_a_worker_that_is_lost_is_named(faulty, tmp_path, monkeypatch, capsys, method):
    """A lost data worker is named, though PyTorch may report the loss at a moment without any call of PyTorch."""

    def kill_workers(*_) -> None:
        """Kill the data workers that read samples to embed."""
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        if threading.current_thread() is threading.main_thread():
            time.sleep(30)  # PyTorch's report of the dead worker interrupts the sleep

    monkeypatch.setattr(Work, method, kill_workers)
    changes = {"data": f"{faulty}/b.tar", "batch-size": "1", "part-size": "5", "workers": "1"}
    err = refusal_of(capsys, *options(faulty, tmp_path / "e", **changes))
    assert re.search("a data worker died: it.*use fewer --workers", err)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["_encode", "_write"])
def test_an_error_at_the_end_is_not_taken_for_the_loss_of_a_worker(work, monkeypatch, method):
    """Data workers end when all samples are read, so an error after that is not the loss of a worker."""

    def failing(*_) -> None:
        """Fail after the data workers of the embedding have ended."""
        deadline = time.monotonic() + 20
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("out of memory")

    work.batch_size = None
    monkeypatch.setattr(Work, method, failing)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        work.make([0], 1)


def test_images_that_wait_are_not_in_shared_memory(work, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "images", lambda _, x: torch.full((len(x), 2), float(x.is_shared())))
    work.make([0], 1)
    found = np.load(tmp_path / "img_emb/img_emb_0000.npy")
    assert len(found) == 17
    assert not found.any()


def test_by_default_workers_are_as_many_as_there_is_room_for(work, monkeypatch):
    """``room`` is the free memory in batches. Each data worker holds two batches, and half of the memory stays free."""
    work.batch_size = None
    assert work.batch_bytes == SMALL_BATCH * 3 * 32 * 32
    for cores, device, room, expected in (
        (1, "cpu", 99, 0),
        (9, "cpu", 99, 4),
        (4, "cuda", 99, 4),
        (64, "cpu", 7, 1),
    ):
        monkeypatch.setattr(host, "cores", lambda count=cores: count)
        monkeypatch.setattr(host, "free_bytes", lambda _, room=room: room * work.batch_bytes)
        world = mock.Mock(local_size=1, device=lambda _, device=device: torch.device(device))
        assert embed_command._workers(mock.Mock(workers=None), work, world) == expected
