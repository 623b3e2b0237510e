"""All checks and measurements that need a GPU, in one command: ``python3 -m bench.gpu --out FOLDER``, an hour.

The steps answer questions in the order of their value: do the ops run, are their values right, are the bits the same
each time, can a CUDA graph capture them, how fast are the loss and attention, does the model of the GPU predict these
times. Each step is a process of its own with a time limit, so a stop at any moment leaves the results of the steps
before it. Time that a step does not use goes to the steps after it. A part (``--part``) is a choice of steps for less
than ten minutes. The command needs PyTorch, Triton and pytest, but no network, no installation and no checkout that it
may write to. All results are in one folder: the summary is written again after each step and printed last, and
page.html shows predicted and measured times beside each other. If there is an ``nvidia-smi``, the summary has clocks,
power and throttling during each step. ``--stub`` rehearses the same steps on a machine without a GPU; its figures mean
nothing. In a copy without git history, the environment variable ``CLIPFAST_COMMIT`` names the commit.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from .checkout import ROOT, environment_with, link_packages
from .gpu_samples import described, lines_of, sampled
from .gpu_wheels import wheels

# Seconds that all steps together may take: an hour, or ten minutes for a part, less half a minute for the end.
HOUR_S, PART_S = 3570.0, 570.0
# Seconds that a step may take to end after it was interrupted.
GRACE_S = 4.0
# Seconds that a benchmark or the tuner needs to finish the measurement that it has begun.
MARGIN_S = 12.0
# A placeholder in commands for the seconds after which the step should begin nothing new.
LEFT = "{left}"
# Seconds for each step. Triton takes about 1.3 s to compile a kernel, and the first steps compile more than they run.
SECONDS = {
    "runs": 180.0, "same bits": 60.0, "capture": 60.0, "environment": 60.0, "loss": 300.0, "attention": 240.0,
    "model": 240.0, "step": 480.0, "patch": 120.0, "losses": 300.0, "strips": 240.0, "blocks": 360.0, "tests": 480.0,
    "verify": 420.0, "tune": 420.0, "sanitizer": 150.0, "values": 180.0, "racecheck": 120.0, "kernels": 60.0,
    "page": 60.0,
}  # fmt: skip
# The sizes that the kernels' goals are set for come first, since a benchmark may be stopped at any case.
SHAPES = {
    "loss": ("pairs=32768 embed_dim=512", "pairs=32768 embed_dim=768", "pairs=65536 embed_dim=768"),
    "attention": (
        "batch=256 tokens=50 heads=12 head_dim=64", "batch=256 tokens=77 heads=8 head_dim=64 causal=True",
        "batch=256 tokens=197 heads=12 head_dim=64", "batch=256 tokens=257 heads=16 head_dim=64",
        "batch=256 tokens=577 heads=16 head_dim=64",
    ),
}  # fmt: skip
FIRST = ("runs", "values", "same bits", "capture", "environment")
SPEED = ("loss", "attention", "kernels", "model")
# The steps of each part, the most valuable first. LIMITED has, for some parts, the tests, ops, tuning targets and
# predictions to which the part limits its steps ``tests``, ``verify``, ``tune`` and ``model``.
PARTS: dict[str, tuple[str, ...]] = {
    "all": (*FIRST, *SPEED, "step", "blocks", "tests", "verify", "tune", "sanitizer", "racecheck", "page"),
    "first": (*FIRST, *SPEED, "page"),
    "speed": ("step", "blocks"),
    "checks": ("tests", "verify", "sanitizer", "racecheck"),
    "tune": ("tune",),
    "loss": ("environment", "tests", "verify", "losses", "strips", "tune"),
    "attention": ("environment", "tests", "verify", "attention", "tune"),
    "blocks": ("environment", "tests", "verify", "patch", "blocks", "tune"),
    "step": ("environment", "step", "model", "page"),
}
LIMITED = {
    # The predictions of all ops and steps take several minutes on 2 cores.
    "first": {"model": "contrastive_loss attention"},
    "step": {"model": "model=ViT-B-32 model=ViT-B-16 model=ViT-L-14 model=RN50"},
    "loss": {
        "tests": "contrastive or sigmoid or nce", "tune": "contrastive",
        "op": "contrastive_loss sigmoid_loss info_nce_loss nt_xent_loss",
    },
    "attention": {"tests": "attention", "op": "attention", "tune": "attention-64 attention_sdpa"},
    "blocks": {
        "tests": "patch or text or norm or activation or pool",
        "op": "patch_embed patch_embed_packed text_embed layer_norm bias_gelu bias_quick_gelu attention_pool",
        "tune": "layer_norm-1024 bias_act patch_embed text_embed attention_pool",
    },
}  # fmt: skip
# The files that a GPU run writes in addition to the result file of each of BENCHES.
RESULTS = (
    "summary.txt", "log.txt", "page.html", "samples.csv", "values.json", "kernels.json", "predicted.json",
    "verify.json",
)  # fmt: skip
BENCHES = ("loss", "losses", "strips", "attention", "patch", "blocks", "step")
# All parts but "step" measure only these candidates of a training step, and our own model: these parts lack the time to
# compile our model.
STEP_CANDIDATES = ("--only", "clipfast padded", "clipfast graphed", "PyTorch", "OpenCLIP", "OpenCLIP compiled")
STUB_NOTE = "REHEARSAL on the stub driver: no kernel ran, and no time, error or table here means anything."


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the GPU run: a process with its command and its share of the time."""

    name: str
    command: list[str]
    seconds: float = 0.0  # the time that the step gets, even if other steps exceed their time
    lines: int = 20  # how many of the last lines of its output the summary shows
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # variables that only this step has


