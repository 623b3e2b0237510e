"""Who holds up the others: a thread of each rank tells the others where the rank is, and names one that is stuck.

A collective that fails says how long it waited, and not for whom. So each rank writes a beat into torchrun's store
every second: a count, the step, and the phase, which says whether it waits for others or they wait for it. A rank that
has waited for most of ``--dist-timeout`` looks at the beats of all. One whose beats have stopped was stopped itself, or
its machine is lost. One that is in a phase of its own, such as "data", is what the others wait for. Every other rank
names it in its error, and all ranks that still can write the stacks of their threads into the run's folder.
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
BEAT = 1.0  # seconds between two beats; less if the timeout is short
BEATS = 20  # at least so many fit into the timeout
MISSED = 4  # so many beats that did not come are a rank that has stopped
LATE = 0.8  # share of the timeout after which a rank that waits looks for whom
GRACE = 3.0  # seconds that a rank has to end by itself once its collective has failed
STEP, EXCHANGE, PATIENT = "step", "exchange", "wait"
WAITING = (STEP, EXCHANGE)  # in which a rank waits for others for at most the timeout
PHASES = {"data": "has waited for its data for"}  # what is said of a rank that others wait for
BLAMED, SIGNAL = "blamed", "signal"
ANSWER = 10.0  # seconds that the store has to answer
NAMED = 5  # ranks that are named
_numbers = itertools.count()  # of the watchdogs of this process, which are made on all ranks alike


class _Place(NamedTuple):
    """Where the main thread of a rank is."""

    phase: str
    since: float


class Beat(NamedTuple):
    """What a rank says of itself.

    Attributes:
        number: of its beats.
        step: that it is at.
        phase: that it is in.
        seconds: for how long.
        process: and machine, for a person who looks for them.
    """

    number: int
    step: int
    phase: str
    seconds: float
    process: str


class Watchdog:
    """The thread that writes and reads beats; the main thread tells it the step and the phase.

    Args:
        store: of the processes; the thread has a connection of its own.
        rank, size: number of this process, and how many there are.
        timeout: seconds that a collective may take.

    Attributes:
        folder: for the stacks; None writes none.
        step: that the main thread is at.
        diagnosis: who holds up this rank, once that is known.
        interruption: of this process, which hears of signals that came to others; None if it heeds none.
    """

    interruption: "Interruption | None" = None

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.folder: Path | None = None
        self.step, self.diagnosis = 0, ""
        self.beat = min(BEAT, timeout / BEATS)
        self._store = PrefixStore(f"clipfast/watchdog {next(_numbers)}", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(datetime.timedelta(seconds=ANSWER))
        self._lock = threading.Lock()  # the store must not be asked by two threads at a time
        self._place = _Place("start", time.monotonic())
        self._count, self._diagnosed, self._is_armed = 0, 0, False
        self._blamed: tuple[int, float] | None = None  # at which step some rank was last, and since when
        self._heard: dict[int, tuple[Beat, float]] = {}  # the last beat of each rank, and when it was new
        self._ended = threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of the main thread within the context."""
        before, self._place = self._place, _Place(name, time.monotonic())
        try:
            yield
        finally:
            self._place = before._replace(since=time.monotonic())

    def arm(self) -> None:
        """Look for a rank that is stuck from now on: before the first step, some may take much longer than others."""
        self._is_armed = True

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(GRACE)

    def explain(self) -> str:
        """Return who holds up this rank, after a look at the beats of all; "" if that is not to be seen.

        To be called by the main thread when a collective has failed. All ranks that still live write their stacks.
        """
        if self.diagnosis:
            return self.diagnosis
        self._is_armed = False  # the thread looks no more
        with contextlib.suppress(Exception):  # the store may be lost as well
            self._look()
            time.sleep((MISSED + 1) * self.beat)
            self._look()
            self._diagnose(MISSED * self.beat, self.timeout / 2)
        return self.diagnosis

    def _run(self) -> None:
        try:
            while not self._ended.wait(self.beat):
                self._say()
                self._watch()
        except Exception as error:
            if not self._ended.is_set():
                log.debug(f"rank {self.rank}: torchrun's store does not answer: {error}")

    def _say(self) -> None:
        """Write a beat, and hear whether a rank is blamed."""
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
        """Tell the others of a signal that came to this rank, or hear of one that came to another."""
        if interruption.signum is not None:
            self._store.set(SIGNAL, str(int(interruption.signum)))
        elif self._store.check([SIGNAL]):
            interruption.others = int(self._store.get(SIGNAL))

    def _hear_blame(self, place: _Place) -> None:
        """Write the stacks; if the others wait for this rank, and still do so later, end it."""
        with self._lock:
            ranks, step = json.loads(self._store.get(BLAMED))
        # The host of a GPU that waits may have begun the next step.
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
            self.diagnosis = ""  # whoever it was went on
        if not self._is_armed:
            return
        if place.phase not in WAITING or waited < self.timeout / 2:
            self._heard.clear()
            return
        self._look()
        if waited > LATE * self.timeout and self._diagnose(self.timeout / 5, LATE * self.timeout):
            log.error(f"at step {self.step}, this rank waits: {self.diagnosis}")
        if self.diagnosis and waited > self.timeout + GRACE:  # a collective of GPUs does not return
            os._exit(1)

    def _look(self) -> None:
        """Read the beats of all ranks."""
        with self._lock:
            values = self._store.multi_get([str(rank) for rank in range(self.size)])
        now = time.monotonic()
        for rank, value in enumerate(values):
            beat = Beat(*json.loads(value))
            if rank not in self._heard or self._heard[rank][0].number != beat.number:
                self._heard[rank] = beat, now

    def _diagnose(self, silence: float, busy: float) -> bool:
        """Find out who holds up this rank, and let all ranks know; return True if that is news.

        Args:
            silence: seconds after which a rank that says nothing has stopped.
            busy: seconds after which a rank that is in a phase of its own holds up the others.
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
        """Write the stacks of all threads to a file of this rank."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _silence(beat: Beat) -> str:
    return f"{beat.process} gives no sign of life; the last was from step {beat.step}, phase {beat.phase!r}"


def _delay(beat: Beat) -> str:
    what = PHASES.get(beat.phase, f"is in the phase {beat.phase!r} since")
    return f"{beat.process} {what} {beat.seconds:.0f} s at step {beat.step}"


def _listed(ranks: Iterable[int], said: Iterable[str]) -> str:
    """Return one text from a remark on each rank: the first few remarks, and the number of the others."""
    lines = [f"rank {rank}, {what}" for rank, what in zip(ranks, said, strict=True)]
    more = len(lines) - NAMED
    return "; ".join(lines[:NAMED]) + (f"; and {more} more" if more > 0 else "")


@contextlib.contextmanager
def ended_with_torchrun() -> Iterator[None]:
    """End this process as SIGTERM does, which saves, if torchrun ends before the context does: it was killed.

    The system's own signal at a parent's death would come for the death of a thread too, and not for a parent that was
    dead before it was asked for.
    """
    parent, is_over = os.getppid(), threading.Event()

    def watch() -> None:
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
