"""The watchdog: a thread of each rank tells the other ranks what the rank is doing, and names a rank that is stuck.

The error of a failed collective says how long it waited, but not for which rank. Therefore each rank writes a beat (a
heartbeat) into torchrun's store every second: a count, the step, and the phase, which tells whether the rank waits for
others or the others wait for it. A rank that has waited for most of ``--dist-timeout`` reads the beats of all ranks. If
the beats of a rank have stopped, its process was stopped, or its machine is lost. If a rank is in a phase of its own,
such as "data", the others wait for it. Every other rank names the stuck rank in its error, and all ranks that are still
able to write the stacks of their threads into the run's folder.
"""

import contextlib
import datetime
import faulthandler
import itertools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from .ending import Interruption

log = logging.getLogger("clipfast")
BEAT = 1.0  # seconds between two heartbeats of a rank; less if the timeout of collectives is short
BEATS = 20  # least number of heartbeats within the timeout
MISSED = 4  # a rank that has missed this many heartbeats counts as stopped
LATE = 0.8  # share of the timeout after which a waiting rank looks for the rank that it waits for
GRACE = 3.0  # seconds that a rank gets to end by itself after its collective has failed
STEP, EXCHANGE, PATIENT = "step", "exchange", "wait"
WAITING = (STEP, EXCHANGE)  # phases in which a rank waits for other ranks, for at most the timeout
PHASES = {"data": "has waited for its data for"}  # an error's words about a rank that holds up the others, by its phase
BLAMED, SIGNAL = "blamed", "signal"
ANSWER = 10.0  # seconds that the store gets to answer
NAMED = 5  # an error names at most this many ranks
_numbers = itertools.count()  # numbers the watchdogs, the same on all ranks, so each has keys of its own in the store


class _Place(NamedTuple):
    """The phase that the main thread of a rank is in, and the time at which it began."""

    phase: str
    since: float


class Beat(NamedTuple):
    """The heartbeat of a rank, which the watchdogs of the other ranks read.

    Attributes:
        number: count of the rank's beats.
        step: step of the run that the rank is at.
        phase: phase that the rank is in.
        seconds: how long the rank has been in this phase.
        process: process and machine of the rank, for a person who looks for them.
    """

    number: int
    step: int
    phase: str
    seconds: float
    process: str


