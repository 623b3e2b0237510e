"""A step of ``bench.gpu``: the time of each kernel of an op, by PyTorch's profiler.

``bench.gpu_page`` shows these times beside those that the model of the GPU predicts.

``python -m clipfast.bench.gpu_kernels FOLDER`` runs the ops whose benchmarks have been written to the folder.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from clipfast.io.files import replace_text
from clipfast.io.units import SECONDS, scaled
from clipfast.kernels.spec import specs

from .case import Case, call, short
from .harness import leaves
from .inspection.forecast import label
from .machine import synchronize, use
from .suites import build

WARM_UP, CALLS = 3, 10
KERNELS = "kernels.json"  # the file that the step writes
OTHERS = "PyTorch"  # the name under which the kernels of PyTorch are added up
OURS = {kernel for spec in specs().values() for kernel in spec.kernels}


def per_call(events: Iterable[tuple[str, float]], calls: int) -> dict[str, float]:
    """Return the seconds of one call by kernel, from names and microseconds of the device's work in ``calls`` calls."""
    seconds: dict[str, float] = defaultdict(float)
    for name, microseconds in events:
        seconds[name if name in OURS else OTHERS] += 1e-6 * microseconds / calls
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def kernel_times(case: Case) -> dict[str, float]:
    """Return the seconds of each kernel in a call of our op, forward and backward.

    Raises:
        RuntimeError: the profiler saw no work of the device.
    """
    function = case.ours.make()
    inputs = leaves(case, case.inputs())
    for _ in range(WARM_UP):
        call(case, case.ours, function, inputs)
    synchronize(case.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call(case, case.ours, function, inputs)
        synchronize(case.device)
    events = [(e.name, e.device_time_total) for e in profiler.events() if e.device_type.name == "CUDA"]
    if not events:
        raise RuntimeError("the profiler saw no work of the device (CUPTI may not be allowed here)")
    return per_call(events, CALLS)


def main() -> int:
    """Time the kernels of our op in each benchmarked case, and return 1 if one of them could not be timed."""
    parser = argparse.ArgumentParser("python -m clipfast.bench.gpu_kernels", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of results of bench.gpu")
    folder = parser.parse_args().folder
    device, failed = use(torch.device("cuda")), 0
    found: dict[str, dict[str, float]] = {}
    for path in (folder / f"bench-{suite}.json" for suite in ("loss", "attention")):
        for one in json.loads(path.read_text())["cases"] if path.exists() else ():
            name = label(one["op"].removesuffix(".fwd_bwd"), one["shape"], one["dtype"])
            try:
                found[name] = kernel_times(build(one["suite"], one["shape"], one["dtype"], device))
            except Exception as error:
                failed += 1
                print(f"{name}: {short(error)}", flush=True)
                continue
            times = (f"  {kernel}: {scaled(seconds, SECONDS)}" for kernel, seconds in found[name].items())
            print(name, *times, sep="\n", flush=True)
            replace_text(folder / KERNELS, json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
