"""Functions run on several processes that form a gloo process group."""

import datetime
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
# What one collective may take. The others of a rank that died must notice sooner.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


def start_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, folder: Path
) -> list[multiprocessing.context.ForkServerProcess]:
    """Start ``fn(rank, *args)``, a function of a test module, on each rank of a group."""
    # a process finds the test modules by the path that it is given
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    # imported once, not by every process
    context.set_forkserver_preload(["torch.distributed.nn", "clipfast", "open_clip"])
    arguments = (fn, world_size, folder, args)
    processes = [context.Process(target=_run, args=(rank, *arguments), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, folder: Path, timeout: float = 60.0) -> list[Any]:
    """What ``fn(rank, *args)`` returns on each rank.

    Raises:
        AssertionError: a rank failed, with its traceback, or did not end in time.
    """
    processes = start_ranks(fn, world_size, *args, folder=folder)
    wait_for(processes, timeout)
    codes = [process.exitcode for process in processes]
    errors = [error_of(folder, rank) for rank in range(world_size)]
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(filter(None, errors))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def wait_for(processes: list[multiprocessing.context.ForkServerProcess], timeout: float) -> None:
    """Wait until all have ended; what has not by then is killed, and keeps the exit code -9."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def error_of(folder: Path, rank: int) -> str:
    """The traceback that ``rank`` ended with, if it did."""
    path = folder / f"{rank}.err"
    return f"rank {rank}: {path.read_text()}" if path.exists() else ""


def _run(rank: int, fn: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        torch.save(fn(rank, *args), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.err").write_text(traceback.format_exc())
        # at once: a normal exit could wait for the other ranks
        os._exit(1)
