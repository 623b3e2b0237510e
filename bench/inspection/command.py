"""``clipfast inspect``: report what the compiler made of every kernel on every architecture, without a GPU."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import INTERPRET, Launch

from ..case import short
from . import offline
from .bound import Bound, bound, mma_kinds
from .occupancy import occupancy
from .peer_kernels import installed_cases, record_peer
from .report import Report, differences, explain, table, to_json
from .sass import parse
from .shipped import known_problems, shipped_cases

ARCHS = tuple(ARCHITECTURES)
VERSION = ".".join(triton.__version__.split(".")[:2])
SNAPSHOT = Path(__file__).parents[2] / "tests" / "kernels" / "resources.json"


def inspect_launch(
    launch: Launch, arch: int, *, case: str = "", kernel: str | None = None, half: bool | None = None
) -> Report:
    """Compile a launch from :func:`offline.record`, and report what it takes, what is wrong with it, and its bound.

    ``case`` and ``kernel`` are names for the report; the kernel has its own one by default. ``half`` says whether its
    products have 16-bit operands, and so must use the matrix unit (default: whether any of its tensors has 16 bits).

    Raises:
        triton.CompilationError, RuntimeError: the kernel does not compile.
    """
    if half is None:
        half = any(tensor.dtype.itemsize == 2 for tensor in offline.tensors(launch))
    compiled = offline.compile_kernel(launch, arch)
    multiplies = offline.multiplies(compiled)
    text = offline.disassemble(compiled)
    instructions = parse(text)
    resources = offline.resources(compiled, text)
    warps, specialised = offline.threads(compiled) // 32, "ttg.warp_specialize" in compiled.asm["ttgir"]
    result = bound(instructions, arch, warps, multiplies=multiplies, specialised=specialised)
    return Report(
        case=case, kernel=kernel or launch.kernel.__name__, arch=arch, resources=resources, warps=warps,
        occupancy=occupancy(
            arch, registers=resources.registers, warps=warps, shared_bytes=resources.shared_bytes,
            tmem_columns=resources.tmem_columns,
        ),
        mma=mma_kinds(instructions),
        tma=any(instruction.name.startswith(("UTMALDG", "UTMASTG", "UTMAREDG")) for instruction in instructions),
        bound=result if isinstance(result, Bound) else None, unbounded=result if isinstance(result, str) else "",
        problems=tuple(offline.problems(resources, arch, half=half, multiplies=multiplies)),
    )  # fmt: skip


def inspect_case(arch: int, case: str, *, peer: bool = False) -> list[Report]:
    """Report the launches of a shipped case, or of an installed peer's case.

    Raises:
        Exception: anything that a peer or the compiler raises.
    """
    launches = record_peer(arch, installed_cases()[0][case]) if peer else offline.record(arch, shipped_cases()[case])
    known = () if peer else known_problems(VERSION, arch, case)
    half = True if peer else None  # the inputs of a peer have 16 bits, even where it converts them
    return [
        dataclasses.replace(inspect_launch(launch, arch, case=case, kernel=key, half=half), known=known, peer=peer)
        for key, launch in offline.named(launches).items()
    ]


def inspect_all(
    archs: Sequence[int] = ARCHS, *, substring: str = "", peers: bool = False, jobs: int | None = None
) -> tuple[list[Report], list[str]]:
    """Report all shipped kernels, and with ``peers`` those of installed peers, in the cases that contain ``substring``.

    Returns:
        The reports, in order, and a line for each peer that is not installed or does not compile.

    Raises:
        ValueError: an architecture is unknown, no case matches, or ``jobs`` is below 1.
        RuntimeError: the kernels are interpreted, or a shipped one does not compile.
    """
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled: unset it")
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown:
        raise ValueError(f"unknown architecture {unknown[0]}: known are {', '.join(map(str, ARCHS))}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    theirs, missing = installed_cases() if peers else ({}, [])
    ours = shipped_cases()
    chosen = [case for case in (*ours, *theirs) if substring in case]
    if not chosen:
        raise ValueError(f"no case contains {substring!r}; there are: {'; '.join((*ours, *theirs, *missing))}")
    tasks = [(arch, case, case in theirs) for arch in dict.fromkeys(archs) for case in chosen]
    reports: list[Report] = []
    for result in _run(tasks, jobs or os.cpu_count() or 1):
        if isinstance(result, str):
            missing.append(result)
        else:
            reports += result
    return reports, missing


def _run(tasks: list[tuple[int, str, bool]], jobs: int) -> Iterator[list[Report] | str]:
    """Yield the results in the order of the tasks."""
    if min(jobs, len(tasks)) == 1:
        yield from _progress(map(_inspect, tasks), len(tasks))
        return
    with compilers(jobs) as pool:
        yield from _progress(pool.map(_inspect, tasks), len(tasks))


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Start ``jobs`` processes that compile. Tasks that still wait when the context ends are dropped."""
    # a fork server imports everything once, and its children have no thread of this process and none of its GPU
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _inspect(task: tuple[int, str, bool]) -> list[Report] | str:
    """Report one case, or say in one line why a peer has failed."""
    arch, case, is_peer = task
    try:
        return inspect_case(arch, case, peer=is_peer)
    except Exception as error:
        if not is_peer:
            raise
        return f"{case} on sm_{arch}: {short(error)}"


