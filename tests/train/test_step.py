"""The training step: compiled, with selective checkpointing, as a CUDA graph, and its learning rate."""

import contextlib
from unittest import mock

import pytest
import torch

from clipfast import create_model
from clipfast.kernels import contrastive_loss
from clipfast.train.loop import train
from clipfast.train.optim import adamw
from clipfast.train.schedule import set_lr
from clipfast.train.step import WARMUP_STEPS, GraphedStep, TrainingStep

from ..conftest import OnlyMeta
from .test_training import config, losses


def run(shards, folder, **options):
    """Train eight steps on texts of different lengths, and return the losses."""
    return losses(train(config(shards, folder, log_every_n_steps=1, **options))[0])


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """The losses of a run without any of the options below."""
    return run(shards, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"selective_checkpointing": True}, 1e-6),
        ({"torchcompile": True, "torchcompile_backend": "aot_eager", "selective_checkpointing": True}, 1e-5),
        pytest.param({"torchcompile": True, "torchcompile_backend": "aot_eager"}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"torchcompile": True}, 1e-4, marks=pytest.mark.slow),
    ],
    ids=["selective", "compiled selective", "compiled", "generated code"],
)
def test_the_losses_are_the_same(options, tolerance, plain, shards, tmp_path):
    torch.compiler.reset()
    assert len(plain) == 8
    assert run(shards, tmp_path, **options) == pytest.approx(plain, rel=tolerance)


def test_a_graph_needs_a_gpu(shards, tmp_path):
    with pytest.raises(ValueError, match="--cuda-graphs needs a GPU, and this run is on cpu"):
        train(config(shards, tmp_path, cuda_graphs=True, device="cpu"))


class Recorded(GraphedStep):
    """A stand-in for a CUDA graph on a CPU, which repeats the step on the captured tensors."""

    captured = replayed = beside = 0

    def _beside(self, images, texts):
        self.beside += 1
        return self.step(images, texts)

    def _capture(self, images, texts):
        self.captured += 1
        loss = torch.zeros(())

        def replay():
            self.replayed += 1
            loss.copy_(self.step(images, texts))

        return replay, loss


def batches(number, pairs=6):
    """Return random images and texts, with texts of another length in each batch."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        texts = torch.randint(1, 40000, (pairs, 5 + index), generator=generator)
        texts[:, -1] = 49407
        yield torch.randint(0, 256, (pairs, 3, 32, 32), dtype=torch.uint8, generator=generator), texts


def steps(kind):
    torch.manual_seed(1)
    model = create_model("ViT-T-8-32")
    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2)
    step = TrainingStep(model, optimizer, contrastive_loss, lambda: torch.autocast("cpu", enabled=False), 1.0, 64)
    return model, optimizer, Recorded(step, model.context_length) if kind == "graph" else step


def test_a_graph_is_captured_once_and_fed_each_batch():
    (plain, *_, step), (model, *_, graphed) = steps("plain"), steps("graph")
    losses = []
    for images, texts in batches(7):
        losses.append(graphed(images, texts))
        torch.testing.assert_close(losses[-1], step(images, texts), rtol=1e-6, atol=0)
    # the graph writes each loss to the same place
    assert len({loss.item() for loss in losses}) == 7
    assert (graphed.beside, graphed.captured, graphed.replayed) == (WARMUP_STEPS, 1, 7 - WARMUP_STEPS)
    # a batch from which unusable samples are missing
    short = next(batches(1, pairs=5))
    torch.testing.assert_close(graphed(*short), step(*short), rtol=1e-6, atol=0)
    assert (graphed.captured, graphed.replayed) == (1, 7 - WARMUP_STEPS)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)  # a step moves weights by 1e-3


def test_a_graph_is_captured_on_the_gpu_of_its_batch(monkeypatch):
    """The stream is that of the steps before it, and the thread of the data loader may pin memory meanwhile."""
    cuda, device = mock.MagicMock(), torch.device("cuda", 1)
    for name in ("Stream", "CUDAGraph", "current_stream", "device", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    images = torch.zeros(2, 3, 32, 32).as_subclass(type("OnGpu", (torch.Tensor,), {"device": device}))
    graphed = GraphedStep(lambda images, texts: images.sum(), 77)
    for _ in range(WARMUP_STEPS + 2):
        graphed(images, torch.zeros(2, 9, dtype=torch.long))
    cuda.Stream.assert_called_once_with(device)
    assert cuda.stream.call_args_list == [mock.call(cuda.Stream())] * WARMUP_STEPS
    cuda.device.assert_called_once_with(device)
    cuda.graph.assert_called_once_with(cuda.CUDAGraph(), stream=cuda.Stream(), capture_error_mode="thread_local")
    entered = [name for name, *_ in cuda.mock_calls if name.endswith("__enter__") or name == "graph"]
    assert entered[-3:] == ["device().__enter__", "graph", "graph().__enter__"]


def test_learning_rate_in_a_graph_is_set_in_place():
    _, optimizer, _ = steps("plain")
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    rates = [torch.tensor(1.0), torch.tensor(1.0)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_lr(optimizer, 0.5)
    assert [rate.item() for rate in rates] == [0.5, 0.5]


@pytest.mark.parametrize(("name", "micro_batch_size"), [("ViT-T-8-32", 4), ("RN50", 2)])
def test_a_step_copies_nothing_from_the_host(name, micro_batch_size, monkeypatch):
    # a copy would wait for the device, and cannot be captured in a CUDA graph
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not support "meta"
    model = create_model(name, device="meta").train()
    size = model.visual.image_size
    # The real function does not support "meta".
    optimizer = mock.Mock(torch.optim.AdamW, defaults={"fused": True}, param_groups=[{"params": [*model.parameters()]}])
    step = TrainingStep(model, optimizer, contrastive_loss, torch.autocast, 1.0, micro_batch_size)
    images = torch.empty(4, 3, size, size, dtype=torch.uint8, device="meta")
    texts = torch.empty(4, 77, dtype=torch.long, device="meta")
    # their copies from the host do not pass the dispatcher
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.delattr(torch, name)
    with OnlyMeta():
        loss = step(images, texts)
    assert loss.shape == ()
    optimizer.step.assert_called_once_with()
    assert optimizer.found_inf.data_ptr() == step.guard.skipped.data_ptr()
