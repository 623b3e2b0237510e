"""What ends a run: errors, and signals, after which the step is finished and saved first.

The signals are Ctrl-C, SIGTERM, Slurm's SIGUSR1, and SIGHUP from a terminal that is closed.
"""

import logging
import signal
from collections.abc import Sequence
from types import FrameType

log = logging.getLogger("clipfast")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class TrainingError(RuntimeError):
    """Training cannot go on; the message gives the reason, and the last checkpoint."""


class NotFiniteError(TrainingError):
    """The weights are infinite or NaN: there is nothing worth saving."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)  # from which another process can make it again

    def __str__(self) -> str:
        return "{} not finite at step {}: lower --lr, or set --grad-clip-norm".format(*self.args)


class Interrupted(Exception):  # noqa: N818
    """A signal came in the middle of work that need not be finished, such as an evaluation."""


class Interruption:
    """A context that remembers the first of ``SIGNALS`` in ``signum``; a Ctrl-C after it raises KeyboardInterrupt.

    Other signals after the first one change nothing: a scheduler sends SIGTERM to every process of a job, and torchrun
    passes its own on to the processes that have it already. A SIGHUP that is ignored, as under nohup, stays ignored.

    Args:
        quiet: log nothing, since this is one of several processes, which stop together.

    Attributes:
        others: the signal that came to another process, which tells this one; None if there is none.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signum: int | None = None
        self.others: int | None = None
        self.quiet = quiet

    def __enter__(self) -> "Interruption":
        taken = [signum for signum in SIGNALS if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN]
        self._previous = {signum: signal.signal(signum, self._handle) for signum in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise Interrupted if a signal came to any process."""
        if self.signum is not None or self.others is not None:
            raise Interrupted

    def votes(self) -> list[int]:
        """Return 1 for the signal that came and 0 for each other one; the processes add up their votes."""
        return [int(signum == self.signum) for signum in SIGNALS]

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            if not self.quiet:
                log.info("Stopping after this step; press Ctrl-C to stop at once, without saving.")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt


def elected(votes: Sequence[int]) -> int | None:
    """Return a signal that has votes; None if there is none."""
    return next((int(signum) for signum, count in zip(SIGNALS, votes, strict=True) if count > 0), None)
