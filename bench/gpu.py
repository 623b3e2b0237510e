"""Everything that a GPU can tell, in one command: ``make gpu``.

Steps run in the order of their value, each in a process of its own with an end, so that a stop at any moment leaves
what came before; what a step leaves of its time goes to those after it. Needs PyTorch, Triton and pytest, and neither a
network nor an installation. Everything lands in one folder, in at most eight files; the summary is written again after
each step and printed last. In a copy without its history, ``CLIPFAST_COMMIT`` says which commit it is.
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
# What a step may take to end after it was asked to.
GRACE_S = 4.0
# What a bench or the tuner needs for what it has begun.
MARGIN_S = 12.0
# In a command: the seconds in which the step should begin what it does.
LEFT = "{left}"
# For each step, in proportion: all that are chosen take :data:`TOTAL_S` together.
SECONDS = {
    "environment": 60.0,
    "tests": 95.0,
    "verify": 45.0,
    "loss": 75.0,
    "losses": 100.0,
    "attention": 50.0,
    "patch": 30.0,
    "blocks": 90.0,
    "step": 40.0,
    "tune": 40.0,
    "sanitizer": 30.0,
}
PARTS: dict[str, dict[str, str]] = {
    "all": {"tests": "", "op": "", "bench": "loss attention patch step", "tune": "all"},
    "loss": {
        "tests": "contrastive or sigmoid or nce",
        "op": "contrastive_loss sigmoid_loss info_nce_loss nt_xent_loss",
        "bench": "losses",
        "tune": "contrastive",
    },
    "attention": {"tests": "attention", "op": "attention", "bench": "attention", "tune": "attention-64"},
    "blocks": {
        "tests": "patch or text or norm or activation or pool",
        "op": "patch_embed text_embed layer_norm layer_norm_pair bias_gelu bias_quick_gelu attention_pool",
        "bench": "patch blocks",
        "tune": "layer_norm-1024 layer_norm_pair-1024 bias_act patch_embed text_embed attention_pool",
    },
    "step": {"tests": "", "op": "", "bench": "step", "tune": ""},
}
# A part has time to tune, and to compile what whole steps are compared with.
PART_SECONDS = {"tune": 150.0, "step": 250.0}
# A CPU, perhaps a busy one, takes longer, and what it shows is not in the time.
DRY_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of what it shows.
        command: its arguments.
        seconds: that it is sure to get.
        lines: of its output that the summary shows, from the end.
        environment: beyond that of the others.
    """

    name: str
    command: list[str]
    seconds: float
    lines: int = 20
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def steps(part: str, out: Path, *, dry: bool) -> list[Step]:
    """The steps of ``part``, the most valuable first; together they end within :data:`TOTAL_S` on a GPU.

    Args:
        part: a key of :data:`PARTS`.
        out: folder for the results.
        dry: on a CPU, with the smallest sizes: shows that every step runs.
    """
    chosen = PARTS[part]
    python = [sys.executable, "-P", "-m"]
    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short", "--maxfail=100"]
    only = ["-k", "checkers" if dry else chosen["tests"]] if dry or chosen["tests"] else []
    verify = [*python, "clipfast.cli", "verify", "--json", str(out / "verify.json")]
    verify += (["--op", *chosen["op"].split()] if chosen["op"] else []) + (["--quick"] if dry or part == "all" else [])
    device = (
        ["--device", "cpu", "--smoke", "--no-memory"]
        if dry
        else ["--device", "cuda", "--seconds", "3", "--total", LEFT]
    )
    tune = [*python, "clipfast.bench", "tune", "--op", *(["attention-64"] if dry else chosen["tune"].split())]
    tune += ["--dry", "--limit", "3"] if dry else ["--card", "", "--limit", "48", "--seconds", "3", "--total", LEFT]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    found = {
        "environment": Step("environment", [*python, "clipfast.bench.gpu_environment"], 0),
        "tests": Step("tests", [*pytest, "tests/kernels", *_workers(dry), *only], 0, lines=30),
        "verify": Step("verify", verify, 0),
    }
    for suite in chosen["bench"].split():
        results = ["--json", str(out / f"bench-{suite}.json")]
        # a part for steps has room for three pictures, and the time to compile our model too
        results += [] if part == "step" else ["--no-plots"]
        results += ["--only", "PyTorch", "OpenCLIP", "OpenCLIP compiled"] if suite == "step" and part != "step" else []
        found[suite] = Step(suite, [*python, "clipfast.bench", suite, *device, *results], 0, lines=200)
    if chosen["tune"]:
        found["tune"] = Step("tune", [*tune, "--tables", str(out / "tables")], 0)
    found["sanitizer"] = Step(
        "sanitizer",
        [*sanitizer, *pytest, "tests/kernels/test_gpu.py", "-k", "finite"],
        0,
        # in a cached block, memory past a tensor is another's and no error
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if part == "step":
        del found["verify"]
    seconds = {name: SECONDS[name] if part == "all" else PART_SECONDS.get(name, SECONDS[name]) for name in found}
    share = (DRY_FACTOR if dry else 1.0) * (TOTAL_S - GRACE_S) / sum(seconds.values())
    return [dataclasses.replace(step, seconds=share * seconds[name]) for name, step in found.items()]


def main() -> int:
    """Run the steps; 0 if everything that ran is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, smallest sizes: shows that every step runs")
    args = parser.parse_args()
    out = args.out.resolve()
    clear(out)
    environment = {**environment_with(link_packages(ROOT / "build" / "site")), "PYTHONUNBUFFERED": "1"}
    if args.dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    total_s = (DRY_FACTOR if args.dry else 1.0) * TOTAL_S
    return run_steps(steps(args.part, out, dry=args.dry), out, environment, total_s)


def clear(out: Path) -> None:
    """Make ``out``, without what an earlier run has left there: it would be taken for this one's."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("summary.txt", "log.txt", "verify.json", "bench-*.json", "bench-*.png", "*.tmp"):
        for path in out.glob(pattern):
            path.unlink()
    shutil.rmtree(out / "tables", ignore_errors=True)


def run_steps(todo: list[Step], out: Path, environment: dict[str, str], total_s: float = TOTAL_S) -> int:
    """Run ``todo`` in order while ``total_s`` last; one that fails or hangs does not keep the others from running, and
    an interrupt or SIGTERM ends the running one and keeps what is done.
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
            # a session of its own: what a step has started is stopped with it
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
    """End what the process has started too: by an interrupt, which lets it say what it has, and then for good."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, and so is SIGINT where it was ignored: a step would inherit that."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(dry: bool) -> list[str]:
    """pytest-xdist where it is installed: most of the time goes into compiling kernels, on the host."""
    found = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0
    return ["-n", str(min(2 if dry else 12, os.cpu_count() or 1))] if found else []


if __name__ == "__main__":
    sys.exit(main())
