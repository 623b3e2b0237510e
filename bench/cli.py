"""The command line of the benchmarks: ``python -m bench`` in a checkout, ``clipfast bench`` anywhere."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipfast.cli.arguments import COUNT, UNREAD, Parser, add_output, is_unread
from clipfast.cli.arguments import run as run_checked
from clipfast.kernels.dtypes import DTYPES

from . import host, results, tables, tune
from .case import Sizes
from .categories import INPUT, LOSS, NORM
from .compare import compare, compare_files
from .harness import Budget
from .machine import busy, use
from .session import measure_all, refused_of_ours
from .suites import SUITES, build
from .supply import supply

_OPS = {name: suite.op for name, suite in SUITES.items() if suite.op is not None}
_NAMES = {op.name: name for name, op in _OPS.items()}  # the suite of each op by the op's name
# Names that stand for several suites.
GROUPS = {
    "ops": tuple(_OPS),
    "losses": tuple(name for name, op in _OPS.items() if op.category == LOSS),
    "blocks": tuple(name for name, op in _OPS.items() if op.category in (NORM, INPUT)),
}
DESCRIPTION = """\
Time clipfast against PyTorch and the other implementations that are installed. A candidate is timed only if its result
and gradients agree with the reference. Candidates take turns, and every sample is kept. "x ours" is the time over
clipfast's in paired rounds: above 1, clipfast is faster. "of floor" is a quotient: the time that the least possible
work needs, at the copy and matrix-product rates measured in the same run, over the time taken (for the loss, the least
work of versions that keep no N x N matrix). For a training step, MFU and a breakdown show where the time goes. The exit
code is 1 if a candidate of clipfast was refused."""

COMPARISON = """\
Print how many times as long each candidate takes in the second result file as in the first, with a verdict. The
interval holds the noise between the samples of a file, not what differs between two processes or machines: the times
of the other candidates, which have not changed, show that."""

EPILOG = """\
examples:
  {prog} contrastive_loss --device cpu
  {prog} attention --dtype bf16 --shape "batch=64 tokens=197 heads=12 head_dim=64 causal=False"
  {prog} step --shape model=RN50,batch=64 --rounds 3    steps of 15 s; memory and trace add a few steps
  {prog} data --pairs-per-second 5000    the data workers for this rate, and the slowest stage
  {prog} contrastive_loss --compare main        is this checkout slower than main? (exit code 1 if it is)
  {prog} compare before.json after.json          the same of two result files
  {prog} tune --op contrastive_loss --card H100
  {prog} host --stub            the host's time for each op, and the number of kernels that start
  {prog} table                  write the tables of the README and docs/ again from the committed results"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Run the command line of the benchmarks and return its exit code: 2 for bad arguments, with one line on stderr."""
    parser = Parser(prog, description=DESCRIPTION, epilog=EPILOG.format(prog=prog))
    add_commands(parser)
    args = parser.parse_args(argv)
    try:
        args.run, args.prog = run, prog
        return run_checked(args)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if is_unread(error):
            return UNREAD
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each suite and group of suites of benchmarks, and those for the tuner, host and tables."""
    commands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    everything = {name: suite.help for name, suite in SUITES.items()}
    everything |= {group: ", ".join(suites) for group, suites in GROUPS.items()} | {"all": "every suite"}
    names = {suite: op for op, suite in _NAMES.items()}
    for name, text in everything.items():
        shown, *others = dict.fromkeys((names.get(name, name), name))
        measuring = commands.add_parser(shown, aliases=others, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_measuring(measuring)
        if name == "data":
            rate = "rate for which the last table has the number of cores of each stage (default: 10000)"
            measuring.add_argument("--pairs-per-second", type=float, default=10_000, metavar="N", help=rate)
    text = "search launch configurations on the GPU of this machine"
    tuner = commands.add_parser("tune", help=text, description=tune.__doc__)
    tuner.epilog = "exit code: 0 done, 1 an op could not be tuned, 2 an error, 130 interrupted"
    tune.add_arguments(tuner)
    text = "time of the host for each op, for a step, and for one encoded image or text"
    host.add_arguments(commands.add_parser("host", help=text, description=host.__doc__))
    text = "how the times of two result files differ, beyond the noise of their samples"
    files = commands.add_parser("compare", help=text, description=COMPARISON)
    files.add_argument("files", type=Path, nargs=2, metavar="FILE", help="results of the benchmarks: before, and after")
    files.epilog = "exit code: 0 not slower, 1 clipfast is slower in a case, 2 an error, 130 interrupted"
    table = commands.add_parser("table", help="write the tables of the README and docs/ again from committed results")
    pages = [Path("README.md"), Path("docs/benchmarks.md")]
    shown = " ".join(map(str, pages))
    table.add_argument("--page", type=Path, nargs="+", default=pages, help=f"files to write (default: {shown})")
    table.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER", help="folder of the results")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options that all measuring benchmark commands share."""
    parser.epilog = (
        "exit code: 0 measured, 1 a candidate of clipfast was refused, or is slower (--compare), 2 an error, 130 "
        "interrupted"
    )
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default: auto)")
    add("--dtype", nargs="+", help=f"{', '.join(DTYPES)} (default: bf16 on a GPU and fp32 on a CPU)")
    shapes = "sizes to measure, in place of the default ones; may be given several times"
    add("--shape", action="append", default=[], metavar='"KEY=VALUE ..."', help=shapes)
    smoke = (
        f"run the smallest shapes for two rounds, to see that everything works, and write to {results.SMOKE_FOLDER}; "
        "all ops take 5 minutes of a CPU, because candidates are compiled"
    )
    add("--smoke", action="store_true", help=smoke)
    add("--only", nargs="+", metavar="NAME", help="measure only candidates with this name, or whose name contains it")
    add("--rounds", type=COUNT, default=50, help="largest number of rounds (default: 50)")
    add("--seconds", type=float, default=60, help="add no round to a case after this time (default: 60)")
    add("--min-rounds", type=COUNT, default=5, help="smallest number of rounds, whatever their time (default: 5)")
    total = "begin no case after this time (default: no limit)"
    add("--total", type=float, default=float("inf"), metavar="SECONDS", help=total)
    add("--no-memory", action="store_true", help="leave out the pass that measures peak memory")
    add("--no-breakdown", action="store_true", help="leave out the pass that traces where the time of a step goes")
    target = f"{results.FOLDER}/<card>/<date>-<what>-<commit>.json"
    add_output(parser, "--json", is_held=False, help=f"result file (default: {target})")
    add("--compare", metavar="BASE", help="time this commit and the checkout in turns, and say which is slower")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark command that the parsed command line selects."""
    args.bench = _NAMES.get(args.bench, args.bench)
    if args.bench == "tune":
        return tune.run(args)
    if args.bench == "host":
        return host.run(args)
    if args.bench == "compare":
        return compare_files(*args.files)
    if args.bench == "table":
        for page in args.page:
            page.write_text(tables.fill_tables(page.read_text(), args.results))
        return 0
    if note := busy(os.getloadavg()[0], os.cpu_count() or 1):
        print(f"{args.prog}: note: {note}", file=sys.stderr)
    device = _device(args.device)
    budget = _budget(args)  # refuses wrong numbers before _plan, which may generate hundreds of photographs
    plan = _plan(args, device)
    if args.compare is not None:
        return compare(args.compare, plan, device, budget)
    path = args.json or results.default_path(device, args.bench, smoke=args.smoke)
    done = measure_all(
        plan, device, budget, path, only=args.only, memory=not args.no_memory,
        breakdown=not args.no_breakdown, total_s=args.total,
    )  # fmt: skip
    for summary in supply(done["cases"], args.pairs_per_second) if args.bench == "data" else ():
        print(f"\n{summary}")
    refused = refused_of_ours(done)
    for line in refused:
        print(f"{args.prog}: refused: {line}", file=sys.stderr)
    return 1 if refused else 0


def _budget(args: argparse.Namespace) -> Budget:
    """Return the time budget of a benchmark from the command line; refuse numbers that are not positive."""
    for name in ("rounds", "seconds", "min_rounds", "total", "pairs_per_second"):
        if getattr(args, name, 1) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, got {getattr(args, name)}")
    rounds = 2 if args.smoke else args.rounds
    return Budget(args.seconds, rounds, min(args.min_rounds, rounds))


def _device(name: str) -> torch.device:
    """Return the device that the command line of the benchmarks names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or auto, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name}: no such device here")
    return use(device)


