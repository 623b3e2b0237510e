"""``clipfast inspect``: report what the compiler made of every kernel on every architecture, without a GPU."""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from clipfast.arguments import COUNT, Count, add_output
from clipfast.files import replace_text
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import INTERPRET, Launch

from ..case import short
from . import offline
from .forecast import STEP, STEPS, Forecast, forecast_op, forecast_step, heading, label, measurements, rows
from .forecast import to_json as forecast_json
from .matrix import mma_kinds
from .model import ARCH, FULL, H100, MACHINES, QUICK, NoModel, Prediction, load, predict
from .peer_kernels import installed_cases, record_peer
from .pool import spread
from .report import Report, differences, explain, table, to_json
from .sass import parse
from .shipped import known_problems, shipped_cases
from .snapshot import Snapshot, loads
from .workloads import measured_shapes

ARCHS = tuple(ARCHITECTURES)
VERSION = ".".join(triton.__version__.split(".")[:2])
EPILOG = """\
examples:
  clipfast inspect --arch 90 --case attention
  clipfast inspect --predict --case contrastive_loss        times of an op on an H100
  clipfast inspect --predict --case "step model=ViT-B"      pairs/s of training steps
  clipfast inspect --predict --against bench-loss.json      measured times beside them

exit code: 0 no problem, 1 a shipped kernel has one, 2 an error, 130 interrupted"""
NOTE = """\
Predicted for one {card} by a model that runs the compiled kernels (Triton {triton}); nothing here was measured.
PyTorch's products take {tflops:g} TFLOP/s, and its other ops the bytes that they move. The host is left out, as in a
CUDA graph. "error" holds for nine in ten published kernels of the kind: docs/gpu-model.md has them, and what the model
leaves out."""
SNAPSHOT = Path(__file__).parents[2] / "tests" / "kernels" / "resources.json"


def inspect_launch(
    launch: Launch, arch: int, *, case: str = "", kernel: str | None = None, half: bool | None = None,
    predicts: bool = True,
) -> Report:  # fmt: skip
    """Compile a launch from :func:`offline.record`, and report what it takes, what is wrong with it, and its time.

    ``case`` and ``kernel`` are names for the report; the kernel has its own one by default. ``half`` says whether its
    products have 16-bit operands, and so must use the matrix unit (default: whether any of its tensors has 16 bits).
    ``predicts`` says whether its time on an H100 is predicted.

    Raises:
        triton.CompilationError, RuntimeError: the kernel does not compile.
    """
    if half is None:
        half = any(tensor.dtype.itemsize == 2 for tensor in offline.tensors(launch))
    compiled = offline.compile_kernel(launch, arch)
    multiplies = offline.multiplies(compiled)
    instructions = parse(offline.disassemble(compiled))
    resources = offline.resources(compiled)
    prediction = _prediction(compiled, launch) if predicts and arch == ARCH else None
    return Report(
        case=case, kernel=kernel or launch.kernel.__name__, arch=arch, resources=resources,
        warps=offline.threads(compiled) // 32, occupancy=offline.occupancy_of(compiled, resources),
        mma=mma_kinds(instructions),
        tma=any(instruction.name.startswith(("UTMALDG", "UTMASTG", "UTMAREDG")) for instruction in instructions),
        prediction=None if isinstance(prediction, str) else prediction,
        unpredicted=prediction if isinstance(prediction, str) else "",
        problems=tuple(offline.problems(resources, arch, half=half, multiplies=multiplies)),
    )  # fmt: skip


def _prediction(compiled: Any, launch: Launch) -> Prediction | str:
    """Predict a launch on an H100, or say in one line why the model does not cover it."""
    try:
        return predict(load(compiled), launch.grid, launch.args, H100, effort=QUICK)
    except NoModel as error:
        return str(error)


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
    theirs, missing = installed_cases() if peers else ({}, [])
    ours = shipped_cases()
    chosen = [case for case in (*ours, *theirs) if substring in case]
    if not chosen:
        raise ValueError(f"no case contains {substring!r}; there are: {'; '.join((*ours, *theirs, *missing))}")
    tasks = [(arch, case, case in theirs) for arch in dict.fromkeys(archs) for case in chosen]
    reports: list[Report] = []
    for result in spread(_inspect, tasks, jobs, "compiling"):
        if isinstance(result, str):
            missing.append(result)
        else:
            reports += result
    return reports, missing


def _inspect(task: tuple[int, str, bool]) -> list[Report] | str:
    """Report one case, or say in one line why a peer has failed."""
    arch, case, is_peer = task
    try:
        return inspect_case(arch, case, peer=is_peer)
    except Exception as error:
        if not is_peer:
            raise
        return f"{case} on sm_{arch}: {short(error)}"


