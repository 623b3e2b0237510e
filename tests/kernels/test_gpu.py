"""Promises that only a GPU can show: no host sync, CUDA graphs, and the same bits from many programs at once."""

import pytest
import torch

from ..conftest import ON_GPU
from ..numerics import value_and_grads
from .cases import small_calls

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
NAMES = list(small_calls(torch.float32, torch.device("cpu")))


def step(name, device):
    """A forward and backward call of one op on fixed inputs, and where its gradients go."""
    fn, inputs, grad = small_calls(torch.bfloat16, device)[name]
    leaves = {key: x.requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    grad = grad.to(device)

    def run():
        fn(**leaves).backward(grad.to(fn(**leaves).dtype))

    return run, [x for x in leaves.values() if x.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_finite(name, dtype, device):
    # small and plain, for compute-sanitizer to watch
    fn, inputs, grad = small_calls(dtype, device)[name]
    assert all(value.isfinite().all() for value in value_and_grads(fn, inputs, grad.to(device)).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(name, device):
    run, _ = step(name, device)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
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
    for leaf, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, value, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_from_many_programs(name, device):
    fn, inputs, grad = small_calls(torch.bfloat16, device, scale=20)[name]
    first = value_and_grads(fn, inputs, grad)
    for _ in range(50):
        again = value_and_grads(fn, inputs, grad)
        assert all(torch.equal(again[key], value) for key, value in first.items())