@dataclasses.dataclass(frozen=True)
class Done:
    """A step that has ended: name, result, how long it took, and the end of its output."""

    name: str
    result: str
    seconds: float
    lines: list[str]


def steps(part: str, out: Path, total_s: float, *, stub: bool = False) -> list[Step]:
    """Return the steps of ``part``, the most valuable first. Together they take at most ``total_s``.

    With ``stub``, the commands are the same, but tests ignore differences between values, and the tuner writes its
    table to a place where it cannot be mistaken for a real one.
    """
    command = _commands(part, out, stub=stub)
    # With PyTorch's caching allocator, the memory after the end of a tensor is usually allocated too, so the sanitizer
    # would not find an access there.
    environments = {"sanitizer": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
    names = PARTS[part]
    share = min(1.0, (total_s - GRACE_S) / sum(SECONDS[name] for name in names))
    return [
        Step(
            name, command[name], share * SECONDS[name], lines=200 if name in BENCHES else 40 if name == "model" else 25,
            environment=environments.get(name, {}),
        )
        for name in names
    ]  # fmt: skip


def _commands(part: str, out: Path, *, stub: bool) -> dict[str, list[str]]:
    """Return the command of every step of the GPU run."""
    python = [sys.executable, "-P", "-m"]
    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short", "--maxfail=100"]
    pytest += ["-p", "clipfast.bench.stub.values"] if stub else []
    on_gpu = [*pytest, "tests/kernels/test_gpu.py", "-k"]
    limits = LIMITED.get(part, {})
    only = ["-k", limits["tests"]] if "tests" in limits else ["--deselect", "tests/kernels/test_gpu.py"]
    verify = [*python, "clipfast", "verify", "--json", str(out / "verify.json")]
    of_two = ["--device", "cuda", "--quick", "--op", "contrastive_loss", "attention"]
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    verify += ["--op", *limits["op"].split()] if "op" in limits else ["--quick"] if part == "all" else []
    tables = out / ("tables-of-the-stub" if stub else "tables")
    first = "contrastive attention all"
    tune = [*python, "clipfast.bench", "tune", "--op", *limits.get("tune", first).split(), "--card", ""]
    tune += ["--limit", "48", "--seconds", "3", "--total", LEFT, "--tables", str(tables)]
    predicted = ["--case", *(f"{word} " for word in limits["model"].split())] if "model" in limits else []
    before = PARTS[part][: PARTS[part].index("model")] if "model" in PARTS[part] else ()
    found = {
        "runs": [*on_gpu, "finite", *_workers()],
        "same bits": [*on_gpu, "same_bits", *_workers()],
        "capture": [*on_gpu, "not finite and not same_bits", *_workers()],
        "environment": [*python, "clipfast.bench.gpu_environment"],
        "values": [*python, "clipfast", "verify", *of_two, "--json", str(out / "values.json")],
        "model": [*python, "clipfast", "inspect", "--predict", "--quick", *predicted, "--json",
                  str(out / "predicted.json"), "--against",
                  *(str(out / f"bench-{suite}.json") for suite in before if suite in BENCHES)],
        "tests": [*pytest, "tests/kernels", *_workers(), *only],
        "verify": verify,
        "tune": tune,
        "sanitizer": [*sanitize, "memcheck", *on_gpu, "finite"],
        "racecheck": [*sanitize, "racecheck", *on_gpu, "finite and (contrastive or attention)"],
        "kernels": [*python, "clipfast.bench.gpu_kernels", str(out)],
        "page": [*python, "clipfast.bench.gpu_page", str(out), "--note", STUB_NOTE if stub else ""],
    }  # fmt: skip
    for suite in BENCHES:
        options = ["--device", "cuda", "--seconds", "3", "--total", LEFT, "--json", str(out / f"bench-{suite}.json")]
        options += [word for shape in SHAPES.get(suite, ()) for word in ("--shape", shape)]
        options += STEP_CANDIDATES if suite == "step" and part != "step" else ()
        found[suite] = [*python, "clipfast.bench", suite, *options]
    return found


def main() -> int:
    """Run the steps of the GPU run that the command line asks for, and return 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", default="all", choices=tuple(PARTS), help="a choice of steps (default: all)")
    add("--out", type=Path, help="folder for the results; files of an earlier run in it are removed")
    total = "time of all steps (default: an hour, or ten minutes for a part)"
    add("--total", type=float, metavar="SECONDS", help=total)
    add("--stub", action="store_true", help="rehearse on a machine without a GPU, under a CUDA build of PyTorch")
    add("--wheels", action="store_true", help="only list the packages that one may carry to the machine, and how")
    args = parser.parse_args()
    if args.wheels:
        print(wheels())
        return 0
    if args.out is None:
        parser.error("--out FOLDER is needed: all results go there")
    if not args.stub:
        _need_gpu(parser)
    total_s = args.total or (HOUR_S if args.part == "all" else PART_S)
    out = args.out.resolve()
    clear(out)
    with tempfile.TemporaryDirectory() as scratch:
        environment = surroundings(Path(scratch), stub=args.stub)
        return run_steps(steps(args.part, out, total_s, stub=args.stub), out, environment, total_s, stub=args.stub)


def _need_gpu(parser: argparse.ArgumentParser) -> None:
    """Exit from the GPU run with code 2 before it writes anything if PyTorch, in another process, sees no GPU."""
    code = "import sys, torch; is_here = torch.cuda.is_available() and torch.version.hip is None; "
    code += "sys.exit(None if is_here else 'PyTorch sees no GPU of NVIDIA')"
    asked = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["it died"])[-1]
        parser.error(f"{why} on this machine; --stub (make gpu STUB=1) rehearses the steps without one")


def surroundings(scratch: Path, *, stub: bool = False) -> dict[str, str]:
    """Return the environment variables of all steps of the GPU run.

    Caches and other files go to ``scratch`` if their usual folder is read-only.
    """
    site = ROOT / "build" / "site"
    try:
        link_packages(site)
    except OSError:
        link_packages(site := scratch / "site")
    environment = {**environment_with(site), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if "TRITON_CACHE_DIR" not in environment and not _writable(Path.home() / ".triton" / "cache"):
        environment["TRITON_CACHE_DIR"] = str(scratch / "triton")
    return _on_the_stub(environment) if stub else environment


def _on_the_stub(environment: dict[str, str]) -> dict[str, str]:
    """Return ``environment`` with the variables of the stub driver.

    Another process builds the driver, because this needs PyTorch.
    """
    code = "import json; from clipfast.bench.stub.gpu import gpu_environment; print(json.dumps(gpu_environment()))"
    run = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"bench.gpu: --stub: {run.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


def _writable(folder: Path) -> bool:
    """Return whether the GPU run can make files in ``folder``, or in the nearest folder above it that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)