class Watchdog:
    """The watchdog's thread, which writes and reads beats; the main thread tells it the step and the phase.

    Args:
        store: torchrun's store; the thread has a connection of its own.
        rank, size: number of this process, and number of processes.
        timeout: seconds that a collective may take.

    Attributes:
        folder: folder for the stacks of threads; None writes none.
        step: step that the main thread is at.
        diagnosis: text on the ranks that this rank waits for, once they are known.
        interruption: receives the signals that came to other ranks; None if this process does not heed signals.
    """

    interruption: "Interruption | None" = None

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.folder: Path | None = None
        self.step, self.diagnosis = 0, ""
        self.beat = min(BEAT, timeout / BEATS)
        self._store = PrefixStore(f"clipfast/watchdog {next(_numbers)}", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(datetime.timedelta(seconds=ANSWER))
        self._lock = threading.Lock()  # only one thread at a time may use the store
        self._place = _Place("start", time.monotonic())
        self._count, self._diagnosed, self._is_armed = 0, 0, False
        self._blamed: tuple[int, float] | None = None  # the step at which a rank was last blamed, and the time
        self._heard: dict[int, tuple[Beat, float]] = {}  # last beat of each rank, and when it was first read
        self._ended = threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell the watchdog the phase of the main thread while the context lasts."""
        before, self._place = self._place, _Place(name, time.monotonic())
        try:
            yield
        finally:
            self._place = before._replace(since=time.monotonic())

    def arm(self) -> None:
        """Begin to look for stuck ranks. Call it after the first step, for which ranks need very different times."""
        self._is_armed = True

    def close(self) -> None:
        """End the watchdog's thread."""
        self._ended.set()
        self._thread.join(GRACE)

    def explain(self) -> str:
        """Return text on the ranks that this rank waits for, after a look at all beats; "" if they cannot be found.

        The main thread calls it when a collective has failed. All ranks that are alive then write their stacks.
        """
        if self.diagnosis:
            return self.diagnosis
        self._is_armed = False  # the thread no longer looks for stuck ranks, because this function does
        with contextlib.suppress(Exception):  # the store may be lost as well
            self._look()
            time.sleep((MISSED + 1) * self.beat)
            self._look()
            self._diagnose(MISSED * self.beat, self.timeout / 2)
        return self.diagnosis

    def _run(self) -> None:
        """Write beats of this rank and read those of the other ranks, until the watchdog ends."""
        try:
            while not self._ended.wait(self.beat):
                self._say()
                self._watch()
        except Exception as error:
            if not self._ended.is_set():
                log.debug(f"rank {self.rank}: torchrun's store does not answer: {error}")

    def _say(self) -> None:
        """Write a beat of this rank, and read whether any rank is blamed."""
        place, self._count = self._place, self._count + 1
        process = f"process {os.getpid()} on {socket.gethostname()}"
        beat = Beat(self._count, self.step, place.phase, time.monotonic() - place.since, process)
        with self._lock:
            self._store.set(str(self.rank), json.dumps(beat))
            is_blamed = self._store.check([BLAMED])
            if self.interruption is not None:
                self._share_signals(self.interruption)
        if is_blamed:
            self._hear_blame(place)

    def _share_signals(self, interruption: "Interruption") -> None:
        """Report a signal that came to this rank to the other ranks, or read one that came to another rank."""
        if interruption.signum is not None:
            self._store.set(SIGNAL, str(int(interruption.signum)))
        elif self._store.check([SIGNAL]):
            interruption.others = int(self._store.get(SIGNAL))

    def _hear_blame(self, place: _Place) -> None:
        """Write the stacks after a rank was blamed. If this rank is blamed and stays stuck, end this process."""
        with self._lock:
            ranks, step = json.loads(self._store.get(BLAMED))
        # The ranks that wait may be one step further: their hosts run ahead of their GPUs.
        is_mine = self.rank in ranks and step in (self.step, self.step + 1) and place.phase not in WAITING
        now = time.monotonic()
        if self._blamed is None or self._blamed[0] != step:
            self._blamed = step, now
            self._write_stacks()
            if is_mine:
                log.error(f"the others wait for this rank, in the phase {place.phase!r} of step {self.step}")
        elif is_mine and place.since < self._blamed[1] < now - (1 - LATE) * self.timeout - GRACE:
            os._exit(1)

    def _watch(self) -> None:
        """Name the ranks that this rank waits for, shortly before the timeout; after the timeout, end this rank."""
        place = self._place
        waited = time.monotonic() - place.since
        if self.step != self._diagnosed:
            self.diagnosis = ""  # the rank that was stuck has gone on
        if not self._is_armed:
            return
        if place.phase not in WAITING or waited < self.timeout / 2:
            self._heard.clear()
            return
        self._look()
        if waited > LATE * self.timeout and self._diagnose(self.timeout / 5, LATE * self.timeout):
            log.error(f"at step {self.step}, this rank waits: {self.diagnosis}")
        if self.diagnosis and waited > self.timeout + GRACE:  # exit, since a collective of GPUs might never return
            os._exit(1)

    def _look(self) -> None:
        """Read the beats of all ranks from the store."""
        with self._lock:
            values = self._store.multi_get([str(rank) for rank in range(self.size)])
        now = time.monotonic()
        for rank, value in enumerate(values):
            beat = Beat(*json.loads(value))
            if rank not in self._heard or self._heard[rank][0].number != beat.number:
                self._heard[rank] = beat, now

    def _diagnose(self, silence: float, busy: float) -> bool:
        """Find the ranks that hold up this rank, and blame them in the store; return True if they were not known yet.

        Args:
            silence: seconds without a beat after which a rank counts as stopped.
            busy: seconds in a phase of its own after which a rank counts as holding up the others.
        """
        now, others = time.monotonic(), {rank: heard for rank, heard in self._heard.items() if rank != self.rank}
        found = {rank: beat for rank, (beat, since) in others.items() if now - since >= silence}
        if self.diagnosis or not others:
            return False
        if found:
            what = f"{_listed(found, map(_silence, found.values()))}: stopped, or its machine or network is lost"
        else:
            own = (*WAITING, PATIENT)
            found = {r: beat for r, (beat, _) in others.items() if beat.phase not in own and beat.seconds >= busy}
            stacks = f"; {self.folder}/rank_N.txt holds the stacks of rank N" if self.folder else ""
            what = f"{_listed(found, map(_delay, found.values()))}{stacks}"
        if not found:
            return False
        self.diagnosis, self._diagnosed = what, self.step
        with self._lock:
            self._store.set(BLAMED, json.dumps([list(found), self.step]))
        return True

    def _write_stacks(self) -> None:
        """Write the stacks of all threads of this rank to a file."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _silence(beat: Beat) -> str:
    """Return the words about a rank whose heartbeats have stopped, from its last one."""
    return f"{beat.process} gives no sign of life; the last was from step {beat.step}, phase {beat.phase!r}"


def _delay(beat: Beat) -> str:
    """Return the words about a rank that holds up other ranks: its process, its phase, and for how long."""
    what = PHASES.get(beat.phase, f"is in the phase {beat.phase!r} since")
    return f"{beat.process} {what} {beat.seconds:.0f} s at step {beat.step}"


def _listed(ranks: Iterable[int], said: Iterable[str]) -> str:
    """Return one text from a remark on each rank: the remarks on the first few, and the number of further ranks."""
    lines = [f"rank {rank}, {what}" for rank, what in zip(ranks, said, strict=True)]
    more = len(lines) - NAMED
    return "; ".join(lines[:NAMED]) + (f"; and {more} more" if more > 0 else "")


@contextlib.contextmanager
def ended_with_torchrun() -> Iterator[None]:
    """Send this process SIGTERM, after which it saves and ends, if torchrun is killed while the context lasts.

    PR_SET_PDEATHSIG is not used: it would also fire when only a thread of the parent ends, and it would not fire if the
    parent was dead before the call.
    """
    parent, is_over = os.getppid(), threading.Event()

    def watch() -> None:
        """Send SIGTERM to this process as soon as its parent, torchrun, is gone."""
        while not is_over.wait(BEAT):
            if os.getppid() != parent:
                log.error(f"torchrun, process {parent}, is gone: this process stops, as after SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="torchrun", daemon=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
