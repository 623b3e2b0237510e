"""Communication between the processes that share a batch of the contrastive loss.

They send each other rows of features, statistics of columns of logits, and gradients of columns.

Every process makes the same calls in the same order, and no size is read back from a device. Sums are added in a fixed
order, except in :class:`OwnerReduce`, which leaves the order to the backend.
"""

import dataclasses
import functools
import math
import socket
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Each further group of gradients prolongs the products by 15 us, since the launches of a group start and end with idle
# multiprocessors. Links of 400 GB/s send this many bytes in that time.
GROUP_BYTES = 6e6


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share a batch. Rank r holds ``sizes[r]`` rows; the batch is all of them in order of rank."""

    group: "dist.ProcessGroup | None"
    rank: int
    sizes: tuple[int, ...]

    @functools.cached_property
    def slices(self) -> list[slice]:
        """The rows of the contrastive batch that each rank holds."""
        stops = [sum(self.sizes[: rank + 1]) for rank in range(len(self.sizes))]
        return [slice(stop - size, stop) for size, stop in zip(self.sizes, stops, strict=True)]

    @property
    def own(self) -> slice:
        """The rows of the contrastive batch that this rank holds."""
        return self.slices[self.rank]

    @property
    def total(self) -> int:
        """The number of rows of the contrastive batch."""
        return sum(self.sizes)

    def of_owners(self, owners: Sequence[int]) -> slice:
        """Return the rows of the contrastive batch that neighbouring ranks hold."""
        return slice(self.slices[owners[0]].start, self.slices[owners[-1]].stop)

    def groups(self, row_bytes: int, columns: int) -> list[range]:
        """Return the ranks in groups of neighbours, whose gradients, in rows of ``row_bytes``, are sent together.

        A group costs launches, and nothing is computed while the gradients of the last group are sent. Both together
        take the least time if there are sqrt(all bytes / GROUP_BYTES) groups. A power of two makes whole waves of
        programs more often. A group of several ranks has at most ``columns`` columns, unless that is 0.
        """
        groups = 2 ** round(max(0.0, math.log2(max(1.0, self.total * row_bytes) / GROUP_BYTES) / 2))
        count, most = len(self.sizes), max(1, columns // max(1, *self.sizes))
        size = min(-(-count // groups), most if columns else count)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def blocks(self, groups: Sequence[range], columns: int) -> list[list[range]]:
        """Return neighbouring ``groups`` of ranks that share a block of G, of at most ``columns`` columns.

        Kernels take the columns of a group out of a block by tensor descriptors, which start at multiples of 8 numbers.
        A group with other columns, or with none, has blocks of its own.
        """
        blocks: list[list[range]] = []
        for owners in groups:
            shared = [*blocks[-1], owners] if blocks else [owners]
            widths = [sum(self.sizes[owner] for owner in group) for group in shared]
            if len(shared) > 1 and sum(widths) <= columns and all(width > 0 and width % 8 == 0 for width in widths):
                blocks[-1] = shared
            else:
                blocks.append([owners])
        return blocks

    def gather(self, rows: Tensor) -> Tensor:
        """Collect the features of each rank, [own, ...], into those of the batch, [N, ...], on every rank."""
        return self.joined(self.gather_padded(rows))

    def gather_padded(self, rows: Tensor) -> Tensor:
        """Collect the rows of each rank as :meth:`gather` does, but return [ranks, rows, ...], with at least one row.

        Zeros follow the rows of a rank that has fewer than others.
        """
        missing = max(1, *self.sizes) - len(rows)
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return gather_equal(rows, self.group)

    def joined(self, padded: Tensor) -> Tensor:
        """Return the batch's rows [N, ...] of what :meth:`gather_padded` has returned."""
        if min(self.sizes) == padded.shape[1]:
            return padded.flatten(0, 1)
        return torch.cat([block[:size] for block, size in zip(padded, self.sizes, strict=True)])

    def to_owners(self, columns: Tensor) -> Tensor:
        """Send each rank the results for its own columns of logits, from those [N, ...] for all columns on every rank.

        Returns:
            [ranks, own, ...], the results of every rank for this rank's columns.
        """
        size = self.sizes[self.rank]
        out = columns.new_empty(len(self.sizes), size, *columns.shape[1:])
        splits = [size] * len(self.sizes), list(self.sizes)
        dist.all_to_all_single(out.flatten(0, 1), columns.contiguous(), *splits, group=self.group)
        return out

    def ring(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each rank and its features: this rank first, then rank - 1, and so on round the ring.

        The next block is received while the caller works on the previous block.
        """
        if 0 in self.sizes:
            # A rank without rows takes no part in a transfer. NCCL does not define a transfer between only some
            # ranks as the first communication of their group. Therefore all ranks communicate once before it.
            gather_equal(rows.new_zeros(1), self.group)
        owner, block = self.rank, rows.contiguous()
        for _ in self.sizes[1:]:
            following = self.before(owner)
            transfer = self.shift(block, self.sizes[following])
            yield owner, block
            owner, block = following, transfer.wait()
        yield owner, block

    def before(self, rank: int) -> int:
        """Return the rank before ``rank`` in the ring through which features go."""
        return (rank - 1) % len(self.sizes)

    def shift(self, block: Tensor, size: int) -> "Transfer":
        """Start to send ``block`` to the next rank in the ring and to receive ``size`` rows from the rank before."""
        received = block.new_empty(size, *block.shape[1:])
        operations = self.operations(block, received, 1)
        return Transfer(dist.batch_isend_irecv(operations) if operations else [], block, received)

    def operations(self, block: Tensor, received: Tensor, step: int) -> "list[dist.P2POp]":
        """Return the operations that send ``block`` to the rank ``step`` places ahead in the ring.

        They also fill ``received`` with the block of the rank ``step`` places behind. An empty block has no operation,
        since it is not sent.
        """
        count = len(self.sizes)
        pairs = (dist.isend, block, (self.rank + step) % count), (dist.irecv, received, (self.rank - step) % count)
        return [dist.P2POp(do, x, group=self.group, group_peer=peer) for do, x, peer in pairs if x.numel() > 0]


def check_initialised(op: str) -> None:
    """Refuse to run where ``torch.distributed`` is not initialised.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: torch.distributed is not initialised: call torch.distributed.init_process_group() first, or use "
            "contrastive_loss() in a single process"
        )


