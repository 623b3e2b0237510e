"""The training step: compiled, with selective checkpointing, as a CUDA graph, and its learning rate."""

import contextlib
import functools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import clipfast
from clipfast import create_model, get_model_config, pack_texts
from clipfast.data import Batch
from clipfast.kernels import contrastive_loss
from clipfast.models import build
from clipfast.models.packed_images import pack_images
from clipfast.models.packed_text import PackedText, pack_on_host
from clipfast.models.registry import read_model_config
from clipfast.train.loop import train
from clipfast.train.optim import adamw, parse_arguments
from clipfast.train.step import TrainingStep, Upload, graphed_step
from clipfast.train.trainer import Trainer

from ..conftest import OnlyMeta
from ..small_runs import NAFLEX
from .graphs import on_cpu, on_gpu, stand_in
from .test_training import config, losses


def run(shards, folder, **options):
    """Train eight steps on texts of different lengths, packed unless the options say otherwise; return the losses."""
    packs, upload = options.get("pack_text", True), Upload.__call__

    def watched(self, *batch):
        """Copy the batch to the device, and check whether its texts are packed."""
        images, texts = upload(self, *batch)
        assert all(isinstance(part, PackedText) is packs for part in (texts if isinstance(texts, list) else [texts]))
        return images, texts

    with mock.patch.object(Upload, "__call__", watched):
        return losses(train(config(shards, folder, log_every_n_steps=1, **options))[0])


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Return the losses of a training run on padded texts, with no other option, to compare other runs with."""
    return run(shards, tmp_path_factory.mktemp("plain"), pack_text=False)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("", 1e-6),
        ("torchcompile=True torchcompile_backend=aot_eager selective_checkpointing=True", 1e-5),
        pytest.param("torchcompile=True torchcompile_backend=aot_eager", 1e-5, marks=pytest.mark.slow),
        pytest.param("torchcompile=True", 1e-4, marks=pytest.mark.slow),
    ],
    ids=["packed", "compiled selective", "compiled", "generated code"],
)
def test_the_losses_are_the_same(options, tolerance, plain, shards, tmp_path):
    torch.compiler.reset()
    assert len(plain) == 8
    assert run(shards, tmp_path, **parse_arguments(options.split())) == pytest.approx(plain, rel=tolerance)


def test_a_step_with_packed_texts_takes_few_calls_of_python(shards, tmp_path):
    """Count the calls of clipfast's Python functions in each training step, without the loading of its batch."""
    calls, package, take = [], str(Path(clipfast.__file__).parent), Trainer._train_step
    kernels = str(Path(clipfast.kernels.__file__).parent)

    def counted(frame, event, _):
        """Count a call of a Python function of clipfast."""
        calls[-1] += event == "call" and frame.f_code.co_filename.startswith((package, kernels))

    def watched(self, batch):
        """Take a training step, and count the calls of clipfast's Python functions in it."""
        calls.append(0)
        sys.setprofile(counted)
        try:
            return take(self, batch)
        finally:
            sys.setprofile(None)

    with mock.patch.object(Trainer, "_train_step", watched):
        train(config(shards, tmp_path))
    assert sorted(calls)[len(calls) // 2] <= 450


def test_a_graph_needs_a_gpu(shards, tmp_path):
    with pytest.raises(ValueError, match="--cuda-graphs needs a GPU, and this run is on cpu"):
        train(config(shards, tmp_path, cuda_graphs=True, device="cpu"))


def batches(number, pairs=6):
    """Return random training images and texts, with texts of another length in each batch."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        texts = torch.randint(1, 40000, (pairs, 5 + index), generator=generator)
        texts[:, -1] = 49407
        yield torch.randint(0, 256, (pairs, 3, 32, 32), dtype=torch.uint8, generator=generator), texts


def steps(kind):
    """Return a model, its optimizer, and its training step, which is a CUDA graph for the kind "graph"."""
    torch.manual_seed(1)
    model = create_model("ViT-T-8-32")
    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2)
    step = TrainingStep(model, optimizer, contrastive_loss, lambda: torch.autocast("cpu", enabled=False), 1.0, 64)
    if kind == "graph":
        return model, optimizer, graphed_step(lambda *batch: step(*tree_map(on_cpu, batch)), model.context_length)
    return model, optimizer, step


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_a_graph_is_fed_each_batch(packs, monkeypatch):
    made = stand_in(monkeypatch)
    (plain, *_, step), (model, *_, taken) = steps("plain"), steps("graph")
    plain.pack_text = False

    def take(images, texts):
        """Take the step by the graph of its shape and without a graph, and compare the losses."""
        given = pack_texts(F.pad(texts, (0, 77 - texts.shape[1])), for_gpu=True) if packs else texts
        found = taken(*tree_map(on_gpu, (images, given)))
        torch.testing.assert_close(found, step(images, texts), rtol=1e-5, atol=0)

    for batch in batches(7):
        take(*batch)
    # The texts of the last batch have 66 tokens together, and those of the others at most 64.
    assert (made[0].captured, made[0].replayed) == (1, 3 if packs else 4)
    # A smaller batch, without unusable samples, gets a graph of its own if its shape comes often.
    for calls in (3, 2):
        replayed = made[0].replayed
        for _ in range(calls):
            take(*next(batches(1, pairs=5)))
    assert (made[0].captured, made[0].replayed) == (2, replayed + 2)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # a training step moves weights by 1e-3


HEIGHTS = (8, 12, 20, 8)  # heights of images for NaFlex, in pixels


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "micro_batch_size", "heights"),
    [
        ("ViT-T-8-32", 4, None),
        ("RN50", 2, None),
        (NAFLEX, 2, None),
        (NAFLEX, 4, (8, 12, 20, 8)),
        (NAFLEX, 2, (8, 12, 20, 8)),
    ],
    ids=["ViT", "ResNet", "one size", "several sizes", "micro-batches of several sizes"],
)
def test_a_step_copies_nothing_from_the_host(name, micro_batch_size, heights, packs, monkeypatch):
    # a copy would wait for the device, and cannot be captured in a CUDA graph
    # torch.autocast does not support the device "meta".
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    meta = torch.device("meta")
    with meta:
        model = build(read_model_config(name) if name == NAFLEX else get_model_config(name)).train()
    # A stand-in, since the step of PyTorch's fused AdamW does not support "meta".
    optimizer = mock.Mock(torch.optim.AdamW, defaults={"fused": True}, param_groups=[{"params": [*model.parameters()]}])
    step = TrainingStep(model, optimizer, contrastive_loss, torch.autocast, 1.0, micro_batch_size)
    side = model.visual.image_size
    images = [torch.zeros(3, height, side, dtype=torch.uint8) for height in heights or [side] * 4]
    images = pack_images(images, 4, for_gpu=True) if heights else torch.stack(images)
    texts = torch.full((4, model.context_length), 7)
    pack = functools.partial(pack_on_host, device=meta, always=True) if packs else None
    batch = Upload(meta, pack)(Batch(images, texts, []), micro_batch_size)
    # torch.tensor, as_tensor and from_numpy copy from the host without the dispatcher, in which the test sees copies.
    for function in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.delattr(torch, function)
    with OnlyMeta():
        loss = step(*batch)
    assert loss.shape == ()
    optimizer.step.assert_called_once_with()
    assert optimizer.found_inf.data_ptr() == step.guard.skipped.data_ptr()
