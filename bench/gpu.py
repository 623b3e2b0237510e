"""Everything that a GPU can tell, in one command: ``make gpu``.

The steps run in the order of their value, each in a process of its own with a time limit, so a stop at any moment
leaves the results of the steps before it. Time that a step does not use goes to the steps after it. The command needs
PyTorch, Triton and pytest, but no network and no installation. All results are in one folder, in at most eight files;
the summary is written again after each step and printed last. In a copy without git history, the environment variable
``CLIPFAST_COMMIT`` names the commit.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from .checkout import ROOT, environment_with, link_packages
from .gpu_summary import Done, cache_entries, summarise

TOTAL_S = 470.0
# Seconds that a step may take to end after it was interrupted.
GRACE_S = 4.0
# Seconds that a benchmark or the tuner needs to finish what it has begun.
MARGIN_S = 12.0
# A placeholder in commands for the seconds after which the step should begin nothing new.
LEFT = "{left}"
# Time of each step, in proportion: all chosen steps together take :data:`TOTAL_S`.
SECONDS = {
    "environment": 60.0, "tests": 95.0, "verify": 45.0, "loss": 75.0, "losses": 100.0, "attention": 50.0,
    "patch": 30.0, "blocks": 90.0, "step": 40.0, "tune": 40.0, "sanitizer": 30.0,
}  # fmt: skip
PARTS: dict[str, dict[str, str]] = {
    "all": {"tests": "", "op": "", "bench": "loss attention patch step", "tune": "all"},
    "loss": {
        "tests": "contrastive or sigmoid or nce", "bench": "losses", "tune": "contrastive",
        "op": "contrastive_loss sigmoid_loss info_nce_loss nt_xent_loss",
    },
    "attention": {"tests": "attention", "op": "attention", "bench": "attention", "tune": "attention-64"},
    "blocks": {
        "tests": "patch or text or norm or activation or pool", "bench": "patch blocks",
        "op": "patch_embed text_embed layer_norm layer_norm_pair bias_gelu bias_quick_gelu attention_pool",
        "tune": "layer_norm-1024 layer_norm_pair-1024 bias_act patch_embed text_embed attention_pool",
    },
    "step": {"tests": "", "op": "", "bench": "step", "tune": ""},
}  # fmt: skip
# A part has more time to tune, and to compile the models that whole steps are compared with.
PART_SECONDS = {"tune": 150.0, "step": 250.0}
# A dry run shows that every step runs, and not how fast. A CPU, perhaps a busy one, takes longer.
DRY_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    command: list[str]
    seconds: float = 0.0  # that it gets in any case
    lines: int = 20  # of the end of its output, for the summary
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # variables that only this step has


def steps(part: str, out: Path, *, dry: bool) -> list[Step]:
    """Return the steps of ``part``, the most valuable first. Together they take at most :data:`TOTAL_S` on a GPU."""
    chosen = PARTS[part]
    python = [sys.executable, "-P", "-m"]
    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short", "--maxfail=100"]
    only = ["-k", "checkers" if dry else chosen["tests"]] if dry or chosen["tests"] else []
    verify = [*python, "clipfast.cli", "verify", "--json", str(out / "verify.json")]
    verify += (["--op", *chosen["op"].split()] if chosen["op"] else []) + (["--quick"] if dry or part == "all" else [])
    on_gpu, on_cpu = (["--device", "cuda", "--seconds", "3", "--total"], ["--device", "cpu", "--smoke", "--no-memory"])
    device = on_cpu if dry else [*on_gpu, LEFT]
    tune = [*python, "clipfast.bench", "tune", "--op", *(["attention-64"] if dry else chosen["tune"].split())]
    tune += ["--dry", "--limit", "3"] if dry else ["--card", "", "--limit", "48", "--seconds", "3", "--total", LEFT]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    found = [
        Step("environment", [*python, "clipfast.bench.gpu_environment"]),
        Step("tests", [*pytest, "tests/kernels", *_workers(dry), *only], lines=30),
        *([] if part == "step" else [Step("verify", verify)]),
    ]
    for suite in chosen["bench"].split():
        results = ["--json", str(out / f"bench-{suite}.json")]
        # the part "step" has room for three pictures, and the time to compile our model too
        results += [] if part == "step" else ["--no-plots"]
        results += ["--only", "PyTorch", "OpenCLIP", "OpenCLIP compiled"] if suite == "step" and part != "step" else []
        found.append(Step(suite, [*python, "clipfast.bench", suite, *device, *results], lines=200))
    if chosen["tune"]:
        found.append(Step("tune", [*tune, "--tables", str(out / "tables")]))
    # without the cache: memory behind a tensor in a cached block is allocated too, so an overrun would be no error
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*sanitizer, *pytest, "tests/kernels/test_gpu.py", "-k", "finite"]
    found.append(Step("sanitizer", command, environment=uncached))
    weights = SECONDS if part == "all" else SECONDS | PART_SECONDS
    share = (DRY_FACTOR if dry else 1.0) * (TOTAL_S - GRACE_S) / sum(weights[step.name] for step in found)
    return [dataclasses.replace(step, seconds=share * weights[step.name]) for step in found]


def main() -> int:
    """Run the steps that the command line asks for, and return 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="run small sizes on a CPU, to show that every step runs")
    args = parser.parse_args()
    out = args.out.resolve()
    clear(out)
    environment = {**environment_with(link_packages(ROOT / "build" / "site")), "PYTHONUNBUFFERED": "1"}
    if args.dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    total_s = (DRY_FACTOR if args.dry else 1.0) * TOTAL_S
    return run_steps(steps(args.part, out, dry=args.dry), out, environment, total_s)


