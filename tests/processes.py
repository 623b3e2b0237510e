"""Run a function on several processes of this machine that form a gloo process group."""

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Modules that are imported once, in the process from which all ranks are forked.
PRELOAD = [
    "torch.distributed.nn", "clipfast.api", "open_clip", "clipfast.train.trainer", "clipfast.evaluate.encoder",
    "torch.utils.tensorboard", "torchvision.transforms.v2", "pytest", "clipfast.verify", "tests.train.distributed",
]  # fmt: skip


def start_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, folder: Path, collective_s: float = 60.0
) -> list[multiprocessing.context.ForkServerProcess]:
    """Start ``fn(rank, *args)`` on each rank of a new group.

    Args:
        fn: a function of a module that a new process can import.
        world_size: number of processes.
        args: further arguments, which are pickled.
        folder: an empty folder, for the files by which the processes find each other, and their results.
        collective_s: seconds that a collective may take before it fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    arguments = (fn, world_size, folder, collective_s, args)
    processes = [context.Process(target=_run, args=(rank, *arguments), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, folder: Path, timeout: float = 60.0, **options: Any
) -> list[Any]:
    """Run ``fn(rank, *args)`` on each rank of a new group, and return the results by rank.

    A result is anything that ``torch.load`` reads with ``weights_only``.

    Args:
        timeout: seconds after which the processes are killed.
        options: ``collective_s`` of :func:`start_ranks`, which describes the other arguments as well.

    Raises:
        RuntimeError: a rank failed, with its traceback, or did not end in time.
    """
    processes = start_ranks(fn, world_size, *args, folder=folder, **options)
    wait_for(processes, timeout)
    codes = [process.exitcode for process in processes]
    if any(codes):
        errors = [error_of(folder, rank) for rank in range(world_size)]
        raise RuntimeError(f"processes ended with the exit codes {codes}\n" + "\n".join(filter(None, errors)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def wait_for(processes: Sequence[multiprocessing.context.ForkServerProcess], timeout: float) -> None:
    """Wait until all processes have ended, and kill those that have not after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def error_of(folder: Path, rank: int) -> str:
    """Return the traceback with which ``rank`` ended; an empty string if it did not fail."""
    path = folder / f"{rank}.err"
    return f"rank {rank}: {path.read_text()}" if path.exists() else ""


def _run(
    rank: int, fn: Callable[..., Any], world_size: int, folder: Path, collective_s: float, args: tuple[Any, ...]
) -> None:
    """Run a function as one rank of a process group, and save its result or its error in the folder."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_s),
        )
        torch.save(fn(rank, *args), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.err").write_text(traceback.format_exc())
        # The process ends at once: a normal exit could wait for the other ranks.
        os._exit(1)