def add_parser(commands: Any) -> None:
    """Add the subcommand to those of ``clipfast``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("inspect", description=explain(), epilog=EPILOG, formatter_class=raw)
    add = parser.add_argument
    add("--arch", nargs="+", type=COUNT, default=ARCHS, metavar="N", help="compute capabilities (default: all known)")
    chosen = "report only cases whose name contains TEXT, such as contrastive_loss"
    add("--op", "--case", dest="case", default="", metavar="TEXT", help=chosen)
    add("--peers", action="store_true", help="report the kernels of installed peers too")
    add_output(parser, "--json", help="write everything to FILE too")
    add("--snapshot", metavar="FILE", help="resources to compare with (default: tests/kernels/resources.json)")
    add("--jobs", type=Count(1, 1024), metavar="N", help="number of processes (default: one for each core)")
    add("--traceback", action="store_true", help="show where an error was raised")
    what = parser.add_argument_group("predicted times, without the report")
    add = what.add_argument
    add("--predict", action="store_true", help="predict every op and a step of every published model instead")
    add("--card", default="h100", choices=tuple(MACHINES), help="the GPU to predict (default: h100)")
    add("--dtype", default="bf16", choices=tuple(DTYPES), help="of the ops (default: bf16)")
    add("--tflops", type=float, default=H100.power_flops / 1e12, metavar="X",
        help="1e12 FLOP/s of PyTorch's own products (default: %(default)g)")  # fmt: skip
    add("--against", nargs="+", metavar="FILE", help="results of clipfast bench to put beside the predictions")
    add_output(what, "--chart", help="draw where the time of each step goes, as a picture")
    add("--quick", action="store_true", help="run less of each kernel: within 2%% of the whole for most")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the command line asks for; return 1 if a shipped kernel has a problem, else 0.

    Raises:
        ValueError, RuntimeError: see :func:`inspect_all`.
        ValueError, OSError: the snapshot or a result file cannot be read.
    """
    if args.chart is not None and not args.predict:
        raise ValueError("--chart draws predicted steps: give --predict too")
    return _predict(args) if args.predict else _report(args)


def _report(args: argparse.Namespace) -> int:
    """Print the table and the differences from the snapshot."""
    snapshot = _read_snapshot(args.snapshot)
    reports, missing = inspect_all(args.arch, substring=args.case, peers=args.peers, jobs=args.jobs)
    shipped = [report for report in reports if not report.peer]
    changes = [] if snapshot is None else differences(shipped, snapshot, VERSION)
    failing = [report for report in shipped if report.failures]
    if args.json:
        record = {"triton": triton.__version__, "reports": [to_json(report) for report in reports]}
        record |= {"missing": missing, "differences": changes}
        replace_text(args.json, json.dumps(record, indent=1) + "\n")
    print(table(reports))
    print(f"\n{len(shipped)} shipped kernels, Triton {triton.__version__}: {len(failing)} with a problem")
    if snapshot is None:
        print("no snapshot to compare with: give one with --snapshot FILE")
    else:
        print("\n".join(["differs from the snapshot:", *changes] if changes else ["equal to the snapshot"]))
    for line in missing:
        print(f"missing: {line}")
    return 1 if failing else 0


def _predict(args: argparse.Namespace) -> int:
    """Print predicted times of ops and steps, and measured ones beside them."""
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled: unset it")
    if not args.tflops > 0:
        raise ValueError(f"--tflops must be more than 0, got {args.tflops:g}")
    measured = measurements(args.against) if args.against else None
    ops = [
        number
        for number, (spec, shape) in enumerate(measured_shapes())
        if args.case in label(spec.name, shape.to_dict(), args.dtype)
    ]
    steps = [model for model in STEPS if args.case in f"step model={model}"]
    if args.chart is not None:
        if not steps:
            raise ValueError(f"--chart draws steps, and no step contains {args.case!r}")
        # It is imported here, since only pictures need matplotlib, and before minutes would be lost without it.
        from ..plots import draw_steps
    if not ops and not steps:
        raise ValueError(
            f"no op or step contains {args.case!r}, such as 'contrastive_loss pairs=32768' or 'step model=ViT'"
        )
    forecast = functools.partial(
        _forecast, dtype=args.dtype, machine=MACHINES[args.card], product_flops=args.tflops * 1e12,
        effort=QUICK if args.quick else FULL,
    )  # fmt: skip
    record: dict[str, Any] = {"triton": triton.__version__, "card": args.card}
    record |= {"products_flops_per_s": args.tflops * 1e12, "forecasts": []}
    for kind, found in itertools.groupby(spread(forecast, [*ops, *steps], args.jobs), lambda one: one.name == STEP):
        print(("\n" if kind and ops else "") + heading(kind, measured))
        for one in found:  # they take minutes: what is known is printed and kept, should the run be ended
            print(rows(one, measured), flush=True)
            record["forecasts"].append(forecast_json(one))
            if args.json:
                replace_text(args.json, json.dumps(record, indent=1) + "\n")
    if args.chart is not None:
        draw_steps(record, args.chart)
    print(f"\n{NOTE.format(card=MACHINES[args.card].name, triton=triton.__version__, tflops=args.tflops)}")
    return 0


def _forecast(task: int | str, **options: Any) -> Forecast:
    if isinstance(task, int):
        return forecast_op(task, **options)
    return forecast_step(task, **{name: value for name, value in options.items() if name != "dtype"})


def _read_snapshot(path: str | None) -> Snapshot | None:
    """Read the snapshot: without a path that of the checkout, or None where there is no checkout."""
    if path is None and not SNAPSHOT.exists():
        return None
    try:
        return loads(Path(path or SNAPSHOT).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--snapshot {path or SNAPSHOT} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"--snapshot {path or SNAPSHOT} is not one: {error}") from None
