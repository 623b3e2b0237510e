"""Passes of an op whose kernels are started again, for tensors of the same layout, without deciding anything again.

A pass is a function that only allocates memory and starts kernels. What it does follows from the layout of its tensors,
except their addresses. So a call is recorded: which kernels start, and in which memory their tensors lie. Later calls
allocate the results, and one workspace for everything else, and pass addresses to the compiled kernels.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import new_tensors
from .compiled import Compiled
from .launch import Plan, noted_starts

ALIGNMENT = 128  # the parts of a workspace start at multiples of this many bytes, a line of a GPU's cache
MOST_BYTES = 2**26  # with a larger workspace, the kernels of a pass take a GPU longer than the host
MOST_MAPS = 64  # the most tensor maps that a pass keeps for the matrix of a descriptor, by the matrix's address
Starts = Sequence[tuple[Plan, tuple[Any, ...]]]
Results = tuple[Tensor, ...]


class Pass:
    """A function of tensors of one layout that allocates memory, starts kernels, and returns new tensors, each of them
    once or more often.

    Later calls allocate all results before anything else, so the function should do this too if results are large. It
    is called each time if it does anything else, such as an op of PyTorch that computes. It is also called where no
    compiled kernel may be started directly: in Triton's interpreter, under launch hooks, and for tensors that are not
    aligned to 16 bytes.
    """

    __slots__ = ("_function", "_is_new", "_is_open", "_replay")

    def __init__(self, function: Callable[..., Results]) -> None:
        self._function, self._is_new, self._is_open = function, True, True
        self._replay: Callable[[Sequence[Tensor]], Results | None] | None = None

    def __call__(self, *tensors: Tensor) -> Results:
        """Return the results of the pass for tensors of its layout."""
        if self._replay is not None:
            return self._replay(tensors) or self._function(*tensors)
        # The first call is not recorded, because many layouts occur only once. Inputs in the same memory cannot be told
        # apart by the addresses that kernels get.
        is_new, self._is_new = self._is_new, False
        if is_new or not self._is_open or not _are_apart(tensors):
            return self._function(*tensors)
        self._is_open = False
        with noted_starts() as starts, _Computing(starts) as computing:
            results = self._function(*tensors)
        places = {x: place for place, x in enumerate(dict.fromkeys(results))}
        if not computing.is_seen and _are_apart((*tensors, *places)):
            replay = self._replay = _replay_of(starts, tensors, (*places,))
            if replay is not None and len(places) < len(results):
                repeated = operator.itemgetter(*[places[x] for x in results])
                self._replay = lambda tensors: (found := replay(tensors)) and repeated(found)
        return results


class _Computing(TorchDispatchMode):
    """A mode that sees whether PyTorch computes anything, which is more than to make views and to allocate memory.

    If it does, the pass is not recorded. Then ``starts`` is emptied, so that its tensors are freed as in other calls.
    """

    def __init__(self, starts: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._starts, self.is_seen = starts, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an op of PyTorch inside a pass, and remember whether it computes."""
        makes_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (makes_view or func._schema.name.startswith(("aten::empty", "aten::new_empty"))):
            self.is_seen = True
            self._starts.clear()
        return func(*args, **(kwargs or {}))


def _memory_of(x: Tensor) -> int:
    """Return the address of the memory in which a tensor of a pass lies."""
    return x.untyped_storage().data_ptr()


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors of a pass have elements, start at multiples of 16 bytes, and share no memory."""
    are_aligned = all(x.numel() and x.data_ptr() % 16 == 0 for x in tensors)
    return are_aligned and len({*map(_memory_of, tensors)}) == len(tensors)


class _Maps:
    """The tensor maps of a descriptor whose matrix always has the same layout, by the address of the matrix.

    A tensor map is a value, which the start of a kernel copies.
    """

    def __init__(self, descriptor: TensorDescriptor, make: Callable[[Any], Sequence[Any]]) -> None:
        self.known: dict[int, Any] = {}
        self._make = make
        self._fields = {name: value for name, value in vars(descriptor).items() if name != "base"}

    def make(self, address: int) -> Any:
        """Make the tensor map for a matrix at this address, and keep it."""
        if len(self.known) >= MOST_MAPS:
            self.known.clear()
        base = SimpleNamespace(data_ptr=lambda: address)
        found = self.known[address] = self._make(SimpleNamespace(base=base, **self._fields))[0]
        return found


def _lay_out(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Return where the parts of a workspace start, and the size of the workspace, in bytes.

    ``sizes`` has the bytes of each part, and ``lives`` the numbers of the first and the last launch that use it, in the
    order of the first. Parts share memory if no launch needs both.
    """
    placed: list[tuple[int, int, int]] = []  # where a part starts and ends, and its last launch
    for size, (first, last) in zip(sizes, lives, strict=True):
        start = 0
        for begin, end, _ in sorted(part for part in placed if part[2] >= first):
            if start + size <= begin:
                break
            start = max(start, end + -end % ALIGNMENT)
        placed.append((start, start + size, last))
    return [start for start, _, _ in placed], max([1, *(end for _, end, _ in placed)])


