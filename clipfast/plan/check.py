"""Formulas beside what a run on this machine took."""

import dataclasses

import torch

from .formulas import Problem, flops, memory, traffic
from .measure import CPU, CUDA, RECORDED, Measured, measure
from .scratch import CpuScratch, GpuScratch, Scratch

# Small tensors are not in the formulas; a wrong one is off by more.
TOLERANCE = 0.03
MOST_PROCESSES = 8
MOST_PAIRS = 16384
# Of the card that kernels are recorded for.
RECORDED_ARCH = 90


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one mode: predicted and measured, in ``unit``."""

    path: str
    mode: str
    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 where both are nothing."""
        if self.predicted == 0:
            return 1.0 if self.measured == 0 else float("inf")
        return self.measured / self.predicted

    @property
    def agrees(self) -> bool:
        """Whether the formula holds: memory but for small tensors, anything else exactly."""
        return abs(self.ratio - 1) <= (TOLERANCE if self.what == "memory" else 0)


def check(problem: Problem) -> list[Row]:
    """Run each mode on this machine, each path that it has, and put the figures beside the formulas.

    One GPU is measured by its allocator, where there is one. Otherwise the CPU path is run, and that of an H100 gone
    through with its kernels recorded, on gloo processes if there are several ranks.

    Raises:
        ValueError: a problem that is too large for processes of one machine.
        RuntimeError: a process failed.
    """
    if problem.gpus > MOST_PROCESSES:
        raise ValueError(
            f"--check starts a process for each GPU: --gpus must be at most {MOST_PROCESSES}, got {problem.gpus}"
        )
    if problem.total > MOST_PAIRS:
        raise ValueError(
            f"--check runs the loss on this machine: --pairs must be at most {MOST_PAIRS}, got {problem.total}"
        )
    paths = (CUDA,) if problem.gpus == 1 and torch.cuda.is_available() else (CPU, RECORDED)
    runs = [(path, mode) for path in paths for mode in problem.modes]
    found = measure(problem, runs)
    return [row for run, measured in zip(runs, found, strict=True) for row in _rows(problem, *run, measured)]


def scratch_of(problem: Problem, path: str) -> Scratch:
    """What the blocks of a path hold for a while."""
    if path == CPU:
        return CpuScratch(problem.embed_dim, problem.dtype)
    if path == RECORDED:
        from ..kernels.contrastive.triton_blocks import RECORDED_MULTIPROCESSORS

        return GpuScratch(problem.embed_dim, problem.dtype, RECORDED_ARCH, RECORDED_MULTIPROCESSORS)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = 10 * properties.major + properties.minor
    return GpuScratch(problem.embed_dim, problem.dtype, arch, properties.multi_processor_count)


def _rows(problem: Problem, path: str, mode: str, measured: Measured) -> list[Row]:
    peak = memory(problem, mode, scratch_of(problem, path))
    rows = [Row(path, mode, "memory", "bytes", peak.total, measured.peak_bytes)]
    if measured.flops is not None:
        rows.append(Row(path, mode, "FLOPs", "FLOPs", sum(flops(problem, mode)), sum(measured.flops)))
    if problem.gpus > 1:
        exchanges = traffic(problem, mode)
        for index, when in enumerate(("forward", "backward")):
            sent = sum(exchange.bytes for exchange in exchanges if exchange.when == when)
            rows.append(Row(path, mode, f"sent {when}", "bytes", sent, measured.sent[index]))
        messages = sum(exchange.messages for exchange in exchanges)
        rows.append(Row(path, mode, "messages", "", messages, measured.messages))
    return rows
