"""Run training steps as CUDA graphs: the host launches one graph in place of a thousand kernels."""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from ..models.packed_text import without_waiting

log = logging.getLogger("clipfast")
P = ParamSpec("P")
R = TypeVar("R")


def graphed(step: Callable[P, R], *, warmup: int = 3, max_graphs: int = 8) -> Callable[P, R]:
    """Return a function that takes a training step as ``step`` does, but as one CUDA graph.

    The first ``warmup`` calls run the step as it is, on a stream of their own. Then the step is captured, and later
    calls copy their arguments into the captured ones and replay the graph. Each set of argument shapes and dtypes has
    warm-up calls and a graph of its own, for at most ``max_graphs`` sets. For further sets, for sets that are seen
    seldom, and on a CPU, the step runs without a graph.

    A replay repeats the kernels of the captured call, and none of its Python code. So these must hold:

    - Everything that changes from call to call is a tensor among the arguments, or a tensor that is written in place,
      such as a learning rate. Arguments are tensors, and structures of tensors; they may also be True, False, None or
      strings, and each such value has a graph of its own.
    - Nothing waits for the GPU: no ``.item()``, no ``.cpu()``, no ``if`` on a tensor, no ``torch.tensor(1.0)`` on it.
      So clipfast's models compute the padding of texts, unless texts come packed (:func:`clipfast.pack_texts`).
    - Weights, buffers and the state of the optimizer stay where they are: they are written in place, as by
      ``load_state_dict``, and not replaced. The optimizer has ``capturable=True``.
    - Gradients are either reset, made and used within the step, or never set to None: ``zero_grad(set_to_none=False)``.
    - Autocast begins and ends within the step, since its copies of the weights would not be made again in a replay.
    - Random numbers come from PyTorch's default generator of the GPU; ``torch.manual_seed`` between calls works.
    - ``DistributedDataParallel`` is made within ``with torch.cuda.stream(torch.cuda.Stream())``, and ``warmup`` is 11;
      the hooks of FSDP cannot be captured.

    Args:
        step: a function of tensors on one GPU, which take no gradients. It returns tensors, which get no gradients
            either: a training step calls ``backward`` itself.
        warmup: number of calls before the capture, in which memory is allocated and kernels are compiled and loaded.
        max_graphs: largest number of graphs. Each has copies of its arguments; they share all other memory.

    Raises:
        TypeError, ValueError: by the returned function, for arguments that a graph cannot take. An error in a capture
            is raised as it is; then the step has changed no weight, and can still be called without a graph.
    """
    return _Graphed(step, warmup, max_graphs)


class _Captured(NamedTuple):
    """A training step that was captured as a CUDA graph: its input tensors, its ``replay``, and its result tensors."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    results: Any


class _Graphed:
    """The callable that :func:`graphed` returns: ``step`` with a CUDA graph for each set of argument shapes."""

    def __init__(self, step: Callable[..., Any], warmup: int, max_graphs: int) -> None:
        self.step, self.warmup, self.max_graphs = step, warmup, max_graphs
        self._calls: Counter[Any] = Counter()
        self._graphs: dict[Any, _Captured] = {}
        self._captures: Captures | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the training step, by its CUDA graph if there is one, and return copies of its results."""
        leaves, structure = tree_flatten((args, kwargs))
        inputs = _tensors_of(leaves)
        device = inputs[0].device
        if device.type != "cuda":
            return _copied(self.step(*args, **kwargs), Tensor.detach)
        if self._captures is None:
            self._captures = Captures(device)
        if self._captures.device != device:
            raise ValueError(f"the step was captured on {self._captures.device}, and these arguments are on {device}")
        key = structure, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self._graphs and not self._is_to_capture(key):
            with self._captures.beside(), without_waiting():
                return _copied(self.step(*args, **kwargs), Tensor.detach)
        if key not in self._graphs:
            with without_waiting():
                self._graphs[key] = self._capture(self._captures, leaves, structure)
        graph = self._graphs[key]
        for static, new in zip(graph.inputs, inputs, strict=True):
            static.copy_(new)
        graph.replay()
        return _copied(graph.results, Tensor.clone)

    def _is_to_capture(self, key: Any) -> bool:
        """Count a call with these argument shapes; return True if it is warmed up and there may be another graph."""
        self._calls[key] += 1
        if self._calls[key] == self.warmup + 1 and len(self._graphs) >= self.max_graphs:
            log.warning(f"arguments of another shape run without a CUDA graph: there are {self.max_graphs} graphs")
        return self._calls[key] > self.warmup and len(self._graphs) < self.max_graphs

    def _capture(self, captures: "Captures", leaves: list[Any], structure: TreeSpec) -> _Captured:
        """Capture the training step as a CUDA graph that reads copies of its arguments."""
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise ValueError("a CUDA graph would keep autocast's first copies of the weights: enter it within the step")
        static = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(static, structure)
        replay, results = captures.capture(functools.partial(self.step, *args, **kwargs))
        return _Captured([x for x in static if isinstance(x, Tensor)], replay, _copied(results, Tensor.detach))


