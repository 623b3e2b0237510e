"""What processes that share a batch tell each other: rows, statistics of columns, and gradients of columns.

Every process makes the same calls in the same order, and no size is read back from a device. What is gathered, sent to
its owner or sent round is added in a fixed order; only :class:`Reduction` leaves the order to the backend.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share a batch. Rank r holds ``sizes[r]`` rows; the batch is all of them in order of rank."""

    group: "dist.ProcessGroup | None"
    rank: int
    sizes: tuple[int, ...]

    @functools.cached_property
    def slices(self) -> list[slice]:
        """Rows of the batch that each rank holds."""
        stops = [sum(self.sizes[: rank + 1]) for rank in range(len(self.sizes))]
        return [slice(stop - size, stop) for size, stop in zip(self.sizes, stops, strict=True)]

    @property
    def own(self) -> slice:
        """Rows of the batch that this rank holds."""
        return self.slices[self.rank]

    @property
    def total(self) -> int:
        """Rows of the batch."""
        return sum(self.sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """[own, ...] of each rank -> [N, ...] on every rank."""
        most = max(self.sizes)
        padded = rows.contiguous()
        if len(rows) < most:
            padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        out = gather_equal(padded, self.group)
        if min(self.sizes) == most:
            return out.flatten(0, 1)
        return torch.cat([block[:size] for block, size in zip(out, self.sizes, strict=True)])

    def to_owners(self, columns: Tensor) -> Tensor:
        """[N, ...] on each rank -> [ranks, own, ...]: what every rank says of this rank's columns."""
        size = self.sizes[self.rank]
        out = columns.new_empty(len(self.sizes), size, *columns.shape[1:])
        splits = [size] * len(self.sizes), list(self.sizes)
        dist.all_to_all_single(out.flatten(0, 1), columns.contiguous(), *splits, group=self.group)
        return out

    def spread(self, of_ranks: Tensor) -> Tensor:
        """[ranks] -> [N]: for each row of the batch, the value of the rank that holds it."""
        return torch.cat([value.expand(size) for value, size in zip(of_ranks, self.sizes, strict=True)])

    def ring(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each rank with its rows, from this one downwards; the next block is under way while one is worked on."""
        owner, block = self.rank, rows.contiguous()
        for _ in self.sizes[1:]:
            following = self.before(owner)
            transfer = self.shift(block, self.sizes[following])
            yield owner, block
            owner, block = following, transfer.wait()
        yield owner, block

    def before(self, rank: int) -> int:
        """The rank before ``rank`` in the ring."""
        return (rank - 1) % len(self.sizes)

    def shift(self, block: Tensor, size: int) -> "Transfer":
        """Start to send ``block`` to the next rank, and to receive ``size`` such rows from the one before."""
        received = block.new_empty(size, *block.shape[1:])
        operations = self.operations(block, received, 1)
        return Transfer(dist.batch_isend_irecv(operations) if operations else [], block, received)

    def operations(self, block: Tensor, received: Tensor, step: int) -> "list[dist.P2POp]":
        """What sends ``block`` to the rank ``step`` further on and fills ``received`` from the one as far back; nothing
        that is empty is sent.
        """
        count = len(self.sizes)
        pairs = (dist.isend, block, (self.rank + step) % count), (dist.irecv, received, (self.rank - step) % count)
        return [dist.P2POp(do, x, group=self.group, group_peer=peer) for do, x, peer in pairs if x.numel() > 0]


def check_initialised(op: str) -> None:
    """Refuse a process that is in no group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: torch.distributed is not initialised: call torch.distributed.init_process_group() first, or use "
            "contrastive_loss() in a single process"
        )


def check_ranks(op: str, rank: int, world_size: int) -> None:
    """Refuse what this process is not in the default group."""
    check_initialised(op)
    for name, given, expected in (("rank", rank, dist.get_rank()), ("world_size", world_size, dist.get_world_size())):
        if given != expected:
            raise ValueError(f"{op}: {name} must be {expected}, this process's, got {given}")


def gather_equal(tensor: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The same shape on every rank -> [ranks, ...] on every rank."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    # PyTorch 2.13 has a new name for it
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), tensor.contiguous().view(-1), group=group)
    return out


@dataclasses.dataclass
class Transfer:
    """A block that is being sent, and one that is being received."""

    works: list[Any]
    sent: Tensor  # must live until it has been sent
    received: Tensor

    def wait(self) -> Tensor:
        """The received block, for whatever is computed from now on."""
        for work in self.works:
            work.wait()
        return self.received


class Sums(Protocol):
    """Sums of blocks over all ranks, each for the rank that owns it."""

    def add(self, owner: int, block: Tensor) -> None:
        """Give this rank's part of the block of ``owner``; ``block`` is used up."""

    def result(self) -> Tensor:
        """The sum of this rank's own block."""


class Reduction:
    """Sums of blocks that every rank gives in order of owner: one is reduced while the next is computed."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.pending: tuple[Any, Tensor] | None = None
        self.own: Tensor | None = None

    def add(self, owner: int, block: Tensor) -> None:
        """Start to reduce ``block``."""
        self._wait()
        if owner == self.ranks.rank:
            self.own = block
        if block.numel() > 0:
            self.pending = dist.reduce(block, group=self.ranks.group, group_dst=owner, async_op=True), block

    def result(self) -> Tensor:
        """The sum of this rank's own block, after all have been given."""
        self._wait()
        if self.own is None:
            raise RuntimeError("no rank has given this rank's own block")
        return self.own

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending[0].wait()
        self.pending = None


class Travel:
    """Sums of blocks given in order of the ring: a sum follows its block round, one step behind, and so gets home."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.pending: Transfer | None = None

    def add(self, owner: int, block: Tensor) -> None:
        """Add ``block`` to the sum that comes from the rank before, and send it on."""
        if self.pending is not None:
            block = self.pending.wait().add_(block)
        self.pending = self.ranks.shift(block, self.ranks.sizes[self.ranks.before(owner)])

    def result(self) -> Tensor:
        """The sum of this rank's own block, after all have been given."""
        if self.pending is None:
            raise RuntimeError("no block has been given")
        return self.pending.wait()
