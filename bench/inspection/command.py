"""``clipfast inspect``: report the resources and faults of every compiled kernel on every architecture, without
a GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from clipfast.cli.arguments import COUNT, Count, add_output
from clipfast.io.files import replace_text
from clipfast.io.progress import each
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES, FP8_SPEEDUP
from clipfast.kernels.launch import INTERPRET, Launch

from ..case import OURS, short
from ..suites.step import PADDED
from . import forecast, offline
from .eager import STEP
from .eager import measured as measured_host
from .model import ARCH, FULL, H100, MACHINES, QUICK, NoModel, load, predict
from .report import Report, differences, explain, table
from .sass import matrix_instructions, parse
from .shipped import SNAPSHOT, compiles_for, known_problems, loads, shipped_cases

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
Predicted for one {card} by a model that runs the compiled kernels (Triton {triton}); no GPU measured these times.
PyTorch's products run at {tflops:g} TFLOP/s, those in 8 bits at {times:g} times this rate; its other ops take the time
to move their bytes. A CUDA graph takes the GPU's time. An eager call takes the GPU's or the host's, whichever is longer
("binds"); pairs/s are of eager steps. The host's time follows from calls that were timed on {host}. Corrected: divided
by the model's median error on published kernels of the same kind; the range held for four in five of these kernels.
docs/gpu-model.md lists them."""


def inspect_launch(launch: Launch, arch: int, *, case: str = "", kernel: str = "", predicts: bool = True) -> Report:
    """Compile a launch from :func:`offline.record`, and report its resources, its faults and its predicted time.

    ``case`` and ``kernel`` are names for the report; by default the kernel keeps its own name. ``predicts`` says
    whether the time on an H100 is predicted.

    Raises:
        triton.CompilationError, RuntimeError: the kernel does not compile.
    """
    compiled = offline.compile_kernel(launch, arch)
    instructions = parse(offline.disassemble(compiled))
    resources = offline.resources(compiled)
    prediction, unpredicted = None, ""
    if predicts and arch == ARCH:
        try:
            prediction = predict(load(compiled), launch.grid, launch.args, H100, effort=QUICK)
        except NoModel as error:
            unpredicted = str(error)
    # Products of 16-bit operands must use the matrix unit.
    half = any(tensor.dtype.itemsize == 2 for tensor in offline.tensors(launch))
    problems = offline.problems(resources, arch, half=half, multiplies=offline.multiplies(compiled))
    return Report(
        case=case, kernel=kernel or launch.kernel.__name__, arch=arch, resources=resources,
        warps=offline.threads(compiled) // 32, occupancy=offline.occupancy_of(compiled, resources),
        mma=matrix_instructions(instructions),
        tma=any(one.name in ("UTMALDG", "UTMASTG", "UTMAREDG") for one in instructions),
        prediction=prediction, unpredicted=unpredicted, problems=tuple(problems),
    )  # fmt: skip


def inspect_case(arch: int, case: str) -> list[Report]:
    """Return the reports on all launches of a shipped case."""
    known = known_problems(VERSION, arch, case)
    return [
        dataclasses.replace(inspect_launch(launch, arch, case=case, kernel=name), known=known)
        for name, launch in offline.named(offline.record(arch, shipped_cases()[case])).items()
    ]


def inspect_all(archs: Sequence[int] = ARCHS, *, texts: Sequence[str] = ("",), jobs: int | None = None) -> list[Report]:
    """Return the reports on all shipped kernels in the cases whose names contain one of ``texts``, in order.

    Raises:
        ValueError: an architecture is unknown, or no case matches.
        RuntimeError: the kernels are interpreted, or one does not compile.
    """
    _need_compiler()
    unknown = [arch for arch in archs if arch not in ARCHS]
    if unknown:
        raise ValueError(f"unknown architecture {unknown[0]}: known are {', '.join(map(str, ARCHS))}")
    cases = [case for case in shipped_cases() if _contains(case, texts)]
    if not cases:
        ops = dict.fromkeys(case.split()[0] for case in shipped_cases())
        raise ValueError(f"no case contains {_alternatives(texts)}; there are cases of {', '.join(ops)}")
    tasks = [task for task in itertools.product(dict.fromkeys(archs), cases) if compiles_for(*reversed(task))]
    found = each(offline.spread(_inspect, tasks, jobs), "compiling", "case", len(tasks))
    return [report for reports in found for report in reports]


def _inspect(task: tuple[int, str]) -> list[Report]:
    """Inspect the compiled kernels of one (architecture, case) pair, as a task of a worker process."""
    return inspect_case(*task)


def _contains(name: str, texts: Sequence[str]) -> bool:
    """Return whether the name of a case contains one of the texts that were asked for."""
    return any(text in name for text in texts)


def _alternatives(texts: Sequence[str]) -> str:
    """Return the requested parts of kernels' case names in one phrase, for an error message."""
    return " or ".join(map(repr, texts))


def _need_compiler() -> None:
    """Refuse to inspect kernels while Triton's interpreter is on."""
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled: unset it")


