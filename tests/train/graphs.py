"""Stand-ins for a GPU and its graphs, for tests of :func:`clipfast.graphed` on a CPU."""

import contextlib

import torch
from torch import Tensor

from clipfast.train import graphs


class OnGpu(Tensor):
    """A tensor in the memory of the CPU whose ``device`` is a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(x):
    """Return a training step's tensor as an :class:`OnGpu`, whose ``device`` is a GPU."""
    return x.as_subclass(OnGpu)


def on_cpu(x):
    """Return a training step's :class:`OnGpu` as a plain CPU tensor."""
    return x.as_subclass(Tensor)


class Repeated:
    """A stand-in for :class:`clipfast.train.graphs.Captures`, whose replays call the captured function again."""

    def __init__(self, device):
        self.device, self.captured, self.replayed = device, 0, 0

    def beside(self):
        """Return a context that does nothing in place of the stream on which a training step is captured."""
        return contextlib.nullcontext()

    def capture(self, call):
        """Call the training step once; return a function that calls it again, as a CUDA graph would, and the result."""
        self.captured += 1
        result = torch.zeros(())  # every replay of a graph writes its result to this tensor

        def replay():
            """Call the training step again, and write its result to the first result's memory, as a CUDA graph does."""
            self.replayed += 1
            result.copy_(call())

        return replay, result


def stand_in(monkeypatch):
    """Let :class:`Repeated` stand for the CUDA graphs of training steps; return the list of the stand-ins made."""
    made = []

    def make(device):
        """Make a stand-in for the captures of a training step, and append it to the list of all stand-ins."""
        made.append(Repeated(device))
        return made[-1]

    monkeypatch.setattr(graphs, "Captures", make)
    return made
