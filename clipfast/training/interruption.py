"""Ctrl-C and SIGTERM: the step is finished and saved first."""

import signal
from types import FrameType

from .logs import log


class Interruption:
    """A context that remembers the first SIGINT or SIGTERM in ``signum``; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        log.info("Stopping after this step; interrupt once more to stop at once, without saving.")
