"""Read-ahead: threads copy shards that cannot be read in place before the data workers need them.

The order of the samples determines the next shards. A few threads of the process that owns the data workers copy them
into the cache. A worker that needs a shard earlier waits for the same lock, or copies the shard itself. A shard that is
needed soon counts as just used, so other copies are removed first.
"""

import atexit
import collections
import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from .source import ShardSource
from .staging import cancelled

if TYPE_CHECKING:
    from .loader import PairBatches

THREADS = 4
BATCHES = 64  # look this many batches ahead of the data workers, unless they have more than POSITIONS samples
POSITIONS = 1 << 16
PATIENCE = 1.0  # seconds after which a thread that waits for room looks again


class _Wanted(NamedTuple):
    batch: int  # number of the first batch that needs the shard
    source: ShardSource
    name: str


class ReadAhead:
    """Copies shards ahead of training while the context lasts. If all shards are read in place, it does nothing.

    Errors are ignored here: the data worker that needs the shard meets them again and raises them. When the context or
    the process ends, a copy that is being made is given up at its next piece of data, and is not waited for.

    Args:
        batches: the batches of the run.
        first, stop: number of the first batch that is made, and of the first that is not.
        in_flight: number of batches that the data workers make at the same time, after the batch that training waits
            for.
        sharers: number of processes on this machine that copy ahead, including this one.
    """

    def __init__(self, batches: "PairBatches", first: int, stop: int, in_flight: int = 0, sharers: int = 1) -> None:
        self._batches, self._stop, self._in_flight = batches, stop, in_flight
        self._sources = {
            number: source
            for number, source in enumerate(batches.sources)
            if isinstance(source, ShardSource) and any(shard.is_copied for shard in source.shards)
        }
        # Half of the cache's room is for copies that are made ahead, and the other half for copies that are being read.
        self._room = min((source.index.room() for source in self._sources.values()), default=0) // sharers // 2
        self._horizon = in_flight + max(min(BATCHES, POSITIONS // batches.batch_size), 1)
        self._at = first  # the batch that training waits for
        self._looked = first  # the first batch whose shards were not looked up yet
        self._touched = -1  # the value of _at when copies were last marked as needed
        # The shards that the batches from _at on need, as (source, shard), with the last batch that needs each.
        self._needed: dict[tuple[int, int], int] = {}
        self._queue: collections.deque[_Wanted] = collections.deque()
        self._bringing, self._largest = 0, 0  # number of shards that are being copied; bytes of the largest copy so far
        self._ahead: list[tuple[int, int]] = []  # first batch and bytes of each copy that is not needed yet
        self._closed, self._changed = threading.Event(), threading.Condition()

    def __enter__(self) -> Self:
        atexit.register(self._closed.set)  # the process may end while the context is open
        for _ in range(THREADS if self._sources else 0):
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        atexit.unregister(self._closed.set)
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    def reached(self, number: int) -> None:
        """Note that training now waits for batch ``number``, and let the copying threads go on."""
        self._at = number
        # If the lock is taken, a thread is looking at the order. It looks again before it waits, and finds the new
        # number.
        if self._changed.acquire(blocking=False):
            self._changed.notify_all()
            self._changed.release()

    def _run(self) -> None:
        """Copy shards ahead of their use, until training ends."""
        cancelled.set(self._closed)
        with contextlib.suppress(ValueError):  # ValueError: the order cannot be computed, as data workers say too
            while (wanted := self._next()) is not None:
                size = 0
                with contextlib.suppress(Exception):  # the data worker that needs the shard raises the error again
                    size = wanted.source.index.bring(wanted.name)
                with self._changed:
                    self._bringing -= 1
                    self._largest = max(self._largest, size)
                    self._ahead.append((wanted.batch, size))
                    self._changed.notify_all()

    def _next(self) -> _Wanted | None:
        """Wait until there is room for the next shard, and return it; None at the end of the run."""
        with self._changed:
            while not self._closed.is_set():
                if self._touched < self._at:
                    self._look()
                    continue
                while self._queue and self._queue[0].batch < self._at:  # a data worker has copied the shard already
                    self._queue.popleft()
                if self._queue and self._fits(self._queue[0].batch):
                    self._bringing += 1
                    return self._queue.popleft()
                self._changed.wait(PATIENCE)
        return None

    def _look(self) -> None:
        """Queue the shards that the next batches need, in the order of their first use, to be copied."""
        at = self._at  # another thread may change self._at meanwhile
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
        """Return True if a shard is needed now, or if it fits into the room beside the copies that were made ahead."""
        now = self._at + self._in_flight
        if batch <= now:
            return True
        self._ahead = [(first, size) for first, size in self._ahead if first > now]
        if self._bringing and not self._largest:  # no copy is finished, so the size of a copy is not known yet
            return False
        taken = sum(size for _, size in self._ahead)
        return taken + (self._bringing + 1) * self._largest <= self._room
