"""Shards that are read from copies are copied before the data workers need them.

The order of the samples says which shards come next. A few threads of the process that owns the data workers bring
them into the cache; a worker that needs a shard earlier waits for the same lock, or brings it itself. A shard that is
needed soon counts as just used, so that other copies make room first.
"""

import collections
import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from .source import ShardSource

if TYPE_CHECKING:
    from .loader import PairBatches

THREADS = 4
BATCHES = 64  # that are looked at ahead of the data workers, unless they have more than POSITIONS samples
POSITIONS = 1 << 16
PATIENCE = 1.0  # seconds that threads wait before they look again


class _Wanted(NamedTuple):
    batch: int  # the first that needs the shard
    source: ShardSource
    name: str


class ReadAhead:
    """Copies shards from entering the context until leaving it. If no shard is read from a copy, it does nothing.

    What goes wrong is left to the worker that needs the shard.

    Args:
        batches: of the run.
        first, stop: number of the first batch that is made, and of the first that is not.
        in_flight: how many batches the data workers make at the same time, behind the one that is waited for.
        sharers: processes of this machine that copy ahead, of which this is one.
    """

    def __init__(self, batches: "PairBatches", first: int, stop: int, in_flight: int = 0, sharers: int = 1) -> None:
        self._batches, self._stop, self._in_flight = batches, stop, in_flight
        self._sources = {
            number: source
            for number, source in enumerate(batches.sources)
            if isinstance(source, ShardSource) and any(shard.is_copied for shard in source.shards)
        }
        # Half of the room is for the copies that are being read.
        self._room = min((source.index.room() for source in self._sources.values()), default=0) // sharers // 2
        self._horizon = in_flight + max(min(BATCHES, POSITIONS // batches.batch_size), 1)
        self._at = first  # the batch that is waited for
        self._looked = first  # the first batch that was not looked at
        self._touched = -1  # the batch that was waited for when copies were last said to be needed
        # The shards that the batches from there on need, as source and shard, and the last batch that needs each.
        self._needed: dict[tuple[int, int], int] = {}
        self._queue: collections.deque[_Wanted] = collections.deque()
        self._bringing, self._largest = 0, 0  # shards that are being copied; bytes of the largest so far
        self._ahead: list[tuple[int, int]] = []  # of copies that are not needed yet, the first batch, and the bytes
        self._closed, self._changed = False, threading.Condition()

    def __enter__(self) -> Self:
        for _ in range(THREADS if self._sources else 0):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def reached(self, number: int) -> None:
        """Go on, as batch ``number`` is now waited for."""
        self._at = number
        # Otherwise a thread looks at the order, which takes a while, and does so again before it waits.
        if self._changed.acquire(blocking=False):
            self._changed.notify_all()
            self._changed.release()

    def _run(self) -> None:
        with contextlib.suppress(ValueError):  # of an order that cannot be, which the data workers meet too
            while (wanted := self._next()) is not None:
                size = 0
                with contextlib.suppress(Exception):  # the worker that needs the shard meets the error again
                    size = wanted.source.index.bring(wanted.name)
                with self._changed:
                    self._bringing -= 1
                    self._largest = max(self._largest, size)
                    self._ahead.append((wanted.batch, size))
                    self._changed.notify_all()

    def _next(self) -> _Wanted | None:
        """Return the shard to copy next, as soon as there is room for it; None at the end."""
        with self._changed:
            while not self._closed:
                if self._touched < self._at:
                    self._look()
                    continue
                while self._queue and self._queue[0].batch < self._at:  # a worker was faster
                    self._queue.popleft()
                if self._queue and self._fits(self._queue[0].batch):
                    self._bringing += 1
                    return self._queue.popleft()
                self._changed.wait(PATIENCE)
        return None

    def _look(self) -> None:
        """Queue the shards that the next batches need, in the order in which they are needed."""
        at = self._at  # another thread changes it
        self._needed = {shard: last for shard, last in self._needed.items() if last >= at}
        end = min(at + self._horizon, self._stop)
        for number in range(self._looked, end):
            samples = self._batches.samples(number)
            for place, source in self._sources.items():
                shards = source.shards_of(samples.sample[samples.source == place])
                for shard in dict.fromkeys(shards.tolist()):
                    index = source.shards[shard]
                    if not index.is_copied:
                        continue
                    if (place, shard) not in self._needed:
                        self._queue.append(_Wanted(number, source, index.name))
                    self._needed[place, shard] = number
        for place, shard in reversed(self._needed):
            self._sources[place].index.touch(self._sources[place].shards[shard].name)
        self._looked, self._touched = max(self._looked, end), at

    def _fits(self, batch: int) -> bool:
        """Return True if a shard is needed now, or if there is room for it beside the copies that are ahead."""
        now = self._at + self._in_flight
        if batch <= now:
            return True
        self._ahead = [(first, size) for first, size in self._ahead if first > now]
        if self._bringing and not self._largest:  # nobody knows yet how large a shard is
            return False
        taken = sum(size for _, size in self._ahead)
        return taken + (self._bringing + 1) * self._largest <= self._room
