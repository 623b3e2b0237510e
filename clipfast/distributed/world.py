"""The processes that train one model together: the processes that torchrun or srun started, or a single one.

Numbers that control the run, such as signals to stop, are exchanged over a process group of the hosts (gloo) and not
over that of the GPUs: a host that reads such a number from its GPU would wait for all work of the GPU.
"""

import contextlib
import dataclasses
import datetime
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .watchdog import ANSWER, EXCHANGE, PATIENT, Watchdog, ended_with_torchrun

PATIENCE = 600.0  # seconds for long waits: at the start, and for work of rank 0
INDEXING = 7 * 24 * 3600.0  # seconds that the first pass over a large data set may take
LAST_WORD = 2.0  # seconds that other ranks delay their end, so torchrun finds the rank that failed first
COMMUNICATION = ("gloo", "NCCL", "nccl")  # words in errors of collectives, which have no type of their own
FAILED = "clipfast/failed"  # the store's key with the rank that failed first

T = TypeVar("T")


@dataclasses.dataclass
class World:
    """This process's view of the processes that train together: its rank, their number, and their communication.

    Attributes:
        rank, size: number of this process, and number of processes.
        local_rank, local_size: number of this process on its machine, and number of processes on it.
        timeout: seconds that a collective may take after the first step.
        hosts: process group of the hosts (gloo); None if there is one process.
        watchdog: names the ranks that hold up the others; None if there is one process.
        patient: a group like ``hosts`` for barriers after long work, with a long timeout of its own: in a barrier only
            rank 0 uses the timeout of the call; the other ranks use the timeout of the group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = PATIENCE
    hosts: "dist.ProcessGroup | None" = None
    watchdog: Watchdog | None = None
    patient: "dist.ProcessGroup | None" = None
    _shared: BaseException | None = dataclasses.field(default=None, init=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one process that writes to the run's folder."""
        return self.rank == 0

    def device(self, name: str, *, by_rank: bool = True) -> torch.device:
        """Return the device of this rank for the value of ``--device``.

        Args:
            name: value of ``--device``.
            by_rank: give each process of a machine the GPU with its local rank, and not the first visible GPU.

        Raises:
            ValueError: the device is unknown, or there are fewer GPUs than processes on this machine.
        """
        device = torch.device(resolve_device(name))
        if self.size == 1 or device.type != "cuda":
            return device
        if ":" in name:
            raise ValueError(f"--device {name} with {self.size} processes: give --device cuda, and each takes its own")
        if not by_rank:
            return torch.device("cuda", 0)
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there is no GPU for process {self.local_rank + 1} of this machine, which has "
                f"{torch.cuda.device_count()}: start as many processes by --nproc-per-node, use --device cpu, or give "
                "--no-set-device-rank if each process sees only its own"
            )
        return torch.device("cuda", self.local_rank)

    def for_thread(self) -> "World":
        """Return a world of the same processes with a process group of its own, for a thread that runs beside training.

        All ranks must call it together. The watchdog does not watch that group.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=max(PATIENCE, self.timeout)))
        return dataclasses.replace(self, hosts=group, patient=group, watchdog=None)

    def phase(self, name: str, step: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context for work for which other ranks may have to wait; the watchdog learns its name.

        Args:
            name: name of the phase.
            step: step of the run, if it has changed.
        """
        if self.watchdog is None:
            return contextlib.nullcontext()
        self.watchdog.step = self.watchdog.step if step is None else step
        return self.watchdog.phase(name)

    def write_to(self, folder: Path) -> None:
        """Let the watchdog write the stacks of all ranks to ``folder`` when a rank is stuck."""
        if self.watchdog is not None:
            self.watchdog.folder = folder

    def settle(self) -> None:
        """Apply ``timeout`` to all collectives of the ranks from now on; the first step has more time."""
        self.meet()
        for group in (None, self.hosts) if self.size > 1 else ():
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=self.timeout), group)
        if self.watchdog is not None:
            self.watchdog.arm()

    def meet(self, seconds: float = PATIENCE) -> None:
        """Wait at a barrier until all ranks are there, for longer than other collectives may take."""
        if self.size > 1:
            with self.phase(PATIENT):
                dist.monitored_barrier(self.patient, datetime.timedelta(seconds=max(seconds, self.timeout)))

    @contextlib.contextmanager
    def local_first(self) -> Iterator[None]:
        """Let one rank of each machine do the work of the context first; the other ranks then find its results."""
        if self.local_rank > 0:
            self.meet(INDEXING)
        yield
        if self.local_rank == 0:
            self.meet(INDEXING)

    def sum(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise sums of the values of all ranks."""
        tensor = torch.tensor(values)
        if self.size > 1:
            with self.phase(EXCHANGE):
                dist.all_reduce(tensor, group=self.hosts)
        return tensor.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks, on the device that trains."""
        if self.size > 1:
            values = values.clone()
            with self.phase(EXCHANGE):
                dist.all_reduce(values)
        return values / self.size

    def gather(self, value: T) -> list[T]:
        """Gather the values of all ranks in a list on rank 0; return an empty list on other ranks."""
        if self.size == 1:
            return [value]
        everyones: list[Any] | None = [None] * self.size if self.is_main else None
        with self.phase(EXCHANGE):
            dist.gather_object(value, everyones, group=self.hosts, group_dst=0)
        return everyones or []

    def on_main(self, work: Callable[[], T], seconds: float = PATIENCE) -> T:
        """Call ``work`` on rank 0 and return its result on all ranks, which wait for at most ``seconds``.

        Raises:
            Exception: the error that ``work`` raised, on all ranks.
        """
        if self.size == 1:
            return work()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                with self.phase("work of rank 0"):
                    found[0] = work()
            except Exception as error:
                found[1] = _portable(error)
        self.meet(seconds)
        with self.phase(EXCHANGE):
            dist.broadcast_object_list(found, group=self.hosts, group_src=0)
        if found[1] is not None:
            self._shared = found[1]
            raise found[1]
        result: T = found[0]
        return result

    def agree(self, work: Callable[[], object]) -> None:
        """Call ``work`` on all ranks, and raise on all ranks if it fails on any; ranks may need different times.

        Raises:
            Exception: the error of the first rank on which ``work`` failed, on all ranks.
        """
        error = None
        try:
            work()
        except Exception as raised:
            error = _portable(raised)
        self.meet()
        everyones = [found for found in self.gather(error) if found is not None]

        def fail() -> None:
            """Raise the error of the first rank that failed."""
            if everyones:
                raise everyones[0]

        self.on_main(fail)

    def is_shared(self, error: BaseException) -> bool:
        """Return True if all ranks raised ``error`` at the same place, so they can still communicate."""
        return self.size == 1 or error is self._shared

    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers to all ranks: without ``--use-bn-sync``, BatchNorm's statistics differ."""
        with self.phase(EXCHANGE):
            for buffer in model.buffers() if self.size > 1 else ():
                dist.broadcast(buffer, 0)

    def _is_first_to_fail(self) -> bool:
        """Return True on the rank that failed first, and on every rank if the store is lost."""
        try:
            store = dist.distributed_c10d._get_default_store()
            mine = str(self.rank)
            return bool(store.compare_set(FAILED, "", mine) == mine.encode())
        except Exception:
            return True


ALONE = World()


class LateSum:
    """Asynchronous sums over the ranks: a call returns the sums of the previous call, so no rank waits for another."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, values: Sequence[int]) -> list[int]:
        """Start to sum the values of all ranks, and return the previous call's sums; for one process, return values."""
        if self.world.size == 1:
            return list(values)
        before = self.close() or [0] * len(values)
        tensor = torch.tensor(values)
        self._pending = dist.all_reduce(tensor, group=self.world.hosts, async_op=True), tensor
        return before

    def close(self) -> list[int] | None:
        """Wait for the sums of the last call, and return them; None if there are none, or they were returned."""
        if self._pending is None:
            return None
        (work, tensor), self._pending = self._pending, None
        with self.world.phase(EXCHANGE):
            work.wait()
        return tensor.tolist()


@contextlib.contextmanager
def joined(device: str, timeout: float, *, by_rank: bool = True) -> Iterator[World]:
    """Initialize the process groups of the processes that torchrun or srun started, and destroy them at the end.

    Without torchrun and srun, the context yields a world of one process. Only the rank that fails first reports why.

    Args:
        device: value of ``--device``.
        timeout: seconds that a collective may take after the first step.
        by_rank: see :meth:`World.device`.

    Raises:
        ValueError: ``device`` cannot be used, or the processes of srun have no address to connect to.
    """
    with ended_with_torchrun():
        yield from _joined(device, timeout, by_rank)


def _joined(device: str, timeout: float, by_rank: bool) -> Iterator[World]:
    """Join the process group of the other ranks while the context lasts."""
    rank, size, local_rank, local_size = _places(os.environ)
    if size == 1:
        yield ALONE
        return
    world = World(rank, size, local_rank, local_size, timeout)
    own = world.device(device, by_rank=by_rank)
    is_ours = not dist.is_initialized()
    if is_ours:
        on_gpu = own.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(own)
        first = datetime.timedelta(seconds=max(PATIENCE, timeout))
        place: dict[str, Any] = {"rank": rank, "world_size": size}
        store = _store(world, first)
        if store is not None:
            place["store"] = store
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=first, device_id=own if on_gpu else None, **place)
    world.hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=max(PATIENCE, timeout)))
    world.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=INDEXING))
    world.watchdog = watchdog = Watchdog(dist.distributed_c10d._get_default_store(), rank, size, timeout)
    try:
        yield world
    except Exception as error:
        with _ignoring_sigterm():
            is_lost = any(name in str(error) for name in COMMUNICATION)
            if not (is_lost and watchdog.diagnosis) and not world._is_first_to_fail():
                time.sleep(LAST_WORD)
                raise SystemExit(1) from None
            if world.is_shared(error):
                raise
            if is_lost:
                raise RuntimeError(f"rank {rank}: another rank is lost: {watchdog.explain() or error}") from error
            raise RuntimeError(f"rank {rank}: {error}") from error
    finally:
        watchdog.close()
        if is_ours:
            dist.destroy_process_group()