class _Memory:
    """Where tensors of a recorded pass lie: in an input, in a result, or in the workspace, counted in this order."""

    def __init__(self, starts: Starts, inputs: Sequence[Tensor], results: Results) -> None:
        self._roots = {_memory_of(x): (place, x.data_ptr()) for place, x in enumerate((*inputs, *results))}
        lives: dict[int, tuple[int, int]] = {}
        sizes: dict[int, int] = {}
        for number, (_, tensors) in enumerate(starts):
            for x in map(_matrix_of, tensors):
                if x is not None and x.numel() and (memory := _memory_of(x)) not in self._roots:
                    lives[memory] = lives.get(memory, (number, 0))[0], number
                    sizes[memory] = x.untyped_storage().nbytes()
        offsets, self.size = _lay_out([*sizes.values()], [*lives.values()])
        place = len(self._roots)
        self._roots |= {memory: (place, memory - offset) for memory, offset in zip(sizes, offsets, strict=True)}

    def find(self, x: Tensor) -> tuple[int, int]:
        """Return the number of the input, the result or the workspace that has a tensor, and its offset in bytes."""
        place, origin = self._roots[_memory_of(x)]
        return place, x.data_ptr() - origin


def _matrix_of(x: Any) -> Any:
    """Return the matrix of a descriptor; anything else that a pass gives to a kernel is returned as it is."""
    return x.base if x.__class__ is TensorDescriptor else x


class _Values:
    """The values from which the arguments of a pass's kernels are taken: constants, addresses, then tensor maps."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self.constants: dict[Any, None] = {}
        self.addresses: dict[tuple[int, int], None] = {}
        self.maps: dict[Any, _Maps] = {}

    def add(self, tensors: Sequence[Any], compiled: Compiled) -> list[Any]:
        """Add the arguments of a kernel, given its tensors, descriptors or None; return their keys."""
        keys: list[Any] = []
        makers = iter(compiled.map_makers)
        for x in tensors:
            matrix = _matrix_of(x)
            is_empty = matrix is None or not matrix.numel()
            key: Any = (None if matrix is None else 0) if is_empty else self._memory.find(matrix)
            (self.constants if is_empty else self.addresses).setdefault(key)
            if x is matrix:
                keys.append(key)
                continue
            numbers = *x.shape, *x.strides
            self.constants.update(dict.fromkeys(numbers))
            self.maps[len(self.maps), key] = _Maps(x, next(makers))
            keys += [next(reversed(self.maps)), *numbers]
        return keys

    def take(self, keys: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return the function that takes these arguments from all values, once all are added."""
        places = {key: place for place, key in enumerate((*self.constants, *self.addresses, *self.maps))}
        return operator.itemgetter(*[places[key] for key in keys])


def _replay_of(starts: Starts, inputs: Sequence[Tensor], results: Results) -> "_Replay | None":
    """Return what starts the recorded kernels again, or None if they cannot be started directly."""
    compiled = [plan.compiled_for(tensors) for plan, tensors in starts]
    memory = _Memory(starts, inputs, results)
    if not starts or memory.size > MOST_BYTES or not all(x.is_contiguous() for x in results):
        return None
    values, keys = _Values(memory), []
    for (_, tensors), found in zip(starts, compiled, strict=True):
        if found is None or found.launch is None:
            return None
        keys.append(values.add(tensors, found))
    launches = [
        (found.launch, values.take(own)) for found, own in zip(compiled, keys, strict=True) if found and found.launch
    ]
    return _Replay([plan for plan, _ in starts], launches, values, memory.size, results)


class _Replay:
    """The kernels of a recorded pass, which are started again for other tensors of the same layout."""

    def __init__(
        self, plans: Sequence[Plan], launches: Sequence[tuple[Callable[..., None], Callable[..., Any]]],
        values: _Values, size: int, results: Results,
    ) -> None:  # fmt: skip
        self._plans, self._launches = plans, launches
        self._constants, self._addresses = [*values.constants], [*values.addresses]
        place = {key: number for number, key in enumerate((*values.constants, *values.addresses))}
        self._maps = [(place[address], maps) for (_, address), maps in values.maps.items()]
        self._new = [new_tensors(x) for x in results]
        self._new_workspace = new_tensors(results[0], (size,), results[0].new_empty(0).byte().dtype)

    def __call__(self, inputs: Sequence[Tensor]) -> Results | None:
        """Return the results for inputs of the recorded layout, or None if the kernels may not be started directly."""
        origins = [x.data_ptr() for x in inputs]
        if functools.reduce(operator.or_, origins) % 16 or not self._plans[0].may_start(*self._plans[1:]):
            return None
        results = tuple([new() for new in self._new])
        workspace = self._new_workspace()
        origins += [x.data_ptr() for x in results]
        origins.append(workspace.data_ptr())
        values = self._constants + [origins[place] + offset for place, offset in self._addresses]
        values += [maps.known.get(values[place]) or maps.make(values[place]) for place, maps in self._maps]
        plan = self._plans[0]
        stream = plan.stream_of(plan.index)
        for launch, take in self._launches:
            launch(stream, take(values))
        return results