def _progress(results: Iterable[Any], total: int) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, desc="compiling", unit="case", leave=False, disable=None)


def add_parser(commands: Any) -> None:
    """Add the subcommand to those of ``clipfast``."""
    raw, example = argparse.RawDescriptionHelpFormatter, "Example: clipfast inspect --arch 90 --case attention"
    parser = commands.add_parser("inspect", description=explain(), epilog=example, formatter_class=raw)
    add = parser.add_argument
    add("--arch", nargs="+", type=int, default=ARCHS, metavar="N", help="compute capabilities (default: 80 90 100)")
    add("--case", default="", metavar="TEXT", help="report only cases whose name contains TEXT")
    add("--peers", action="store_true", help="report the kernels of installed peers too")
    add("--json", metavar="FILE", help="write everything to FILE too")
    add("--snapshot", metavar="FILE", help="resources to compare with (default: tests/kernels/resources.json)")
    add("--jobs", type=int, metavar="N", help="number of processes (default: one for each core)")
    add("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table and the differences from the snapshot; return 1 if a shipped kernel has a problem, else 0.

    Raises:
        ValueError, RuntimeError: see :func:`inspect_all`.
        ValueError, OSError: the snapshot cannot be read.
    """
    snapshot = _read_snapshot(args.snapshot)
    reports, missing = inspect_all(args.arch, substring=args.case, peers=args.peers, jobs=args.jobs)
    shipped = [report for report in reports if not report.peer]
    changes = [] if snapshot is None else differences(shipped, snapshot, VERSION)
    failing = [report for report in shipped if report.failures]
    if args.json:
        record = {"triton": triton.__version__, "reports": [to_json(report) for report in reports]}
        record |= {"missing": missing, "differences": changes}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(table(reports))
    print(f"\n{len(shipped)} shipped kernels, Triton {triton.__version__}: {len(failing)} with a problem")
    if snapshot is None:
        print("no snapshot to compare with: give one with --snapshot FILE")
    else:
        print("\n".join(["differs from the snapshot:", *changes] if changes else ["equal to the snapshot"]))
    for line in missing:
        print(f"missing: {line}")
    return 1 if failing else 0


def _read_snapshot(path: str | None) -> dict[str, Any] | None:
    """Read the snapshot: without a path that of the checkout, or None where there is no checkout."""
    if path is None and not SNAPSHOT.exists():
        return None
    text = Path(path or SNAPSHOT).read_text()
    try:
        snapshot = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--snapshot {path} is not JSON: {error}") from None
    if not isinstance(snapshot, dict):
        raise ValueError(f"--snapshot {path} must hold resources by Triton version, as tests/kernels/resources.json")
    return snapshot