@contextlib.contextmanager
def _ignoring_sigterm() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends when a rank is lost: the other ranks need seconds to name the lost one."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _places(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Return rank, world size, local rank and local world size from torchrun's or srun's environment, or (0, 1, 0, 1).

    Raises:
        ValueError: srun started several processes, but no address for them to connect to is set.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(environment):
        rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", 1))
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1:
        return 0, 1, 0, 1
    missing = {"MASTER_ADDR", "MASTER_PORT"} - set(environment)
    if missing:
        raise ValueError(
            f"srun started {size} processes, and {' and '.join(sorted(missing))} is not set: export MASTER_ADDR as the "
            "name of the first node, and MASTER_PORT as a port that is free there"
        )
    machines: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):  # for example 4(x3),2
        count, _, times = part.rstrip(")").partition("(x")
        machines += [int(count)] * int(times or 1)
    rank, local_rank, machine = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
    return rank, size, local_rank, machines[machine]


def _store(world: World, timeout: datetime.timedelta) -> Store | None:
    """Return the store through which the ranks of torchrun connect to each other; None for PyTorch's default store.

    torchrun's store outlives a restart of the ranks, and would contain the addresses of ended processes. Therefore each
    attempt has a prefix of its own. With several machines its number is always 0, since each machine counts by itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    # The store existed before this process: if it does not answer soon, torchrun is gone.
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=datetime.timedelta(seconds=ANSWER)))
    store.set_timeout(timeout)
    return PrefixStore(f"attempt {restarts() if world.local_size == world.size else 0}", store)


def restarts() -> int:
    """Return how often torchrun has restarted the processes of this machine after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _portable(error: Exception) -> Exception:
    """Return ``error`` if it can be pickled for the other ranks, and otherwise an error with the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
    return error


def resolve_device(name: str) -> str:
    """Return the device for ``--device``: for "auto", "cuda" if there is a GPU, else "cpu"; other names unchanged.

    Raises:
        ValueError: this machine has no such device, or clipfast does not support it.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"clipfast runs on cpu and cuda, not on {name!r}")
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"no GPU for {name!r}: PyTorch finds none that CUDA or ROCm can use; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no GPU for {name!r}: there are {torch.cuda.device_count()}")
    return name
