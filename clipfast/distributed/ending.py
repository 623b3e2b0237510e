"""The end of a run by errors and signals. After a signal, the run finishes its step and saves a checkpoint first.

The signals are SIGINT from Ctrl-C, SIGTERM, Slurm's SIGUSR1, and SIGHUP from a closed terminal.
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
    """Training ends without a checkpoint, since the weights are infinite or NaN."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)  # the arguments from which pickle can make this error again in another process

    def __str__(self) -> str:
        return "{} not finite at step {}: lower --lr, or set --grad-clip-norm".format(*self.args)


class Interrupted(Exception):  # noqa: N818
    """Raised if a signal came during work that need not be finished, such as an evaluation."""


class Interruption:
    """A context that remembers the first of ``SIGNALS`` in ``signum``; a later Ctrl-C raises KeyboardInterrupt.

    Other signals after the first one change nothing: a scheduler sends SIGTERM to every process of a job, and torchrun
    then sends it again to its processes, which have received it already. If SIGHUP is ignored, as under nohup, it stays
    ignored.

    Args:
        quiet: do not log the signal, because this is one of several processes that stop together.

    Attributes:
        others: a signal that came to another process and was reported to this one; None if there is none.
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
        """Raise ``Interrupted`` if a signal came to this or another process of the run."""
        if self.signum is not None or self.others is not None:
            raise Interrupted

    def votes(self) -> list[int]:
        """Return a vote for each of ``SIGNALS``: 1 for the signal that came, else 0. The ranks sum up their votes."""
        return [int(signum == self.signum) for signum in SIGNALS]

    def _handle(self, signum: int, _: FrameType | None) -> None:
        """Note the first signal, after which all ranks of the run end; a second Ctrl-C ends this process at once."""
        if self.signum is None:
            self.signum = signum
            if not self.quiet:
                log.info("Stopping after this step; press Ctrl-C to stop at once, without saving.")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt


def elected(votes: Sequence[int]) -> int | None:
    """Return the signal that some rank voted for; None if there are no votes."""
    return next((int(signum) for signum, count in zip(SIGNALS, votes, strict=True) if count > 0), None)