def check_ranks(op: str, rank: int, world_size: int) -> None:
    """Refuse a rank or a number of ranks that are not those of this process in the default group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: another rank or number of ranks.
    """
    check_initialised(op)
    for name, given, expected in (("rank", rank, dist.get_rank()), ("world_size", world_size, dist.get_world_size())):
        if given != expected:
            raise ValueError(f"{op}: {name} must be {expected}, this process's, got {given}")


def gather_equal(tensor: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Collect the tensors [...] of all ranks, which have one shape, into [ranks, ...] on every rank."""
    return start_gather(tensor, group, is_async=False).wait()


def start_gather(tensor: Tensor, group: "dist.ProcessGroup | None", *, is_async: bool = True) -> "Transfer":
    """Start to collect the tensors of all ranks as :func:`gather_equal` does."""
    sent, out = tensor.contiguous(), tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    # Since PyTorch 2.13, the function is called all_gather_single.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = gather(out.view(-1), sent.view(-1), group=group, async_op=is_async)
    return Transfer([work] if work else [], sent, out)


@dataclasses.dataclass
class Transfer:
    """A transfer between ranks: one block is being sent while another one is being received."""

    works: "list[dist.Work]"
    sent: Tensor  # the block that is sent, kept so that its memory is not reused until then
    received: Tensor

    def wait(self) -> Tensor:
        """Return the received block; operations that are started from now on can use it."""
        for work in self.works:
            work.wait()
        return self.received


class OwnerReduce:
    """A sum over ranks: every rank adds a block of gradients for each owner, and an owner gets the sum of its blocks.

    Every rank adds its blocks in the order of the owners. Some are sent while the next ones are computed.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.pending: list[tuple[dist.Work | None, Tensor]] = []  # a block must not change until it is reduced
        self.own: Tensor | None = None

    def add(self, owners: range, blocks: Tensor) -> None:
        """Wait for the previous reductions, and start to reduce a block of gradients to each of ``owners``.

        ``blocks`` holds the rows of all owners, one after another, and may be overwritten.
        """
        self._wait()
        if self.own is not None and self.own._is_view():
            self.own = self.own.clone()  # a view would keep the blocks of its whole group
        for owner, block in zip(owners, blocks.split([self.ranks.sizes[owner] for owner in owners]), strict=True):
            if owner == self.ranks.rank:
                self.own = block
            if block.numel() > 0:
                work = dist.reduce(block, group=self.ranks.group, group_dst=owner, async_op=True)
                self.pending.append((work, block))

    def result(self) -> Tensor:
        """Return the sum of the gradients for this rank, after blocks for all ranks have been added."""
        self._wait()
        if self.own is None:
            raise RuntimeError("no block has been added for this rank")
        return self.own

    def _wait(self) -> None:
        """Wait for the reductions of gradients that are running."""
        for work, _ in self.pending:
            if work is not None:
                work.wait()
        self.pending.clear()


class RingReduce:
    """The same reduction as :class:`OwnerReduce`, but every rank adds its blocks in the order of :meth:`Ranks.ring`.

    The sum for an owner travels round the ring one step behind the owner's rows, so it ends at the owner.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.pending: Transfer | None = None

    def add(self, owners: range, block: Tensor) -> None:
        """Add the block of the one owner to the sum of gradients that comes from the rank before, and send it on."""
        if self.pending is not None:
            block = self.pending.wait().add_(block)
        self.pending = self.ranks.shift(block, self.ranks.sizes[self.ranks.before(owners.start)])

    def result(self) -> Tensor:
        """Return the sum of the gradients for this rank, after blocks for all ranks have been added."""
        if self.pending is None:
            raise RuntimeError("no block has been added")
        return self.pending.wait()


_nodes: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


def gpus_per_node(group: "dist.ProcessGroup | None", device: torch.device) -> int:
    """Return the largest number of a group's ranks on one node; ranks with the same host name share a node.

    In the first call for a group, the ranks exchange checksums of these names, for which the host waits.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if group not in _nodes:
        own = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
        _nodes[group] = max(Counter(gather_equal(own, group).flatten().tolist()).values())
    return _nodes[group]
