"""Peak memory of one call beyond its inputs; it is measured apart from the timing, which it would slow down.

On a GPU, PyTorch's allocator reports it. On a CPU it is the high-water mark of the memory of a new process, since a
process that has worked before keeps pages. The new process runs ``python -m clipfast.bench.memory``.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from clipfast.host import proc_bytes
from clipfast.verify.context import exact_float32

from .case import AnyFunction, Candidate, Case, call
from .harness import leaves
from .suites import build

TIMEOUT_S = 600


def peak_bytes(case: Case, candidate: Candidate, function: AnyFunction | None = None) -> int:
    """Return the bytes that a call of ``candidate`` needs in addition to its inputs, outputs included.

    ``function`` is the function that the candidate's ``make`` returned. On a CPU a new process calls ``make`` instead.

    Raises:
        RuntimeError: the call fails.
    """
    if case.device.type == "cuda":
        return _peak_on_gpu(case, candidate, function or candidate.make())
    request = json.dumps([case.suite, dict(case.shape), case.dtype, candidate.name, torch.get_num_threads()])
    command = [sys.executable, "-m", "clipfast.bench.memory", request]
    # With this variable, freed tensors return to the system at once (mallopt(3)), so resident memory is memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=environment)
    except subprocess.CalledProcessError as error:
        raise RuntimeError((error.stderr.strip().splitlines() or [str(error)])[-1]) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"stopped after {TIMEOUT_S} s") from error
    return int(run.stdout)


@exact_float32()
def _peak_on_gpu(case: Case, candidate: Candidate, function: AnyFunction) -> int:
    """Measure a call's peak memory on a GPU by PyTorch's allocator."""
    inputs = leaves(case, case.inputs())
    if hasattr(function, "forget"):
        # A replay allocates nothing. So the second call captures a graph again, which holds the memory of a step.
        function.forget()
    call(case, candidate, function, inputs)  # libraries allocate their workspaces now, outside of the measurement
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    kept = call(case, candidate, function, inputs)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(case.device) - before
    del kept
    return peak


def _peak_on_cpu(case: Case, candidate: Candidate) -> int:
    """Measure a call's peak memory on a CPU, in this new process."""
    inputs = leaves(case, case.inputs())
    function = candidate.make()
    call(case, candidate, function, inputs)  # threads, libraries and compilers allocate during this call
    return growth(lambda: call(case, candidate, function, inputs))


def growth(function: Callable[[], object]) -> int:
    """Return the bytes that a measured call adds to the resident memory of this process, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 to clear_refs resets the peak of resident memory that Linux reports (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = proc_bytes("self/status", "VmRSS")
    kept = function()
    peak = proc_bytes("self/status", "VmHWM") - before
    del kept
    return peak


def main() -> None:
    """Print the bytes that the benchmarked call on the command line needs: see :func:`peak_bytes`."""
    suite, shape, dtype, name, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = build(suite, shape, dtype, torch.device("cpu"))
    (candidate,) = (c for c in case.candidates if c.name == name)
    print(_peak_on_cpu(case, candidate))


if __name__ == "__main__":
    main()
