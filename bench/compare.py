"""Compare the speed of this checkout with another commit, the base, by an interval of the ratio of their times; and
the speeds in two result files.

For the checkout, both sides are timed in turns on one machine, by the benchmarks of this checkout: the base side has
kernels/ and clipfast/ of the base commit, and bench/ of this checkout. Each side runs in processes of its own, since
one process cannot register two versions of an op.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfast.io.text import align
from clipfast.io.units import SECONDS, scaled

from . import results, session
from .case import OURS
from .checkout import ROOT, environment_with, link_packages
from .harness import Budget
from .machine import use
from .session import CaseKey
from .tables import sizes

TURNS = 5
TOLERANCE = 1.05
RESAMPLES = 2000  # the number of bootstrap resamples
# Finders of editable installations are removed: they would import a module from this checkout if the base commit lacks
# it.
_START = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_Editable" not in repr(finder)]
from clipfast.bench.compare import main
main()
"""


def compare(base: str, keys: Sequence[CaseKey], device: torch.device, budget: Budget) -> int:
    """Benchmark the commit ``base`` and this checkout on the case of each of ``keys``, and print a verdict for each.

    Each side is timed in several turns, which together take the budget of a case.

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
                runs[side].append(_measure(sides[side], keys, device, budget, out))
    return _verdicts(runs, base)


def ratio_of_processes(base: Sequence[Sequence[float]], head: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return how many times as long ``head`` takes as ``base``: the ratio of medians and the ends of its 95% interval.

    Both are samples in seconds, one list for each process. Processes differ more from one another (memory layout,
    clocks) than the samples of one process. Therefore the bootstrap first draws processes, and then samples of each.
    """
    rng = np.random.default_rng(0)

    def draw(processes: Sequence[Sequence[float]]) -> float:
        """Return the median time over a bootstrap resample of a benchmark's processes and of their samples."""
        chosen = rng.integers(len(processes), size=len(processes))
        return float(np.median([np.median(rng.choice(processes[i], len(processes[i]))) for i in chosen]))

    draws = [draw(head) / draw(base) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    middle = np.median([np.median(p) for p in head]) / np.median([np.median(p) for p in base])
    return float(middle), float(low), float(high)


def verdict(low: float, high: float, throttled: bool) -> str:
    """Return in one word whether the interval of a benchmark's ratio of times means slower, faster or equal."""
    if throttled:
        return "throttled"
    if low > TOLERANCE:
        return "slower"
    if high < 1 / TOLERANCE:
        return "faster"
    return "same" if high <= TOLERANCE and low >= 1 / TOLERANCE else "undecided"


def _verdicts(runs: dict[str, list[dict[str, Any]]], base: str) -> int:
    """Print a verdict on each compared case, and return the exit code of :func:`compare`.

    A case has only our own candidate, since :func:`main` measures no other.
    """
    words = []
    for index, case in enumerate(runs["head"][0]["cases"]):
        turns = {side: [run["cases"][index] for run in side_runs] for side, side_runs in runs.items()}
        samples = {side: [turn["candidates"][0]["samples_s"] for turn in found] for side, found in turns.items()}
        all_turns = [*turns["base"], *turns["head"]]
        refused = [turn["candidates"][0]["refused"] for turn in all_turns if turn["candidates"][0]["refused"]]
        if refused:
            print(f"{_label(case)}: not compared: {refused[0]}")
            continue
        ratio, low, high = ratio_of_processes(samples["base"], samples["head"])
        words.append(verdict(low, high, any(turn["telemetry"]["throttled"] for turn in all_turns)))
        base_s, head_s = (scaled(float(np.median(np.concatenate(samples[side]))), SECONDS) for side in ("base", "head"))
        interval = f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{_label(case)}: {words[-1]}: {head_s} against {base_s} at {base}, {interval}")
    if not words:
        print("not comparable: no case ran on both sides")
        return 2
    return 1 if "slower" in words else 0


def compare_files(before: Path, after: Path) -> int:
    """Print how many times as long each candidate takes in the second result file as in the first, with a verdict.

    Returns:
        0; 1 if a candidate of clipfast is slower by more than 5% beyond doubt; 2 if the files have nothing in common.

    Raises:
        ValueError: a file is no result of a benchmark, or has no samples.
    """
    runs = [results.read(path) for path in (before, after)]
    sides: list[dict[str, Any]] = []
    for run, path in zip(runs, (before, after), strict=True):
        if "cases" not in run:
            raise ValueError(f"{path} has medians only, and no samples to compare")
        pairs = ((case, candidate) for case in run["cases"] for candidate in case["candidates"])
        sides.append({f"{_label(case)}  {one['name']}": (case, one) for case, one in pairs if one["samples_s"]})
    rows, words = [["", "before", "after", "ratio [95%]", ""]], set()
    for name in [name for name in sides[0] if name in sides[1]]:
        cases, (old, new) = zip(*(side[name] for side in sides), strict=True)
        ratio, low, high = ratio_of_processes([old["samples_s"]], [new["samples_s"]])
        word = verdict(low, high, any(case["telemetry"]["throttled"] for case in cases))
        word = word if old["timer"] == new["timer"] else f"not comparable: {old['timer']}, {new['timer']}"
        words |= {word} if new["name"].startswith(OURS) else set()
        times = (scaled(one["median_s"], SECONDS) for one in (old, new))
        rows.append([name, *times, f"{ratio:.3f} [{low:.3f}, {high:.3f}]", word])
    if len(rows) == 1:
        print("not comparable: no case was timed in both files")
        return 2
    print(align(rows, right=(1, 2, 3)))
    for path, names, others in ((before, sides[0], sides[1]), (after, sides[1], sides[0])):
        for name in [name for name in names if name not in others]:
            print(f"only in {path}: {name}")
    for part in ("git", "machine", "versions"):
        for key in runs[0][part] | runs[1][part]:
            values = [run[part].get(key) for run in runs]
            if values[0] != values[1]:
                print(f"{part} {key}: {values[0]} before, {values[1]} after")
    return 1 if "slower" in words else 0


def _label(case: dict[str, Any]) -> str:
    """Return the op, the sizes and the dtype of a benchmark case in one line."""
    return f"{case['op']} {sizes(case)} {case['dtype']}"


def _measure(site: Path, keys: Sequence[CaseKey], device: torch.device, budget: Budget, out: Path) -> dict[str, Any]:
    """Measure the cases on one side of the comparison, base or head, in a process that imports that side's code."""
    share = [budget.seconds / TURNS, budget.rounds, budget.min_rounds]
    request = [keys, str(device), share, torch.get_num_threads()]
    # Without -P, Python would find packages in the current folder before those in ``site``.
    command = [sys.executable, "-P", "-c", _START, json.dumps(request), str(out)]
    run = subprocess.run(command, env=environment_with(site), capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"a side could not be measured: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return results.read(out)


@contextmanager
def _worktree(base: str, folder: Path) -> Iterator[Path]:
    """Yield a temporary git worktree of the commit ``base`` to benchmark."""
    command = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*command, "add", "--detach", str(folder), base], capture_output=True, text=True)
    if added.returncode != 0:
        raise ValueError(f"--compare {base}: no such commit here: {added.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*command, "remove", "--force", str(folder)], capture_output=True, check=False)


def main() -> None:
    """Measure one turn of one side of a benchmark's comparison of commits."""
    (keys, device, budget, threads), out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(threads)
    off = {"memory": False, "breakdown": False}
    session.measure_all(keys, use(torch.device(device)), Budget(*budget), out, only=[], **off)
