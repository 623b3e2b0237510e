"""Capture of calls as CUDA graphs, so that the time of a short kernel does not include the host's time to launch it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from clipfast.train.graphs import Captures

Call = Callable[[], object]


def replays(captures: Captures, calls: Sequence[Call]) -> list[Call]:
    """Return functions that replay ``calls``, which have run before. Their results are dropped.

    A call that waits for the GPU is refused before it is captured.

    Raises:
        RuntimeError: one of them cannot be captured; PyTorch says why.
    """
    with captures.beside(), _no_host_sync():
        calls[0]()  # libraries allocate their workspaces for this stream now, outside of the graph
    return [captures.capture(call)[0] for call in calls]


@contextlib.contextmanager
def _no_host_sync() -> Iterator[None]:
    """Let PyTorch raise an error at calls of a benchmark candidate that synchronise with the host."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
