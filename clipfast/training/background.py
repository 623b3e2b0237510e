"""Work that is done beside training, one piece at a time."""

import math
import threading
import time
from collections.abc import Callable

PIECE = 0.5  # seconds


def join(thread: threading.Thread, seconds: float = math.inf) -> None:
    """Wait until a thread ends, or for so many seconds.

    It waits in pieces, since a signal that comes just before Python begins to wait is heard only after that.
    """
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(PIECE)


class Background:
    """A thread that does one piece of work at a time.

    It does not keep a process that ends at once: what it was doing is left undone.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin a piece of work, after the one before is done."""
        self.wait()
        self._error = None
        self._thread = threading.Thread(target=self._do, args=(work,), name="clipfast background", daemon=True)
        self._thread.start()

    def wait(self, seconds: float = math.inf) -> Exception | None:
        """Wait until the last piece of work is done, or for so many seconds, and return the error that ended it."""
        if self._thread is not None:
            join(self._thread, seconds)
        return self._error

    @property
    def is_busy(self) -> bool:
        """True while a piece of work is being done."""
        return self._thread is not None and self._thread.is_alive()

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