def _plan(args: argparse.Namespace, device: torch.device) -> list[tuple[str, Sizes, str]]:
    """Return suite, shape and dtype of each benchmark case; all are checked before anything is measured."""
    chosen = {**GROUPS, "all": tuple(SUITES)}.get(args.bench, (args.bench,))
    if args.shape and len(chosen) > 1:
        raise ValueError(f"--shape needs one suite, not {args.bench!r}: {', '.join(chosen)}")
    dtypes = args.dtype or ["bf16" if device.type == "cuda" else "fp32"]
    plan = []
    for suite in chosen:
        default = [SUITES[suite].smallest] if args.smoke else SUITES[suite].shapes[device.type]
        shapes = [_parse_shape(suite, text) for text in args.shape] or default
        for dtype in SUITES[suite].dtypes or dtypes:
            plan += [(suite, shape, dtype) for shape in shapes]
    for case in plan:
        build(*case, device)
    return plan


def _parse_shape(suite: str, text: str) -> Sizes:
    """Read a benchmark shape such as ``"pairs=4096 embed_dim=512"`` into a dictionary of the suite's types."""
    fields = SUITES[suite].fields
    shape: dict[str, Any] = {}
    for item in text.replace(",", " ").split():
        key, _, value = item.partition("=")
        if key not in fields:
            raise ValueError(f"--shape: {suite} has no {key!r}; it has {', '.join(fields)}")
        kind = type(fields[key])
        try:
            shape[key] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"--shape: {key} must be like {fields[key]!r}, got {value!r}") from error
    return shape
