"""Data workers: processes that read and decode batches ahead, how they end, and what is said when one is lost."""

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

PREFETCH = 2  # batches that each data worker makes ahead
PATIENCE = 2.0  # seconds in which a worker ends whose pipe broke
GRACE = 1.0  # seconds that data workers have at the end for the batches that they make
MAX_INTERRUPTIONS = 3  # by PyTorch's reports of a dead worker
PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies

T = TypeVar("T")


class _Reporting(Dataset[T | ValueError | DiskFullError]):
    """Batches, or the error that a batch ends with: PyTorch would wrap one that a worker raised into a traceback."""

    def __init__(self, batches: Dataset[T]) -> None:
        self.batches = batches

    def __getitem__(self, number: Any) -> T | ValueError | DiskFullError:
        try:
            return self.batches[number]
        except DiskFullError as error:
            return DiskFullError(str(error))
        except ValueError as error:  # of any kind, which another process may not be able to make again
            return ValueError(str(error))


@contextlib.contextmanager
def made_by_workers(
    batches: Dataset[T], numbers: Sequence[Any], workers: int, *, pin_memory: bool = False
) -> Iterator[Iterator[T]]:
    """Start processes that make batches; in the context these come in order. At its end the processes are told to end.

    Those that have not ended after a moment are killed.

    Args:
        batches: of which each element is a batch.
        numbers: of the elements, in order.
        workers: how many processes; 0 for none but this one.
        pin_memory: copy tensors into memory from which a GPU reads without waiting.

    Raises:
        ValueError: a worker died, in whichever way the context met its loss first; or an error of a batch.
        DiskFullError: an error of a batch.
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
        # Tracebacks keep an iterator alive, and its workers would then wait at the end of the process.
        if workers:
            _end_workers(iterator)


def _unchanged(batch: T) -> T:
    """Return a batch as it is; PyTorch would look through everything in it for arrays to convert."""
    return batch


def _unless_error(batches: Iterator[T | ValueError | DiskFullError]) -> Iterator[T]:
    """Yield batches, and raise the first error that stands in the place of one."""
    for batch in batches:
        if isinstance(batch, (ValueError, DiskFullError)):
            raise batch
        yield batch


def _end_workers(iterator: Any) -> None:
    """End the data workers of an iterator; those that are still busy after ``GRACE`` seconds are killed."""
    # PyTorch ends its own thread first, which must not read what a killed worker has half written. Then it waits for
    # up to ten seconds for each worker in turn; that is over as soon as all of them are killed.
    killer = threading.Timer(GRACE, lambda: [worker.kill() for worker in iterator._workers])
    # PyTorch reports a dead worker by an error at any moment, even here, and has ended the others then.
    with contextlib.suppress(RuntimeError):
        killer.start()
        iterator._shutdown_workers()
    killer.cancel()
    for worker in iterator._workers:  # such an error came before PyTorch had waited for all of them
        with contextlib.suppress(RuntimeError):
            worker.kill()
            worker.join(GRACE)


def _first_death(workers: Sequence[BaseProcess]) -> str | None:
    """Say how the first of the processes that have died did so; None if there is none.

    A worker that has nothing left to do ends with status 0, which is no death.
    """
    if not workers:
        return None
    by_sentinel = {worker.sentinel: worker for worker in workers}
    for _ in range(MAX_INTERRUPTIONS):
        with contextlib.suppress(RuntimeError):  # PyTorch's own report, which may come now
            ended = wait(list(by_sentinel), timeout=PATIENCE)  # its pipes break before it has ended
            code = next((code for one in ended if (code := by_sentinel[one].exitcode) != 0), 0)  # type: ignore[index]
            if code == 0:
                return None
            if code is None:  # PyTorch's report came while the status was read, which can be done only once
                return "it has ended, and its status is lost"
            return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"
    return "it has ended"


def _start_worker(_: int) -> None:
    # A terminal or a job scheduler sends these signals to every process. The process that started this one decides when
    # to stop, and needs batches until then. A second SIGTERM ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))
    # A process that is killed tells its workers nothing. On Linux, the kernel can.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
