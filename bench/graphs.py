"""Capture of calls as CUDA graphs, so that the time of a short kernel does not include the host's time to launch it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

Call = Callable[[], object]


class Graphs:
    """A stream and a memory pool in which calls are captured as CUDA graphs.

    All graphs share the pool: they are replayed one after another, and nobody reads the results that one leaves there.

    A capture that fails leaves PyTorch's allocator, its random numbers and the current stream in the middle of a
    capture. This class ends such a capture, so that the next one works. Calls that synchronise with the host are found
    before they are captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._renew()

    def capture(self, calls: Sequence[Call]) -> list[Call]:
        """Return functions that replay ``calls``, which have run before. Their results are dropped.

        Raises:
            RuntimeError: one of them cannot be captured; PyTorch says why.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _no_host_sync():
            calls[0]()  # libraries allocate their workspaces for this stream now, outside of the graph
        current.wait_stream(self._stream)
        try:
            return [self._capture(call) for call in calls]
        except Exception as error:
            try:
                self._end_failed(current)
            except RuntimeError as after:
                raise RuntimeError(f"{error} (and no capture works after it: {after})") from error
            raise

    def _capture(self, call: Call) -> Call:
        """Capture one call as a CUDA graph, and return the function that replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            call()
        return graph.replay

    def _end_failed(self, current: torch.cuda.Stream) -> None:
        """Leave the state of a failed capture, so that the next capture works."""
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):
            # The call raises an error if the allocator has left the pool already.
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        self._renew()
        torch.cuda.synchronize(self.device)
        # The random number generator stays in the failed capture until another capture succeeds.
        self._capture(lambda: torch.zeros(1, device=self.device))
        torch.cuda.synchronize(self.device)

    def _renew(self) -> None:
        """Make a new memory pool and stream for CUDA graphs."""
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)


@contextlib.contextmanager
def _no_host_sync() -> Iterator[None]:
    """Let PyTorch raise an error at calls that synchronise with the host."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
