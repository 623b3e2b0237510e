"""The processes that read and decode for clipfast embed: how many, and what is said when one of them is lost."""

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

from clipfast import create_model, host
from clipfast.checkpoint import export_open_clip
from clipfast.evaluation.encoder import Encoder
from clipfast.files import DiskFullError
from clipfast.search import embed_command
from clipfast.search.embed import SMALL_BATCH, Work
from clipfast.search.samples import Samples

from ..clip.conftest import picture, run_command, sample, write_shard
from .embedding import options

pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and a shard of pairs."""
    folder = tmp_path_factory.mktemp("embed")
    export_open_clip(create_model("ViT-T-8-32"), folder / "model")
    write_shard(folder / "a.tar", [sample(index, png=picture(index)) for index in range(40)])
    return folder


def work(home, tmp_path, **changes) -> Work:
    return Work(Encoder.load(f"local-dir:{home}/model", device="cpu"), Samples(f"{home}/a.tar"), tmp_path, **changes)


def kill_workers(*_) -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    if threading.current_thread() is threading.main_thread():
        time.sleep(30)  # PyTorch's report interrupts it


@pytest.mark.parametrize("method", ["_encode", "_write"])
def test_a_worker_that_is_lost_is_named(home, tmp_path, monkeypatch, capsys, method):
    """PyTorch reports the loss at any moment, which may be one without any call of PyTorch's."""
    monkeypatch.setattr(Work, method, kill_workers)
    changes = {"data": f"{home}/a.tar", "batch-size": "1", "part-size": "10", "workers": "1"}
    code, _, err = run_command(capsys, *options(home, tmp_path / "e", **changes))
    assert code == 2
    assert re.search("a data worker died: it.*use fewer --workers", err)
    assert "Traceback" not in err
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("method", ["_encode", "_write"])
def test_an_error_at_the_end_is_not_taken_for_the_loss_of_a_worker(home, tmp_path, monkeypatch, method, workers):
    """The workers have ended by then, since nothing is left for them to do."""

    def failing(*_) -> None:
        deadline = time.monotonic() + 20
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("out of memory")

    made = work(home, tmp_path)
    made.begin()
    monkeypatch.setattr(Work, method, failing)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        made.make(made.missing(), workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ValueError("changed"), DiskFullError("no space")])
def test_errors_of_workers_arrive_as_they_are(home, tmp_path, monkeypatch, error, workers):
    def failing(*_) -> None:
        raise error

    monkeypatch.setattr(Samples, "read", failing)
    with pytest.raises(type(error), match=f"^{error}$"):
        work(home, tmp_path).make([0], workers)


def test_images_that_wait_are_not_in_shared_memory(home, tmp_path):
    encode = mock.Mock(side_effect=lambda pixels: torch.full((len(pixels), 2), float(pixels.is_shared())))
    with mock.patch.object(Encoder, "images", encode):
        work(home, tmp_path, batch_size=4).make([0], 1)
    assert encode.call_count == 10
    assert not np.load(tmp_path / "img_emb/img_emb_0000.npy").any()


@pytest.mark.parametrize(
    ("cores", "device", "room", "expected"),
    [
        (1, "cpu", 99, 0),
        (9, "cpu", 99, 4),
        (64, "cpu", 99, 8),
        (4, "cuda", 99, 4),
        (64, "cpu", 7, 1),
        (64, "cpu", 8, 2),
    ],
)
def test_by_default_workers_are_as_many_as_there_is_room_for(
    home, tmp_path, monkeypatch, cores, device, room, expected
):
    """``room`` is of batches; each worker holds two, and half of the room is left to others."""
    made = work(home, tmp_path)
    assert made.batch_bytes == SMALL_BATCH * 3 * 32 * 32
    monkeypatch.setattr(host, "cores", lambda: cores)
    monkeypatch.setattr(host, "free_bytes", lambda _: room * made.batch_bytes)
    world = mock.Mock(local_size=1, device=lambda _: torch.device(device))
    assert embed_command._workers(mock.Mock(workers=None), made, world) == expected
