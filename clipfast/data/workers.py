"""Starts and ends data workers, the processes that read and decode batches ahead, and reports the loss of a worker."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ..io.files import DiskFullError

PREFETCH = 2  # number of batches that each data worker makes ahead
PATIENCE = 2.0  # seconds to wait for the end of a worker whose pipe broke
GRACE = 1.0  # seconds that data workers get at the end to finish their batches
MAX_INTERRUPTIONS = 3  # PyTorch's reports of a dead worker may interrupt the cleanup this often
PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies

T = TypeVar("T")


class _Reporting(Dataset[T | ValueError | DiskFullError]):
    """A dataset of batches that returns errors: raised ones would reach the user as a traceback of a data worker."""

    def __init__(self, batches: Dataset[T]) -> None:
        self.batches = batches

    def __getitem__(self, number: Any) -> T | ValueError | DiskFullError:
        try:
            return self.batches[number]
        except DiskFullError as error:
            return DiskFullError(str(error))
        except ValueError as error:  # a subclass may not survive pickling, so only the message is sent
            return ValueError(str(error))


@contextlib.contextmanager
def made_by_workers(
    batches: Dataset[T], numbers: Sequence[Any], workers: int, *, pin_memory: bool = False
) -> Iterator[Iterator[T]]:
    """Start data workers; the context yields their batches in order. At its end the workers are told to end.

    Workers that have not ended after a moment are killed.

    Args:
        batches: a dataset whose elements are batches.
        numbers: indices of the elements, in order.
        workers: number of processes; with 0, this process makes the batches.
        pin_memory: copy tensors into pinned memory, from which copies to a GPU are asynchronous.

    Raises:
        ValueError: a data worker died, no matter how its loss was noticed; or a batch could not be made.
        DiskFullError: a batch could not be made since the disk is full.
    """
    options: dict[str, Any] = {"pin_memory": pin_memory, "worker_init_fn": _start_worker, "collate_fn": _unchanged}
    options["prefetch_factor"] = PREFETCH if workers else None
    iterator = iter(DataLoader(_Reporting(batches), batch_size=None, sampler=numbers, num_workers=workers, **options))
    try:
        yield _unless_error(iterator)
    except DiskFullError:
        raise
    except (RuntimeError, EOFError, OSError) as error:
        death = _first_death(getattr(iterator, "_workers", ()))
        if death is None:
            raise
        raise ValueError(
            f"a data worker died: {death}; if it ran out of memory, as the system's log would say, use fewer --workers"
        ) from error
    finally:
        # A traceback could keep the iterator and its workers alive. The process would then wait for them when it ends.
        if workers:
            _end_workers(iterator)


def _unchanged(batch: T) -> T:
    """Return a training batch unchanged, in place of PyTorch's conversion, which would look for arrays in all of it."""
    return batch


def _unless_error(batches: Iterator[T | ValueError | DiskFullError]) -> Iterator[T]:
    """Yield the batches of data workers, and raise the first error that was returned in place of a batch."""
    for batch in batches:
        if isinstance(batch, (ValueError, DiskFullError)):
            raise batch
        yield batch


def _end_workers(iterator: Any) -> None:
    """End the data workers of an iterator; those that are still busy after ``GRACE`` seconds are killed."""
    # PyTorch first ends its own thread, which must not read the half-written message of a killed worker. Then it waits
    # for each worker in turn, up to ten seconds; the wait ends as soon as all workers are killed.
    killer = threading.Timer(GRACE, lambda: [worker.kill() for worker in iterator._workers])
    # PyTorch may raise its error about a dead worker at any moment, even here; it has ended the other workers then.
    with contextlib.suppress(RuntimeError):
        killer.start()
        iterator._shutdown_workers()
    killer.cancel()
    for worker in iterator._workers:  # the error may have come before PyTorch had waited for all workers
        with contextlib.suppress(RuntimeError):
            worker.kill()
            worker.join(GRACE)


def _first_death(workers: Sequence[BaseProcess]) -> str | None:
    """Describe how the first dead data worker died; None if none has died.

    A worker that has nothing left to do ends with status 0, which does not count as a death.
    """
    if not workers:
        return None
    by_sentinel = {worker.sentinel: worker for worker in workers}
    for _ in range(MAX_INTERRUPTIONS):
        with contextlib.suppress(RuntimeError):  # PyTorch's signal handler may raise its own error here
            ended = wait(list(by_sentinel), timeout=PATIENCE)  # a worker's pipes break a moment before it has ended
            code = next((code for one in ended if (code := by_sentinel[one].exitcode) != 0), 0)  # type: ignore[index]
            if code == 0:
                return None
            if code is None:  # PyTorch has already read the exit status, which can be read only once
                return "it has ended, and its status is lost"
            return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"
    return "it has ended"


def _start_worker(_: int) -> None:
    """Let a data worker ignore the signals that its parent process handles, and end when the parent dies."""
    # A terminal or a job scheduler sends these signals to every process. The parent process decides when to stop, and
    # needs batches until then. A second SIGTERM ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))
    # A killed process cannot end its workers. On Linux, the kernel can signal them.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
