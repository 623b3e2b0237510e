"""What a run really allocates, multiplies and sends, to hold the formulas to.

Where there is no GPU, the path of the GPU can be gone through as well: everything is allocated and sent as it would be,
and kernels are recorded in place of being run.
"""

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import contrastive_loss, distributed_contrastive_loss
from ..kernels.contrastive import contrastive
from ..kernels.contrastive.softmax_stats import Normalizers
from ..kernels.launch import Launch, record_launches
from .formulas import Problem

CPU, RECORDED, CUDA = "cpu", "recorded", "cuda"
# A thread of gloo may hold a block for a moment after it has been waited for.
SETTLE_S = 0.01
TIMEOUT_S = 300.0
LOGIT_SCALE = 14.3


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of the rank that has most of it: peak bytes beyond its features, FLOPs, bytes and messages sent.

    ``flops`` is None where kernels did not run, or ran where they are not seen.
    """

    peak_bytes: int
    flops: tuple[int, int] | None
    sent: tuple[int, int]
    messages: int


class Ledger(TorchDispatchMode):
    """Bytes of tensors that are alive, FLOPs of products, and what is handed to ``torch.distributed``.

    Args:
        inputs: tensors that were there before and do not count.
        launches: recorded launches of kernels, which are counted and let go: they would keep what they were given.
    """

    def __init__(self, inputs: Sequence[Tensor] = (), launches: list[Launch] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = [] if launches is None else launches
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.flops = self.sent = self.messages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and book it."""
        self.recorded.clear()
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            sent, messages = _handed_over(name, args)
            self.sent, self.messages = self.sent + sent, self.messages + messages
        elif name in ("mm", "addmm", "addmm_"):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._book(tensor.untyped_storage())
        if self._alive() > self.peak:
            time.sleep(SETTLE_S)
            self.peak = max(self.peak, self._alive())
        return out

    def _book(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.inputs and storage._cdata not in self.alive:
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _alive(self) -> int:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())


def _handed_over(name: str, args: Sequence[Any]) -> tuple[int, int]:
    """Bytes and messages that this rank sends for a call of a collective, as ring algorithms send them."""
    rank, others = dist.get_rank(), dist.get_world_size() - 1
    if name in ("_allgather_base_", "allgather_"):
        (given,) = tree_leaves(args[1])
        return others * given.nbytes, others
    if name == "alltoall_base_":
        rows, given = args[4], args[1]
        return given.nbytes * (sum(rows) - rows[rank]) // max(sum(rows), 1), others
    if name == "reduce_":
        return (0, 0) if args[3] == rank else (args[0][0].nbytes, 1)
    if name == "scatter_":  # of all ranks, by the root; others give nothing
        given = tree_leaves(args[1])
        return sum(tensor.nbytes for tensor in given) * others // (others + 1), others if given else 0
    if name == "send":
        return args[0][0].nbytes, 1
    if name == "recv_":
        return 0, 0
    raise NotImplementedError(f"bytes that {name} sends")


def measure_rank(problem: Problem, mode: str, path: str) -> Measured:
    """A forward and a backward pass of this rank's pairs, and what they took."""
    device = torch.device("cuda" if path == CUDA else "cpu")
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(problem.rows, problem.embed_dim, generator=generator), dim=-1)
        .to(device, problem.dtype)
        .requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(LOGIT_SCALE, device=device, requires_grad=True)
    if path == CUDA:
        return _measure_on_gpu(image, text, scale, mode)
    # sm_90 is what CPU tensors are recorded for: the number of multiprocessors is then an H100's
    recorder = record_launches(90) if path == RECORDED else contextlib.nullcontext()
    run = _one_process if problem.gpus == 1 else _rank_of_many
    marks = []
    with recorder as launches, Ledger([image, text, scale], launches) as ledger:
        for _ in run(image, text, scale, mode):
            marks.append((ledger.flops, ledger.sent))
    (forward_flops, forward_sent), (both_flops, both_sent) = marks
    counted = None if path == RECORDED else (forward_flops, both_flops - forward_flops)
    return Measured(ledger.peak, counted, (forward_sent, both_sent - forward_sent), ledger.messages)


def _rank_of_many(image: Tensor, text: Tensor, scale: Tensor, mode: str) -> Iterator[None]:
    loss = distributed_contrastive_loss(image, text, scale, mode=mode)
    yield
    loss.backward()
    yield


@torch.no_grad()
def _one_process(image: Tensor, text: Tensor, scale: Tensor, mode: str) -> Iterator[None]:
    # not by the public function, into whose custom ops no dispatch mode sees
    options = 0, True, False, image.dtype
    loss, *saved = contrastive.forward(image, text, scale, *options)
    yield
    normalizers = Normalizers(*saved)
    grads = contrastive.backward(torch.ones_like(loss), image, text, scale, normalizers, *options, mode == "min")
    yield
    del grads


def _measure_on_gpu(image: Tensor, text: Tensor, scale: Tensor, mode: str) -> Measured:
    def call() -> None:
        contrastive_loss(image, text, scale, memory=mode).backward()

    call()  # compiles
    image.grad = text.grad = scale.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Measured(torch.cuda.max_memory_allocated() - before, None, (0, 0), 0)


def measure(problem: Problem, runs: Sequence[tuple[str, str]]) -> list[Measured]:
    """What runs of (path, mode) take, on processes of this machine that form a gloo group.

    Raises:
        RuntimeError: a process failed, or did not end in time.
    """
    if problem.gpus == 1:
        return [measure_rank(problem, mode, path) for path, mode in runs]
    # the processes are forked from one that has imported everything
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as name:
        arguments = problem, runs, Path(name)
        processes = [context.Process(target=_run, args=(r, *arguments), daemon=True) for r in range(problem.gpus)]
        for process in processes:
            process.start()
        _wait(processes, Path(name))
        ranks = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(problem.gpus)]
    return [_most([Measured(**rank[index]) for rank in ranks]) for index in range(len(runs))]


def _most(ranks: Sequence[Measured]) -> Measured:
    def most(values: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return max(value[0] for value in values), max(value[1] for value in values)

    counted = [rank.flops for rank in ranks if rank.flops is not None]
    return Measured(
        max(rank.peak_bytes for rank in ranks),
        most(counted) if counted else None,
        most([rank.sent for rank in ranks]),
        max(rank.messages for rank in ranks),
    )


def _run(rank: int, problem: Problem, runs: Sequence[tuple[str, str]], folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=problem.gpus,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
        found = [dataclasses.asdict(measure_rank(problem, mode, path)) for path, mode in runs]
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.err").write_text(traceback.format_exc())
        raise


def _wait(processes: Sequence[Any], folder: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    if late or any(process.exitcode != 0 for process in processes):
        errors = sorted(path.read_text().strip().splitlines()[-1] for path in folder.glob("*.err"))
        reason = f"{len(late)} of {len(processes)} processes took more than {TIMEOUT_S:.0f} s" if late else "no reason"
        raise RuntimeError(f"the measurement failed: {(errors or [reason])[0]}")
