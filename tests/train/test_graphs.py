"""Training steps as CUDA graphs: arguments and results of replays, launches on the stub driver, failed captures."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import clipfast
from clipfast.bench.stub import build
from clipfast.bench.stub import gpu as stub_gpu
from clipfast.train.graphs import Captures

from .graphs import on_cpu, on_gpu, stand_in

PROGRAM = Path(__file__).with_name("graphs_on_stub.py")
needs_gcc = pytest.mark.skipif(build.missing_tool() is not None, reason=f"{build.missing_tool()}")


def total(batch, *, doubled=False):
    """Return the sum of a training batch, which is a dictionary of images and texts."""
    found = on_cpu(batch["images"]).sum() + on_cpu(batch["texts"]).sum()
    return 2 * found if doubled else found


def batch(pairs, value):
    """Return a training batch of ``pairs`` pairs that is filled with ``value``."""
    return {"images": on_gpu(torch.full((pairs, 3), value)), "texts": on_gpu(torch.full((pairs, 2), value))}


def test_each_set_of_shapes_has_calls_to_warm_up_and_a_graph_of_its_own(monkeypatch, caplog):
    made = stand_in(monkeypatch)
    step = clipfast.graphed(total, warmup=2, max_graphs=3)
    results = []
    for pairs, count in (4, 5), (2, 4), (4, 3):
        for value in range(count):
            results.append((step(batch(pairs, float(value))), 5.0 * pairs * value))
    assert (made[0].captured, made[0].replayed) == (2, 3 + 2 + 3)
    # A call with another value of a flag gets a graph of its own, as a call with another shape does.
    results += [(step(batch(4, value), doubled=True), 40 * value) for value in (1.0, 2.0, 3.0, 4.0)]
    assert (made[0].captured, made[0].replayed) == (3, 8 + 2)
    assert not caplog.records
    results += [(step(batch(3, value)), 15 * value) for value in (1.0, 2.0, 3.0, 4.0)]
    assert (made[0].captured, made[0].replayed, len(made)) == (3, 10, 1)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "arguments of another shape run without a CUDA graph"
    ]
    # Later replays do not change the results of earlier ones.
    assert [float(found) for found, _ in results] == [expected for _, expected in results]


def test_on_a_cpu_the_step_just_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock(side_effect=AssertionError))
    weight = torch.ones(3, requires_grad=True)
    step = clipfast.graphed(lambda x: (weight * x).sum())
    found = [step(torch.full((3,), float(value))) for value in range(5)]
    assert [float(x) for x in found] == [0, 3, 6, 9, 12]
    assert not found[0].requires_grad  # a result of a graph on a GPU has no autograd graph either


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1), 0.5), TypeError, "takes tensors, and this is of type float: 0.5"),
        ((), TypeError, "at least one tensor"),
        ((torch.zeros(1), on_gpu(torch.zeros(1))), ValueError, "on one device, and these are on cpu, cuda:0"),
        ((torch.zeros(1, requires_grad=True),), ValueError, "gives its arguments no gradients"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        clipfast.graphed(mock.Mock(side_effect=AssertionError))(*arguments)


def test_a_graph_under_the_autocast_of_its_caller_is_refused(monkeypatch):
    stand_in(monkeypatch)
    step = clipfast.graphed(lambda x: on_cpu(x).sum(), warmup=0)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    with pytest.raises(ValueError, match="enter it within the step"):
        step(on_gpu(torch.ones(2)))
    monkeypatch.setattr(torch, "is_autocast_cache_enabled", lambda: False)
    assert step(on_gpu(torch.ones(2))) == 2


def test_a_graph_is_captured_on_the_gpu_of_its_arguments(monkeypatch):
    """The capture mode is "thread_local", since the data loader's thread may pin memory during a capture."""
    cuda = mock.MagicMock()
    for name in ("Stream", "CUDAGraph", "current_stream", "device", "graph", "graph_pool_handle", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    captures = Captures(torch.device("cuda", 1))
    with captures.beside():
        pass
    captures.capture(lambda: None)
    cuda.stream.assert_called_once_with(cuda.Stream.return_value)  # the calls before a capture run on its stream
    assert cuda.Stream.call_args == cuda.device.call_args == mock.call(torch.device("cuda", 1))
    assert cuda.graph.call_args.kwargs["stream"] is cuda.Stream()
    assert cuda.graph.call_args.kwargs["capture_error_mode"] == "thread_local"


def run(kind, environment=None):
    """Run ``graphs_on_stub.py``, which captures training steps, and return what it found."""
    command = [sys.executable, str(PROGRAM), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_gcc
def test_launches_on_the_stub_driver():
    found = run("driver")
    assert found["eager"] > 20
    assert found["captured"] == [found["eager"], found["eager of another shape"], found["packed"]]
    assert found["launched by the host in replays"] == 0
    assert found["replays"] == [3, 2, 2]
    assert "waits for the GPU" in found["error of .item()"]
    assert found["after the error"] == found["eager"]


@needs_gcc
@pytest.mark.skipif(torch.version.cuda is None, reason="the stub stands in for the GPU of a CUDA build of PyTorch")
def test_pytorchs_own_graphs_on_the_stub_gpu():
    found = run("gpu", stub_gpu.gpu_environment())
    assert "captured" in found["error of .item()"]
    assert found["captured"] == 2
    assert found["after the error"] == [1, 1]