def _tensors_of(leaves: list[Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a training step; raise an error if a CUDA graph cannot take them."""
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    for x in leaves:
        if x is not None and not isinstance(x, (Tensor, bool, str)):
            raise TypeError(f"a graphed step takes tensors, and this is of type {type(x).__name__}: {x!r}")
    if not inputs:
        raise TypeError("a graphed step takes at least one tensor, which says on which device it runs")
    if len({x.device for x in inputs}) > 1:
        places = ", ".join(sorted({str(x.device) for x in inputs}))
        raise ValueError(f"the arguments of a graphed step are on one device, and these are on {places}")
    if any(x.requires_grad for x in inputs):
        raise ValueError("a graphed step gives its arguments no gradients: detach them, or call backward in the step")
    return inputs


def _copied(results: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """Return the results of a training step, with ``copy`` applied to each tensor, which the next replay overwrites."""
    return copy(results) if isinstance(results, Tensor) else tree_map_only(Tensor, copy, results)


class Captures:
    """A stream and a memory pool of a GPU, in which functions are captured as CUDA graphs.

    All graphs share the pool: they are replayed one after another, and none reads what another has left in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._renew()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Run this context on the stream of the captures, as capturing is impossible on the default stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture ``call``, which has run before, as a CUDA graph; return its replay, and the results that it writes.

        A capture that fails leaves PyTorch's allocator, its random number generator and the current stream in the
        state of a capture. This method ends that state, so that the next capture works.

        Raises:
            Exception: the call cannot be captured; PyTorch says why.
        """
        current = torch.cuda.current_stream(self.device)
        try:
            return self._capture(call)
        except Exception as error:
            try:
                self._end_failed(current)
            except RuntimeError as after:
                raise RuntimeError(f"{error} (and no capture works after it: {after})") from error
            raise

    def _capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture one call of a training step as a CUDA graph."""
        # Without a device and a stream, PyTorch captures on the current GPU, which may not be the GPU of the arguments.
        # "thread_local" forbids CUDA calls such as allocations in this thread only, since the data loader's thread pins
        # memory at the same time.
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            results = call()
        return graph.replay, results

    def _end_failed(self, current: torch.cuda.Stream) -> None:
        """End a failed capture of a training step, so that PyTorch can capture again."""
        torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):
            # This raises an error if the allocator no longer allocates into the pool of the capture.
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        self._renew()
        torch.cuda.synchronize(self.device)
        # A small capture that succeeds resets the random number generator, which is still in the failed capture.
        self._capture(lambda: torch.zeros(1, device=self.device))
        torch.cuda.synchronize(self.device)

    def _renew(self) -> None:
        """Make a new memory pool and a new stream for captures of training steps."""
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
