"""A step of ``bench.gpu``: run each op once, and print a description of this machine and the rates that it reaches."""

import sys
import time

import torch

from clipfast import host
from clipfast.kernels.dtypes import DTYPES

from . import machine
from .harness import Timing, pass_gate
from .suites import SUITES, build


def main() -> int:
    """Run this step of the GPU run: call each op, then print machine and rates; return 1 if an op fails or is wrong."""
    device = machine.use(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found, versions, commit = machine.describe(device), machine.versions(), host.commit()
    print(
        f"{found.get('gpu', found['cpu'])}, {found.get('arch', 'no GPU')}, torch {versions['torch']}, "
        f"triton {versions['triton']}, commit {commit['sha']}{' and changes' if commit['dirty'] else ''}",
        flush=True,
    )
    ops = [name for name, suite in SUITES.items() if suite.op is not None]
    refused = [line for name in ops if (line := smoke(name, device))]
    print(f"machine: {found}\ntelemetry: {machine.telemetry(device)}", flush=True)
    for dtype in ("bf16", "fp32") if device.type == "cuda" else ("fp32",):
        roofs = machine.measure_roofs(device, DTYPES[dtype])
        print(
            f"roofs, {dtype}: copy {roofs['copy_bytes_per_s'] / 1e12:.3g} TB/s, "
            f"products {roofs['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s",
            flush=True,
        )
    if device.type == "cuda":
        sustained = machine.sustained_flops(device, torch.bfloat16)
        print(f"products, bf16, after ten seconds without a pause: {sustained / 1e12:.3g} TFLOP/s", flush=True)
    return 1 if refused else 0


def smoke(suite: str, device: torch.device) -> str | None:
    """Run our op of a benchmark's ``suite`` once in bf16 at the smallest size; return the reason if it is wrong."""
    start = time.perf_counter()
    case = build(suite, SUITES[suite].smallest, "bf16", device)
    timing = Timing(case.ours)
    pass_gate(case, [timing])
    errors = ", ".join(f"{name} off by {error:.1e}" for name, error in timing.errors.items())
    print(f"{case.op}: {timing.refused or f'right ({errors})'}, {time.perf_counter() - start:.1f} s", flush=True)
    return timing.refused


if __name__ == "__main__":
    sys.exit(main())