def clear(out: Path) -> None:
    """Make the folder ``out`` and remove the files of an earlier run, which would be taken for those of this run."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("summary.txt", "log.txt", "verify.json", "bench-*.json", "bench-*.png", "*.tmp"):
        for path in out.glob(pattern):
            path.unlink()
    shutil.rmtree(out / "tables", ignore_errors=True)


def run_steps(todo: list[Step], out: Path, environment: dict[str, str], total_s: float = TOTAL_S) -> int:
    """Run ``todo`` in order until ``total_s`` are over, and return 0 if all of them succeeded or are not here.

    A step that fails or hangs does not keep the others from running. An interrupt or SIGTERM ends the running step, and
    the results so far are kept.
    """
    start = time.monotonic()
    cached = cache_entries(environment)
    done: list[Done] = []
    with _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt):
        for number, step in enumerate(todo):
            left = total_s - (time.monotonic() - start)
            later = sum(other.seconds for other in todo[number + 1 :])
            print(f"[{time.monotonic() - start:4.0f} s] {step.name}", flush=True)
            done.append(_run(step, out, environment, min(left, max(step.seconds, left - later))))
            summarise(done, out, cached, environment)
            if done[-1].result == "interrupted":
                break
    print((out / "summary.txt").read_text() if done else "nothing was done")
    return 0 if len(done) == len(todo) and all(step.result in ("ok", "not here") for step in done) else 1


def _run(step: Step, out: Path, environment: dict[str, str], seconds: float) -> Done:
    start = time.monotonic()
    if seconds < GRACE_S + 1:
        return Done(step.name, "no time left", 0.0, [])
    left = str(max(1, int(seconds - MARGIN_S)))
    command = [left if part == LEFT else part for part in step.command]
    with (out / "log.txt").open("a+", errors="replace") as log:
        log.write(f"\n== {step.name}: {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        try:
            # in a session of its own, so that processes that the step starts can be stopped with it
            process = subprocess.Popen(
                command, cwd=ROOT, env={**environment, **step.environment}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            return Done(step.name, "not here", 0.0, [])
        try:
            code = process.wait(timeout=seconds - GRACE_S)
            result = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds - GRACE_S:.0f} s"
        except KeyboardInterrupt:
            result = "interrupted"
        finally:
            _end(process)
        log.seek(begin)
        lines = log.read().rstrip().splitlines()
    for scratch in out.glob("*.tmp"):
        scratch.unlink()
    return Done(step.name, result, round(time.monotonic() - start, 1), lines[-step.lines :])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and all that it has started, so that they can report what they have; then kill them."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turn SIGTERM, and SIGINT, which a shell lets programs in its background ignore, into a KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(dry: bool) -> list[str]:
    """Return pytest's option for several processes if pytest-xdist is installed: compiling takes most of the time."""
    found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0
    return ["-n", str(min(2 if dry else 12, os.cpu_count() or 1))] if found else []


if __name__ == "__main__":
    sys.exit(main())
