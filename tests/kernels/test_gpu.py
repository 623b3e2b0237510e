"""Test what only a GPU can show: no host sync, CUDA graphs, and the same bits from many programs at once."""

import functools

import pytest
import torch

from clipfast import create_model
from clipfast.kernels import contrastive_loss
from clipfast.train.optim import adamw
from clipfast.train.schedule import set_lr
from clipfast.train.step import TrainingStep, graphed_step

from .conftest import call_of, each_call, each_gradient, leaves_of


def step(name, gpu):
    """Return a function that runs one op forward and backward on fixed inputs, and the inputs, which get gradients."""
    call = call_of(name, gpu, torch.bfloat16)
    leaves = leaves_of(call.inputs)

    def run():
        """Run the op of a kernel forward and backward on the GPU."""
        call.backward(call.op(**leaves))

    return run, [x for x in leaves.values() if x.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_call
def test_finite(name, dtype, gpu):
    # This test is small and simple, so that compute-sanitizer can run it.
    assert all(value.isfinite().all() for value in call_of(name, gpu, dtype).results().values())


@each_call
def test_no_host_sync(name, gpu):
    run, _ = step(name, gpu)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_gradient
def test_graph_capture(name, gpu):
    run, leaves = step(name, gpu)
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
def test_same_bits_from_many_programs(name, gpu):
    call = call_of(name, gpu, torch.bfloat16, scale=20)
    first = call.results()
    for _ in range(50):
        again = call.results()
        assert all(torch.equal(again[key], value) for key, value in first.items())


def test_a_training_step_as_one_graph(gpu):
    losses = {}
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model("ViT-T-8-32", device=gpu)
        optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2, capturable=graphed)
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        step = TrainingStep(model, optimizer, contrastive_loss, autocast, 1.0, 64)
        take = graphed_step(step, model.context_length) if graphed else step
        generator = torch.Generator(gpu).manual_seed(0)
        losses[graphed] = []
        for index in range(8):
            images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator, device=gpu)
            texts = torch.randint(1, 49408, (64, 9 + index), generator=generator, device=gpu)
            set_lr(optimizer, 1e-3 / (1 + index))
            losses[graphed].append(take(images, texts))
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=1e-3, atol=0)