def clear(out: Path) -> None:
    """Create the folder ``out`` of the GPU run, and remove an earlier run's files, which could be taken for results."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in (*RESULTS, "bench-*.json", "*.tmp"):
        for path in out.glob(pattern):
            path.unlink()
    for folder in ("tables", "tables-of-the-stub"):
        shutil.rmtree(out / folder, ignore_errors=True)


def run_steps(
    todo: list[Step], out: Path, environment: dict[str, str], total_s: float = PART_S, *, stub: bool = False
) -> int:
    """Run the steps ``todo`` of the GPU run in order until ``total_s`` are over; return 0 if none of them has failed.

    A step that fails or hangs does not keep the others from running. An interrupt or SIGTERM ends the running step, and
    the results so far are kept.
    """
    start = time.monotonic()
    done: list[Done] = []
    samples = out / "samples.csv"
    with _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt), sampled(samples):
        for number, step in enumerate(todo):
            left = total_s - (time.monotonic() - start)
            later = sum(other.seconds for other in todo[number + 1 :])
            print(f"[{time.monotonic() - start:4.0f} s] {step.name}", flush=True)
            known = len(lines_of(samples))
            done.append(_run(step, out, environment, min(left, max(step.seconds, left - later))))
            done[-1].lines.extend(filter(None, [described(lines_of(samples)[known:])]))
            summarise(done, out, stub=stub)
            if done[-1].result == "interrupted":
                break
    print((out / "summary.txt").read_text() if done else "nothing was done")
    return 0 if len(done) == len(todo) and all(step.result in ("ok", "not here") for step in done) else 1


def summarise(done: list[Done], out: Path, *, stub: bool = False) -> None:
    """Write summary.txt: the end of each step's output, the refused candidates, and the result of each step.

    With ``stub``, its first and last line say that the run is a rehearsal.
    """
    lines: list[str] = [STUB_NOTE, ""] if stub else []
    for step in done:
        lines += [f"-- {step.name}", *step.lines, ""]
    for path in sorted(out.glob("bench-*.json")):
        for case in json.loads(path.read_text())["cases"]:
            label = f"{case['op']} {case['shape']} {case['dtype']}"
            for candidate in case["candidates"]:
                if reason := candidate["refused"] or candidate["eager"]:
                    word = "refused" if candidate["refused"] else "no CUDA graph"
                    lines.append(f"{word}: {label}: {candidate['name']}: {reason}")
    lines += [f"{step.name:12} {step.result:20} {step.seconds:6.1f} s" for step in done]
    lines += [STUB_NOTE] if stub else []
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def _run(step: Step, out: Path, environment: dict[str, str], seconds: float) -> Done:
    """Run one step of the GPU run within its time limit, and return its result."""
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
            # The step gets a session of its own, so that the processes that it starts can be stopped with it.
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
    """Interrupt a step of the GPU run and its child processes, let them report their results, and then kill them."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turn SIGTERM and SIGINT to the GPU run into a KeyboardInterrupt, also where it runs in the background and would
    ignore SIGINT.
    """

    def interrupt(*_: object) -> None:
        """Interrupt the GPU run."""
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers() -> list[str]:
    """Return pytest's option for several processes if pytest-xdist is installed: compiling takes most of the time."""
    found = importlib.util.find_spec("xdist") is not None
    return ["-n", str(min(12, os.cpu_count() or 1))] if found else []


if __name__ == "__main__":
    sys.exit(main())
