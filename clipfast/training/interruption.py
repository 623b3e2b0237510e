"""Ctrl-C, SIGTERM, and SIGHUP from a terminal that is closed: the step is finished and saved first."""

import signal
from types import FrameType

from .logs import log

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """A context that remembers the first of ``SIGNALS`` in ``signum``; a second one raises KeyboardInterrupt.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        taken = [signum for signum in SIGNALS if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN]
        self._previous = {signum: signal.signal(signum, self._handle) for signum in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        log.info("Stopping after this step; interrupt once more to stop at once, without saving.")
