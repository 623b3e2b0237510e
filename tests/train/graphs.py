"""Stand-ins for a GPU and its graphs, for tests of :func:`clipfast.graphed` on a CPU."""

import contextlib

import torch
from torch import Tensor

from clipfast.train import graphs


class OnGpu(Tensor):
    """A tensor that lies on the CPU, and says that it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(x):
    """Return ``x`` as a tensor that says that it is on the GPU."""
    return x.as_subclass(OnGpu)


def on_cpu(x):
    """Return a tensor of :func:`on_gpu` as it is."""
    return x.as_subclass(Tensor)


class Repeated:
    """Stands for :class:`clipfast.train.graphs.Captures`: a replay calls the function that was to be captured again."""

    def __init__(self, device):
        self.device, self.captured, self.replayed = device, 0, 0

    def beside(self):
        return contextlib.nullcontext()

    def capture(self, call):
        self.captured += 1
        result = torch.zeros(())  # a graph writes each result to the same place

        def replay():
            self.replayed += 1
            result.copy_(call())

        return replay, result


def stand_in(monkeypatch):
    """Let :class:`Repeated` stand for captures; return the list of those that are made."""
    made = []

    def make(device):
        made.append(Repeated(device))
        return made[-1]

    monkeypatch.setattr(graphs, "Captures", make)
    return made
