"""A dispatch mode that records the allocations, FLOPs and messages of a run on real or fake tensors."""

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..kernels.flops import launch_flops
from ..kernels.launch import Launch

ATEN = torch.ops.aten
PRIM_DEVICE = torch.ops.prim.device.default
GATHERED = "gathered weights"
# FLOPs of ops that PyTorch's own FLOP counter lacks: in-place products, and attention on a CPU.
ATEN_FLOPS = flop_registry | {
    ATEN.addmm_: flop_registry[ATEN.addmm],
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel, or one call of a collective. A storage is known by its address."""

    phase: str
    bytes: int  # bytes that a kernel reads and writes, or that this rank sends
    uses: frozenset[int]  # storages that are read or written
    flops: int = 0  # FLOPs of matrix products
    collective: str = ""  # name of the collective; empty for a kernel
    messages: int = 0  # messages that this rank sends one after another


class Ledger(TorchDispatchMode):
    """Bytes of live tensors by category, and an :class:`Event` for each kernel and each collective.

    It sees the ops of its own thread. It sees kernels of this package if their launches are recorded. On a GPU it does
    not see memory that an op allocates internally.

    Args:
        launches: the list of :func:`~clipfast.kernels.launch.record_launches`, if kernels are recorded.
        categories: the category of memory by the phase in which it is allocated; by default the name of the phase.

    Attributes:
        phase: name of the part of the run; to be set by the caller.
        events: kernels and collectives in order.
        live: bytes of live tensors by category.
        peak: ``live`` at the moment when the sum was largest.
        peaks: the same for each phase.
    """

    def __init__(self, launches: list[Launch] | None = None, categories: Mapping[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = [] if launches is None else launches
        self.categories = {} if categories is None else categories
        self.phase = ""
        self.events: list[Event] = []
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._storages: dict[int, tuple[str, int, object]] = {}  # category, bytes and weak reference by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and record it. An op of this package runs as the ops inside it, which its fake would hide."""
        if func is PRIM_DEVICE and isinstance(args[0], FakeTensor):  # first, since most calls ask for a device
            return args[0].fake_device
        self.book_launches()
        kwargs = kwargs or {}
        if func.namespace == "clipfast" or (func.namespace == "aten" and func._can_decompose()):
            inner = OPDEFS[func._schema.name]._init_fn if func.namespace == "clipfast" else func.decompose
            with self:
                results = inner(*args, **kwargs)
            # A recorded launch holds its tensors. Autograd would copy a gradient that something else holds.
            self.book_launches()
            return results
        if func is ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # A fake tensor has no value, and only the CPU path reads values: whether an input is wrong (bool; no),
            # whether the shared shift suits (int8; yes), the scale, and the shared shift, 0 for the scales of training.
            dtype = args[0].dtype
            return 0.0 if dtype.is_floating_point else dtype != torch.bool
        given = _tensors([*args, *kwargs.values()])
        known = self._enter(given)
        out = func(*args, **kwargs)
        made = _tensors(out)
        uses = known | self._enter(made)
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__.strip("_").removesuffix("_base")
            sent, messages = _sent(name, args, *(_nbytes(_tensors(arg)) for arg in args[:2]))
            self.events.append(Event(self.phase, sent, uses, 0, name, messages))
        elif func._schema.is_mutable or not (uses == known or "empty" in func._schema.name):
            flops = ATEN_FLOPS.get(func._overloadpacket)
            read = [] if _only_like(func) else given
            self._add_kernel(0 if flops is None else flops(*args, **kwargs, out_val=out), [*read, *made])
        self._update_peak()
        return out

    def book_launches(self) -> None:
        """Add an event of the ledger for each kernel launch that was recorded, and release the launches' arguments."""
        for launch in self.launches:  # a tensor descriptor has its tensor as ``base``
            self._add_kernel(
                launch_flops(launch), _tensors([getattr(arg, "base", arg) for arg in launch.args.values()])
            )
        self.launches.clear()

    def begin(self) -> None:
        """Start a new record of the ledger: drop all events and peaks, but keep the tensors that are alive."""
        self.events.clear()
        self.peak = self.live.copy()
        self.peaks.clear()

    @contextlib.contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Record that storages are resized while the context is open, as FSDP2 resizes those of gathered parameters.

        A storage that has been emptied once belongs to the category ``GATHERED`` from then on.
        """
        resize = torch.UntypedStorage.resize_

        def resize_and_book(storage: torch.UntypedStorage, size: int) -> Any:
            """Resize a storage, and record its new size in the ledger."""
            result = resize(storage, size)
            if (known := self._storages.get(storage._cdata)) is not None:
                category, old, reference = known
                self.live[category] -= old
                self._storages[storage._cdata] = GATHERED, size, reference
                self.live[GATHERED] += size
                self._update_peak()
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_and_book):
            yield

    def _add_kernel(self, flops: int, tensors: list[Tensor]) -> None:
        """Add the event of a kernel that reads and writes these tensors to the ledger."""
        if _nbytes(tensors) > 0:
            self.events.append(Event(self.phase, _nbytes(tensors), self._enter(tensors), flops))

    def _enter(self, tensors: list[Tensor]) -> frozenset[int]:
        """Record the storages of tensors that are new to the ledger, and return the addresses of all."""
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        for key in [key for key in storages if key not in self._storages]:
            category, size = self.categories.get(self.phase, self.phase), storages[key].nbytes()
            ended = weakref.ref(storages[key], functools.partial(self._leave, key))
            self._storages[key] = category, size, ended
            self.live[category] += size
        return frozenset(storages)

    def _leave(self, key: int, _: object) -> None:
        """Remove a storage that was freed from the ledger."""
        category, size, _ = self._storages.pop(key)
        self.live[category] -= size

    def _update_peak(self) -> None:
        """Update the ledger's peaks of memory after a storage was added."""
        most = self.peaks.get(self.phase)
        if most is not None and self.live.total() <= most.total():
            return
        self.peaks[self.phase] = self.live.copy()
        self.peak = max(self.peak, self.peaks[self.phase], key=Counter.total)


def _tensors(tree: Any) -> list[Tensor]:
    """Return all tensors in the nested arguments of an op that the ledger records."""
    if isinstance(tree, Tensor):
        return [getattr(tree, "_local_tensor", tree)]  # for a DTensor, the part that this rank holds
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []


def _only_like(func: Any) -> bool:
    """Return whether an op takes only shape, dtype and device of its tensors, as ``new_zeros`` does."""
    name = func._schema.name.split("::")[-1]
    return name.startswith("new_") or name.endswith("_like")


def _nbytes(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors for the ledger; an expanded tensor counts with its storage."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def _sent(name: str, args: Any, first: int, second: int = 0) -> tuple[int, int]:
    """Return bytes and messages that this rank sends by a ring algorithm, from the bytes of the first two arguments."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    match name:
        case "send" | "recv" | "broadcast" | "reduce":
            gives = name != "recv" and not (name == "reduce" and args[3] == rank)
            return (first, 1) if gives else (0, 0)
        case "allreduce":
            return 2 * first * (ranks - 1) // ranks, 2 * (ranks - 1)
        case "allgather":
            return second * (ranks - 1), ranks - 1
        case "reduce_scatter":
            return first * (ranks - 1), ranks - 1
        case "alltoall":
            return second * (ranks - 1) // ranks, ranks - 1  # every rank has equally many pairs
    raise NotImplementedError(f"bytes that the collective {name} sends")
