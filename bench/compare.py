"""Is this checkout slower than another commit? Both are timed in turns on the same machine, and judged by an interval.

The same benchmarks measure both: the base gives its kernels and its model layer, this checkout gives bench/. Each side
runs in processes of its own, since two versions of an op cannot be registered in one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import results
from .case import OURS
from .checkout import ROOT, environment_with, link_packages
from .harness import Budget
from .machine import use
from .suites import Shape
from .tables import seconds

TURNS = 5
TOLERANCE = 1.05
# An editable installation would fill in what a side lacks from this checkout.
_START = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_Editable" not in repr(finder)]
from clipfast.bench.compare import main
main()
"""


def compare(base: str, plan: Sequence[tuple[str, Shape, str]], device: torch.device, budget: Budget) -> int:
    """Time ``base`` and this checkout on each case of ``plan`` and print a verdict for each.

    Returns:
        0; 1 if a case is slower by more than 5% beyond doubt; 2 if nothing could be compared.

    Raises:
        ValueError: ``base`` is no commit of this checkout.
    """
    with tempfile.TemporaryDirectory() as scratch, _worktree(base, Path(scratch) / "base") as base_root:
        sides = {
            "base": link_packages(Path(scratch) / "site-base", base_root, bench=ROOT / "bench"),
            "head": link_packages(Path(scratch) / "site-head"),
        }
        runs: dict[str, list[dict[str, Any]]] = {"base": [], "head": []}
        for turn in range(TURNS):
            for side in ("base", "head") if turn % 2 == 0 else ("head", "base"):
                print(f"turn {turn + 1} of {TURNS}: {side}", file=sys.stderr)
                out = Path(scratch) / f"{side}-{turn}.json"
                runs[side].append(_measure(sides[side], plan, device, budget, out))
    return _verdicts(runs, base)


def ratio_of_processes(
    base: Sequence[Sequence[float]], head: Sequence[Sequence[float]], resamples: int = 2000
) -> tuple[float, float, float]:
    """How many times as long ``head`` takes: each holds the samples of several processes.

    Processes differ more from one another than samples within one (memory layout, clocks), so the bootstrap draws
    processes first, and then samples inside them.

    Returns:
        (ratio of medians, low, high), the interval at 95%.
    """
    rng = np.random.default_rng(0)

    def draw(processes: Sequence[Sequence[float]]) -> float:
        chosen = rng.integers(len(processes), size=len(processes))
        return float(np.median([np.median(rng.choice(processes[i], len(processes[i]))) for i in chosen]))

    draws = [draw(head) / draw(base) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    middle = np.median([np.median(p) for p in head]) / np.median([np.median(p) for p in base])
    return float(middle), float(low), float(high)


def verdict(low: float, high: float, throttled: bool) -> str:
    """What an interval of the ratio says."""
    if throttled:
        return "throttled"
    if low > TOLERANCE:
        return "slower"
    if high < 1 / TOLERANCE:
        return "faster"
    return "same" if high <= TOLERANCE and low >= 1 / TOLERANCE else "undecided"


def _verdicts(runs: dict[str, list[dict[str, Any]]], base: str) -> int:
    if len({json.dumps(run["machine"], sort_keys=True) for side in runs.values() for run in side}) > 1:
        print("not comparable: the machine changed between turns")
        return 2
    slower = compared = 0
    for index, case in enumerate(runs["head"][0]["cases"]):
        shape = " ".join(f"{key}={value}" for key, value in case["shape"].items())
        label = f"{case['op']} {shape} {case['dtype']}"
        cases = {side: [run["cases"][index] for run in side_runs] for side, side_runs in runs.items()}
        samples = {side: [_our_samples(c) for c in entries] for side, entries in cases.items()}
        refused = [_ours(c)["refused"] for entries in cases.values() for c in entries if _ours(c)["refused"]]
        if refused:
            print(f"{label}: not compared: {refused[0]}")
            continue
        compared += 1
        ratio, low, high = ratio_of_processes(samples["base"], samples["head"])
        throttled = any(c["telemetry"]["throttled"] for entries in cases.values() for c in entries)
        word = verdict(low, high, throttled)
        slower += word == "slower"
        base_s, head_s = (float(np.median(np.concatenate(samples[side]))) for side in ("base", "head"))
        print(
            f"{label}: {word}: {seconds(head_s)} against {seconds(base_s)} at {base}, "
            f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}]"
        )
    if not compared:
        print("not comparable: no case ran on both sides")
        return 2
    return 1 if slower else 0


def _ours(case: dict[str, Any]) -> dict[str, Any]:
    return next(candidate for candidate in case["candidates"] if candidate["name"] == OURS)


def _our_samples(case: dict[str, Any]) -> list[float]:
    samples: list[float] = _ours(case)["samples_s"]
    return samples


def _measure(
    site: Path, plan: Iterable[tuple[str, Shape, str]], device: torch.device, budget: Budget, out: Path
) -> dict[str, Any]:
    request = {
        "plan": [[suite, dict(shape), dtype] for suite, shape, dtype in plan],
        "device": str(device),
        "budget": [budget.seconds / TURNS, budget.rounds, budget.min_rounds],
        "threads": torch.get_num_threads(),
    }
    # -P: the current folder must not come before the side's own packages
    command = [sys.executable, "-P", "-c", _START, json.dumps(request), str(out)]
    run = subprocess.run(command, env=environment_with(site), capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"a side could not be measured: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return results.read(out)


@contextmanager
def _worktree(base: str, folder: Path) -> Iterator[Path]:
    command = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*command, "add", "--detach", str(folder), base], capture_output=True, text=True)
    if added.returncode != 0:
        raise ValueError(f"--compare {base}: no such commit here: {added.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*command, "remove", "--force", str(folder)], capture_output=True, check=False)


def main() -> None:
    """One turn of one side, described on the command line."""
    from .session import measure_all

    request, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(request["threads"])
    plan = [(suite, shape, dtype) for suite, shape, dtype in request["plan"]]
    budget = Budget(*request["budget"])
    device = use(torch.device(request["device"]))
    measure_all(plan, device, budget, out, only=[], memory=False, breakdown=False, plots=False)