def add_parser(commands: Any) -> None:
    """Add the subcommand ``inspect`` to the command line of ``clipfast``."""
    parser = commands.add_parser("inspect", description=explain(), epilog=EPILOG)
    add = parser.add_argument
    add("--arch", nargs="+", type=COUNT, default=ARCHS, metavar="N", help="compute capabilities (default: all known)")
    chosen = "report only cases whose name contains a TEXT, such as contrastive_loss"
    add("--op", "--case", dest="cases", nargs="+", default=[""], metavar="TEXT", help=chosen)
    add_output(parser, "--json", is_held=False, help="write everything to FILE too, kept up to date while it predicts")
    add("--jobs", type=Count(1, 1024), metavar="N", help="number of processes (default: one for each core)")
    what = parser.add_argument_group("predicted times, without the report")
    add = what.add_argument
    add("--predict", action="store_true", help="predict every op and a step of every published model instead")
    add("--card", default="h100", choices=tuple(MACHINES), help="the GPU to predict (default: h100)")
    add("--dtype", default="bf16", choices=tuple(DTYPES), help="dtype of the ops (default: bf16)")
    add("--against", nargs="+", metavar="FILE", help="results of clipfast bench to put beside the predictions")
    crossover = "find the batch from which the GPU takes longer than the host; it takes several times as long"
    add("--crossover", action="store_true", help=crossover)
    add("--captions", action="store_true",
        help="predict steps on packed captions, 18 tokens on average (default: as long as the context)")  # fmt: skip
    add("--quick", action="store_true", help="run less of each kernel: within 2%% of the whole for most")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast inspect``; return 1 if a shipped kernel has a problem, else 0.

    Raises:
        ValueError, RuntimeError: see :func:`inspect_all`.
        ValueError, OSError: a result file cannot be read.
    """
    return _predict(args) if args.predict else _report(args)


def _report(args: argparse.Namespace) -> int:
    """Print the table of compiled kernels and their differences from the snapshot."""
    reports = inspect_all(args.arch, texts=args.cases, jobs=args.jobs)
    changes = differences(reports, loads(SNAPSHOT.read_text()), VERSION)
    failing = [report for report in reports if report.failures]
    if args.json:
        record = {"triton": triton.__version__, "reports": [dataclasses.asdict(report) for report in reports]}
        replace_text(args.json, json.dumps(record | {"differences": changes}, indent=1) + "\n")
    print(table(reports))
    print(f"\n{len(reports)} shipped kernels, Triton {triton.__version__}: {len(failing)} with a problem")
    print("\n".join(["differs from the snapshot:", *changes] if changes else ["equal to the snapshot"]))
    return 1 if failing else 0


def _predict(args: argparse.Namespace) -> int:
    """Print the predicted times of ops and steps, next to measured times if there are any."""
    _need_compiler()
    measured = _measurements(args.against) if args.against else None
    shapes = enumerate(forecast.measured_shapes())
    labels = ((n, forecast.label(spec.name, shape.to_dict(), args.dtype)) for n, (spec, shape) in shapes)
    ops = [n for n, label in labels if _contains(label, args.cases)]
    steps = [m for m, pairs in forecast.STEPS.items() if _contains(f"step model={m} batch={pairs}", args.cases)]
    if not ops and not steps:
        examples = "'contrastive_loss pairs=32768' or 'step model=ViT'"
        raise ValueError(f"no op or step contains {_alternatives(args.cases)}, such as {examples}")
    predict_one = functools.partial(
        forecast.forecast, dtype=args.dtype, machine=MACHINES[args.card],
        effort=QUICK if args.quick else FULL, finds_batch=args.crossover, captions=args.captions,
    )  # fmt: skip
    record: dict[str, Any] = {"triton": triton.__version__, "card": args.card, "forecasts": []}
    for tasks, is_step in ((ops, False), (steps, True)):
        if tasks:
            print(("\n" if is_step and ops else "") + forecast.heading(is_step, measured))
        for one in offline.spread(predict_one, tasks, args.jobs):
            print(forecast.rows(one, measured), flush=True)
            record["forecasts"].append(forecast.to_json(one))
            if args.json:  # predictions take minutes, so those that are done are kept if the run is stopped
                replace_text(args.json, json.dumps(record, indent=1) + "\n")
    host = measured_host()["machine"]["cpu"]
    rates = {"tflops": H100.power_flops / 1e12, "times": FP8_SPEEDUP}
    note = NOTE.format(card=MACHINES[args.card].name, triton=triton.__version__, **rates, host=host)
    print(f"\n{note}")
    return 0


def _measurements(paths: Iterable[str]) -> dict[str, float]:
    """Return the median seconds of our candidate by :func:`forecast.label`, from result files of ``clipfast bench``.

    For a training step, the time is that of our candidate that computes the padding of texts, as the prediction does.

    Raises:
        ValueError: a file is not such a result.
    """
    found: dict[str, float] = {}
    for path in paths:
        try:
            cases = json.loads(Path(path).read_text())["cases"]
            for case in cases:
                wanted = PADDED if case["op"] == STEP else OURS
                ours: dict[str, Any] = next((one for one in case["candidates"] if one["name"] == wanted), {})
                if "median_s" in ours:
                    name = case["op"].removesuffix(".fwd_bwd")
                    found[forecast.label(name, case["shape"], case["dtype"])] = ours["median_s"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"--against {path} is not a result of clipfast bench: {short(error)}") from None
    return found
