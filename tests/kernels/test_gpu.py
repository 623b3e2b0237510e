"""Promises that only a GPU can show: no host sync, CUDA graphs, and the same bits from many programs at once."""

import functools

import pytest
import torch

from clipfast import create_model
from clipfast.bench.graphs import Graphs
from clipfast.kernels import contrastive_loss, reference, retrieval_ranks
from clipfast.kernels.retrieval.spec import RankShape
from clipfast.training.optim import adamw
from clipfast.training.schedule import set_lr
from clipfast.training.step import GraphedStep, TrainingStep

from ..conftest import ON_GPU
from .conftest import call_at, call_of, each_call, each_gradient, leaves_of

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def step(name, device):
    """A forward and backward call of one op on fixed inputs, and where its gradients go."""
    call = call_of(name, device, torch.bfloat16)
    leaves = leaves_of(call.inputs)

    def run():
        call.backward(call.op(**leaves))

    return run, [x for x in leaves.values() if x.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_call
def test_finite(name, dtype, device):
    # small and plain, for compute-sanitizer to watch
    assert all(value.isfinite().all() for value in call_of(name, device, dtype).results().values())


@each_call
def test_no_host_sync(name, device):
    run, _ = step(name, device)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_gradient
def test_graph_capture(name, device):
    run, leaves = step(name, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [leaf.grad / 3 for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for leaf in leaves:
        leaf.grad.zero_()
    graph.replay()
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected, rtol=2e-2, atol=1e-6)


@each_gradient
def test_same_bits_from_many_programs(name, device):
    call = call_of(name, device, torch.bfloat16, scale=20)
    first = call.results()
    for _ in range(50):
        again = call.results()
        assert all(torch.equal(again[key], value) for key, value in first.items())


def test_ranks_in_a_graph(device):
    # The graph is replayed on other features than it was captured with.
    inputs = call_at("retrieval_ranks", RankShape(700, 2500, 40), device, torch.bfloat16).inputs
    other = {name: x.flip(0) for name, x in inputs.items()}
    retrieval_ranks(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks = retrieval_ranks(**inputs)
    for name, x in inputs.items():
        x.copy_(other[name])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(ranks, reference.retrieval_ranks(**other), strict=True))


def test_index_that_is_no_image_is_a_text_of_none(device):
    op, _, inputs, _ = call_at("retrieval_ranks", RankShape(40, 90, 16), device)
    expected = op(**inputs)
    wrong = torch.tensor([40, -2, 2**32], device=device).repeat(30)
    inputs["text_image"] = wrong.where(inputs["text_image"] < 0, inputs["text_image"])
    assert all(torch.equal(a, b) for a, b in zip(op(**inputs), expected, strict=True))


def test_reference_of_bytes_in_a_graph(device):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, device=device)

    def run():
        return reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_captures_of_benchmarks_share_a_pool_and_survive_a_failure(device):
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = Graphs(device)
    x, total = torch.randn(1000, 1000, device=device), torch.zeros(1000, 1000, device=device)

    def good():
        total.add_(x @ x)

    def syncs():
        return (x @ x).sum().item()

    def syncs_unseen():
        # not through PyTorch, which would say so before the capture
        torch.cuda.current_stream().synchronize()

    for bad in (syncs, syncs_unseen):
        replays = graphs.capture([good, good])
        with pytest.raises(RuntimeError):
            graphs.capture([bad])
        total.zero_()
        for replay in [*replays, *graphs.capture([good])]:
            replay()
        torch.testing.assert_close(total, 3 * (x @ x), rtol=1e-4, atol=1e-2)
        torch.rand(5, device=device)  # the generator is out of the capture too


def test_a_training_step_as_one_graph(device):
    losses = {}
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model("ViT-T-8-32", device=device)
        optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2, capturable=graphed)
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        step = TrainingStep(model, optimizer, contrastive_loss, autocast, 1.0, 64)
        take = GraphedStep(step, model.context_length) if graphed else step
        generator = torch.Generator(device).manual_seed(0)
        losses[graphed] = []
        for index in range(8):
            images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator, device=device)
            texts = torch.randint(1, 49408, (64, 9 + index), generator=generator, device=device)
            set_lr(optimizer, 1e-3 / (1 + index))
            losses[graphed].append(take(images, texts))
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=1e-3, atol=0)
