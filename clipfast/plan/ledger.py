"""A dispatch mode that records allocations, FLOPs and communication of ops on real or fake tensors."""

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
from ..kernels.hardware import FP8_SPEEDUP
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
    """A kernel, or a call of a collective, that the ledger has recorded. Storages are identified by their addresses."""

    phase: str  # the ledger's ``phase`` when the kernel or collective was called
    bytes: int  # bytes that the kernel reads and writes, or that this rank sends
    uses: frozenset[int]  # storages that are read or written
    flops: int = 0  # FLOPs of matrix products, which are divided by ``FP8_SPEEDUP`` if ``is_fp8``
    collective: str = ""  # name of the collective; empty for a kernel
    messages: int = 0  # number of messages that this rank sends one after another for the collective
    is_fp8: bool = False  # whether the kernel is a matrix product in 8 bits


class Ledger(TorchDispatchMode):
    """Bytes of live tensors by category, and an :class:`Event` for each kernel and each collective.

    It sees the ops of its own thread, and clipfast's kernels if their launches are recorded. On a GPU it does not see
    memory that an op of PyTorch allocates internally.

    Args:
        launches: the list of :func:`~clipfast.kernels.launch.record_launches`, if kernels are recorded.
        categories: the category of memory by the phase in which it is allocated; by default the name of the phase.

    Attributes:
        phase: name of the part of the step that runs, such as "loss"; the caller sets it.
        events: kernels and collectives in order.
        live: bytes of live tensors by category.
        peak: ``live`` at the moment when the sum was largest.
        peaks: for each phase, ``live`` at the moment of the phase when the sum was largest.
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
        # Maps the address of each live storage to its category, its bytes, and a weak reference that removes the entry.
        self._storages: dict[int, tuple[str, int, object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and record it. Of an op of clipfast, the implementation runs, since its fake would hide its ops."""
        if func is PRIM_DEVICE and isinstance(args[0], FakeTensor):  # checked first: most calls ask for a device
            return args[0].fake_device
        self.book_launches()
        kwargs = kwargs or {}
        if func.namespace == "clipfast" or (func.namespace == "aten" and func._can_decompose()):
            inner = OPDEFS[func._schema.name]._init_fn if func.namespace == "clipfast" else func.decompose
            with self:
                results = inner(*args, **kwargs)
            # Launches are recorded with their tensors, which must be released here: otherwise autograd would copy a
            # gradient in place of taking it over, since the record of a launch refers to it too.
            self.book_launches()
            return results
        if func is ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # This is ``item()`` of a fake tensor, which has no value. Only CPU paths of clipfast's ops call it, and the
            # dtype tells which value they ask for. A bool says whether an input is invalid (no), and an int8 whether
            # the loss's exponentials share one shift (yes). A float is a scale, or that shift, 0 for usual scales.
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
            count = ATEN_FLOPS.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=out)
            read = [] if _only_like(func) else given
            self._add_kernel(flops, [*read, *made], is_fp8=func is ATEN._scaled_mm.default)
        self._update_peak()
        return out

    def book_launches(self) -> None:
        """Add an event for each kernel launch that was recorded since the last call, and release its tensors."""
        for launch in self.launches:  # a TMA tensor descriptor holds its tensor as ``base``
            self._add_kernel(
                launch_flops(launch), _tensors([getattr(arg, "base", arg) for arg in launch.args.values()])
            )
        self.launches.clear()

    def begin(self) -> None:
        """Drop all events and peaks that the ledger has recorded; tensors that are alive stay counted."""
        self.events.clear()
        self.peak = self.live.copy()
        self.peaks.clear()

    @contextlib.contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Record the resizes of storages in the ledger while the context is open.

        FSDP2 frees gathered parameters by resizing their storages to 0. A storage that has been resized belongs to the
        category ``GATHERED`` from then on.
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

    def _add_kernel(self, flops: int, tensors: list[Tensor], *, is_fp8: bool = False) -> None:
        """Add an event to the ledger for a kernel that reads or writes these tensors, unless they have no bytes."""
        if _nbytes(tensors) > 0:
            flops = round(flops / FP8_SPEEDUP) if is_fp8 else flops
            self.events.append(Event(self.phase, _nbytes(tensors), self._enter(tensors), flops, is_fp8=is_fp8))

    def _enter(self, tensors: list[Tensor]) -> frozenset[int]:
        """Add the bytes of storages that the ledger does not know; return the addresses of all tensors' storages."""
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        for key in [key for key in storages if key not in self._storages]:
            category, size = self.categories.get(self.phase, self.phase), storages[key].nbytes()
            ended = weakref.ref(storages[key], functools.partial(self._leave, key))
            self._storages[key] = category, size, ended
            self.live[category] += size
        return frozenset(storages)

    def _leave(self, key: int, _: object) -> None:
        """Subtract a storage that was freed from the ledger's live bytes."""
        category, size, _ = self._storages.pop(key)
        self.live[category] -= size

    def _update_peak(self) -> None:
        """Update the ledger's peaks of memory, overall and of this phase, from the live bytes."""
        most = self.peaks.get(self.phase)
        if most is not None and self.live.total() <= most.total():
            return
        self.peaks[self.phase] = self.live.copy()
        self.peak = max(self.peak, self.peaks[self.phase], key=Counter.total)


def _tensors(tree: Any) -> list[Tensor]:
    """Return all tensors in the nested arguments of an op that the ledger records."""
    if isinstance(tree, Tensor):
        return [getattr(tree, "_local_tensor", tree)]  # the shard of this rank, if the tensor is a DTensor
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []


def _only_like(func: Any) -> bool:
    """Return whether an op reads only shape, dtype and device of its input tensors, as ``new_zeros`` does."""
    name = func._schema.name.split("::")[-1]
    return name.startswith("new_") or name.endswith("_like")


def _nbytes(tensors: list[Tensor]) -> int:
    """Return the bytes that a kernel reads or writes in these tensors; an expanded tensor has those of its storage."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def _sent(name: str, args: Any, first: int, second: int = 0) -> tuple[int, int]:
    """Return the bytes and the number of messages that this rank sends for a collective, by a ring algorithm.

    ``first`` and ``second`` are the bytes of the first two arguments ``args`` of the c10d op.
    """
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
            return second * (ranks - 1) // ranks, ranks - 1  # splits are equal, since every rank has as many pairs
    raise NotImplementedError(f"bytes that the collective {name} sends")
