"""Capture and replay training steps on the stub of the CUDA driver; ``test_graphs.py`` runs this in another process.

The argument is ``driver`` or ``gpu``. ``driver`` takes whole training steps, with CPU tensors in place of GPU tensors,
and CUDA graphs that only count launches. ``gpu`` uses PyTorch's own graphs, streams and allocator with the stub as its
GPU, which needs a CUDA build of PyTorch.
"""

import contextlib
import json
import sys
from unittest import mock

import torch
from torch.utils._pytree import tree_map

import clipfast

MADE = []


class Graph:
    """A stand-in for a CUDA graph, which counts the launches of its capture, and its replays."""

    def __init__(self):
        self.launches = self.replays = 0
        MADE.append(self)

    def replay(self):
        """Count the replays of a training step's CUDA graph."""
        self.replays += 1


def cuda_on(stub, launched):
    """Return a context in which CUDA graphs are :class:`Graph`, and count the launches that ``launched`` collects."""
    from clipfast.bench.stub.capture import CaptureRules

    @contextlib.contextmanager
    def capture(graph, **_options):
        """Capture a training step on the stub driver, and count the launches that its graph holds."""
        before = len(launched)
        with stub.capturing(0), CaptureRules():
            yield
        graph.launches = len(launched) - before

    zeros, patched = torch.zeros, contextlib.ExitStack()
    replaced = dict.fromkeys(
        ("Stream", "current_stream", "graph_pool_handle", "set_stream", "synchronize"), mock.Mock()
    )
    replaced |= {"CUDAGraph": Graph, "graph": capture, "stream": lambda _: contextlib.nullcontext()}
    for name, found in replaced.items():
        patched.enter_context(mock.patch.object(torch.cuda, name, found))
    patched.enter_context(mock.patch.object(torch._C, "_cuda_endAllocateToPool", mock.Mock(), create=True))
    patched.enter_context(mock.patch.object(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest)))
    return patched


def on_driver():
    """Take training steps with CUDA graphs on the stub driver; return the counts of launches, captures and replays."""
    from graphs import on_cpu, on_gpu

    from clipfast.bench.stub.arguments import checked_launches
    from clipfast.bench.stub.driver import load, on_device
    from clipfast.bench.stub.walk import in_blocks
    from clipfast.kernels import contrastive_loss
    from clipfast.train.optim import adamw
    from clipfast.train.step import TrainingStep

    stub, waits = load(90), False
    model = clipfast.create_model("ViT-T-8-32")
    autocast = torch.autocast("cpu", enabled=False)
    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2)
    step = TrainingStep(model, optimizer, contrastive_loss, lambda: autocast, 1.0, 64)

    def take(images, texts):
        """Take a training step on the stub driver; with ``waits``, it reads the loss on the host."""
        loss = step(on_cpu(images), tree_map(on_cpu, texts))
        return loss * loss.item() if waits else loss

    graphed, texts = clipfast.graphed(take), clipfast.tokenize(["a cat"] * 8)

    def launches(pairs, packs=False):
        """Take a training step, and return the number of launches by the host."""
        before = len(launched)
        given = clipfast.pack_texts(texts[:pairs], for_gpu=True) if packs else texts[:pairs]
        graphed(on_gpu(torch.zeros(pairs, 3, 32, 32, dtype=torch.uint8)), tree_map(on_gpu, given))
        return len(launched) - before

    with on_device(stub), checked_launches(stub, emptied=True) as launched, in_blocks(), cuda_on(stub, launched):
        eager = [launches(8) for _ in range(3)]
        _, *replayed = (launches(8) for _ in range(3))
        others = [launches(4) for _ in range(3)]
        launches(4), replayed.append(launches(4))
        # A capture on the stub has a dispatch mode, under which transformer blocks call their modules one by one. The
        # steps before the capture do so as well, so that their launches can be compared.
        with mock.patch("clipfast.models.transformer.whole_blocks", return_value={}):
            packed = [launches(8, packs=True) for _ in range(3)]
            launches(8, packs=True), replayed.append(launches(8, packs=True))
        waits = True
        for _ in range(3):
            launches(6)
        try:
            launches(6)
            error = ""
        except Exception as found:
            error = str(found)
        waits = False
        after = launches(5)
    return {
        "eager": eager[-1], "eager of another shape": others[0], "packed": packed[-1],
        "error of .item()": error, "after the error": after,
        "captured": [graph.launches for graph in MADE if graph.replays],
        "replays": [graph.replays for graph in MADE if graph.replays],
        "launched by the host in replays": sum(replayed),
    }  # fmt: skip


def on_stub_gpu():
    """Capture and replay a training step by PyTorch's own CUDA graphs on the stub; return what was observed."""
    weight = torch.ones(4, 4, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([weight], capturable=True, fused=True)
    waits, captured = False, []

    def take(x):
        """Take a training step with dropout, and note whether it is being captured."""
        captured.append(torch.cuda.is_current_stream_capturing())
        optimizer.zero_grad()
        loss = (torch.nn.functional.dropout(x) @ weight).sum()
        loss.backward()
        optimizer.step()
        return loss * loss.item() if waits else loss

    step = clipfast.graphed(take)
    for pairs in [8] * 6 + [4] * 5:
        step(torch.ones(pairs, 4, device="cuda"))
    found = {"captured": sum(captured)}
    waits = True
    for _ in range(3):
        step(torch.ones(2, 4, device="cuda"))
    try:
        step(torch.ones(2, 4, device="cuda"))
    except Exception as error:
        found["error of .item()"] = f"{error.__context__} {error}"
    waits = False
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(2, device="cuda")
    torch.cuda.synchronize()
    captured.clear()
    take(torch.ones(2, 4, device="cuda"))
    step(torch.ones(2, 4, device="cuda"))  # this call is captured in a CUDA graph
    step(torch.ones(8, 4, device="cuda"))  # this call replays the CUDA graph
    return found | {"after the error": [len(captured) - 1, sum(captured)]}


if __name__ == "__main__":
    print(json.dumps({"driver": on_driver, "gpu": on_stub_gpu}[sys.argv[1]]()))
