"""Everything that a GPU can tell, in one command: ``make gpu``.

Steps run in the order of their value, each in a process of its own with an end, so that a stop at any moment leaves
what came before. Needs PyTorch, Triton and pytest, and neither a network nor an installation. Everything lands in one
folder, in few files; the summary is written again after each step and printed last.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkout import ROOT, link_packages

TOTAL_S = 470
PARTS = {
    "all": {"tests": "", "op": "", "bench": "ops", "tune": "all"},
    "loss": {"tests": "contrastive", "op": "contrastive_loss", "bench": "loss", "tune": "contrastive"},
    "attention": {"tests": "attention", "op": "attention", "bench": "attention", "tune": "attention-64"},
    "blocks": {"tests": "patch", "op": "patch_embed", "bench": "patch", "tune": "patch_embed"},
    "step": {"tests": "", "op": "", "bench": "step", "tune": ""},
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One process: what it shows, its command, how long it may take, and where its words go."""

    name: str
    command: list[str]
    seconds: float
    log: str


def steps(part: str, out: Path, *, dry: bool) -> list[Step]:
    """The steps of ``part``, the most valuable first.

    Args:
        part: a key of :data:`PARTS`.
        out: folder for the results.
        dry: on a CPU, with the smallest sizes: shows that every step runs.
    """
    chosen = PARTS[part]
    python = [sys.executable, "-P", "-m"]
    device = ["--device", "cpu", "--smoke"] if dry else ["--device", "cuda", "--seconds", "4"]
    only = ["-k", "checkers" if dry else chosen["tests"]] if dry or chosen["tests"] else []
    bench = [*python, "clipfast.bench"]
    found = [
        Step("environment", [*python, "clipfast.bench.gpu_environment", str(out / "environment.json")], 60, "log.txt"),
        Step(
            "tests",
            [*python, "pytest", "tests/kernels", "-p", "no:cacheprovider", "-q", "--tb=short", *_workers(dry), *only],
            170,
            "tests.txt",
        ),
    ]
    verify = [sys.executable, "-P", "-m", "clipfast.cli", "verify", "--json", str(out / "verify.json")]
    verify += (["--op", chosen["op"]] if chosen["op"] else []) + (["--quick"] if dry or part == "all" else [])
    if part != "step":
        found.append(Step("verify", verify, 100, "verify.txt"))
        ops = ["all" if dry and part == "all" else chosen["bench"], *device, "--no-plots"]
        found.append(Step("ops", [*bench, *ops, "--json", str(out / "bench-ops.json")], 130, "log.txt"))
    if part in ("all", "step"):
        found.append(
            Step(
                "steps", [*bench, "step", *device, "--no-plots", "--json", str(out / "bench-step.json")], 90, "log.txt"
            )
        )
    if chosen["tune"]:
        tune = [*bench, "tune", "--op", "attention-64" if dry else chosen["tune"]]
        tune += ["--dry", "--limit", "3"] if dry else ["--card", "", "--limit", "48", "--seconds", "3"]
        found.append(Step("tune", tune, 120, "tune.txt"))
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    found.append(
        Step(
            "sanitizer",
            [*sanitizer, *python, "pytest", "tests/kernels/test_gpu.py", "-q", "-k", "finite"],
            90,
            "log.txt",
        )
    )
    return found


def main() -> int:
    """Run the steps; 0 if everything that ran is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, smallest sizes: shows that every step runs")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = link_packages(ROOT / "build" / "site")
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    if args.dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return run_steps(steps(args.part, out, dry=args.dry), out, environment)


def run_steps(todo: list[Step], out: Path, environment: dict[str, str], total_s: float = TOTAL_S) -> int:
    """Run ``todo`` in order while ``total_s`` last; one that fails or hangs does not keep the others from running."""
    start = time.monotonic()
    done: list[dict[str, Any]] = []
    try:
        for step in todo:
            left = total_s - (time.monotonic() - start)
            print(f"[{time.monotonic() - start:4.0f} s] {step.name}", flush=True)
            done.append(_run(step, out, environment, min(step.seconds, left)))
            summarise(done, out)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept")
    print((out / "summary.txt").read_text() if done else "nothing was done")
    return 0 if done and all(step["result"] in ("ok", "not here") for step in done) else 1


def _run(step: Step, out: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    start = time.monotonic()
    if seconds < 5:
        return {"step": step.name, "result": "no time left", "seconds": 0.0}
    with (out / step.log).open("a") as log:
        log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        log.flush()
        try:
            # a session of its own: what a step has started is stopped with it
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except FileNotFoundError:
            return {"step": step.name, "result": "not here", "seconds": 0.0}
        try:
            code = process.wait(timeout=seconds)
            result = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"step": step.name, "result": result, "seconds": round(time.monotonic() - start, 1)}


def summarise(done: list[dict[str, Any]], out: Path) -> None:
    """Write summary.txt: what each step came to, and the tables of what was timed."""
    lines = [f"{entry['step']:12} {entry['result']:20} {entry['seconds']:6.1f} s" for entry in done]
    readers: dict[str, Callable[[Path], list[str]]] = {
        "tests.txt": lambda path: path.read_text(errors="replace").strip().splitlines()[-1:],
        "verify.txt": lambda path: path.read_text(errors="replace").strip().splitlines()[-6:],
        "bench-ops.json": _tables,
        "bench-step.json": _tables,
        "tune.txt": lambda path: path.read_text(errors="replace").strip().splitlines()[-12:],
    }
    for name, read in readers.items():
        if (out / name).exists():
            lines += ["", f"-- {name}", *read(out / name)]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def _tables(path: Path) -> list[str]:
    # what imports PyTorch is imported only where it is needed: this process has to survive anything
    script = (
        "import json, sys; from clipfast.bench.tables import case_table\n"
        "for case in json.load(open(sys.argv[1]))['cases']: print(case_table(case) + '\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build" / "site")}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script, str(path)], env=environment, capture_output=True, text=True
    )
    return (run.stdout or run.stderr).splitlines()


def _workers(dry: bool) -> list[str]:
    """pytest-xdist where it is installed: most of the time goes into compiling kernels, on the host."""
    found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0
    return ["-n", str(min(2 if dry else 12, os.cpu_count() or 1))] if found else []


if __name__ == "__main__":
    sys.exit(main())
