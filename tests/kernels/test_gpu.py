"""Promises that only a GPU can show: no host sync, CUDA graphs, and the same bits from many programs at once."""

import pytest
import torch

from clipfast.kernels import reference, retrieval_ranks

from ..conftest import ON_GPU
from ..numerics import value_and_grads
from .cases import rank_inputs, small_calls

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


def test_ranks_without_a_host_sync_in_a_graph(device):
    # The graph is replayed on other features than it was captured with.
    inputs, other = (rank_inputs((700, 2500, 40), torch.bfloat16, device) for _ in range(2))
    retrieval_ranks(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        retrieval_ranks(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks = retrieval_ranks(**inputs)
    for name, x in inputs.items():
        x.copy_(other[name])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(ranks, reference.retrieval_ranks(**other), strict=True))


def test_index_that_is_no_image_is_a_text_of_none(device):
    inputs = rank_inputs((40, 90, 16), torch.float32, device)
    expected = retrieval_ranks(**inputs)
    wrong = torch.tensor([40, -2, 2**32], device=device).repeat(30)
    inputs["text_image"] = wrong.where(inputs["text_image"] < 0, inputs["text_image"])
    assert all(torch.equal(a, b) for a, b in zip(retrieval_ranks(**inputs), expected, strict=True))
