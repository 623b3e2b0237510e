"""Work that compiles kernels, spread over processes."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Start ``jobs`` processes that compile. Tasks that still wait when the context ends are dropped."""
    # a fork server imports everything once, and its children have no thread of this process and none of its GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__.rpartition(".")[0]])
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def spread(
    function: Callable[[Task], Result], tasks: Sequence[Task], jobs: int | None, doing: str | None = None
) -> Iterator[Result]:
    """Yield the results of ``function`` in the order of the tasks.

    ``jobs`` is the number of processes, by default one for each core; one job stays in this process. ``doing`` is shown
    beside a progress bar; without it there is none, for a caller that prints each result.

    Raises:
        ValueError: ``jobs`` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    wanted = min(jobs or os.cpu_count() or 1, len(tasks))
    if wanted <= 1:
        yield from _progress(map(function, tasks), len(tasks), doing)
        return
    with compilers(wanted) as pool:
        yield from _progress(pool.map(function, tasks), len(tasks), doing)


def _progress(results: Iterable[Result], total: int, doing: str | None) -> Iterable[Result]:
    if doing is None:
        return results
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    bar: Iterable[Result] = tqdm(results, total=total, desc=doing, unit="case", leave=False, disable=None)
    return bar
