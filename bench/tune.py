"""The tuner: it searches launch configurations on this machine's GPU, and writes the table that is committed.

For each kernel of an op, every configuration of its search space is first compiled for the GPU's architecture. Those
that spill registers, exceed a limit or miss the tensor cores are dropped. The others are ranked by how busy they can
keep the tensor cores, which ``clipfast inspect`` reads from the machine code. The best few are timed, in turns with the
committed one, on the whole op, since a kernel that is fast alone may slow down the next one. A configuration whose
error is larger than the committed one's is refused. One that is surely faster, by more than noise, takes its place. The
table is written after each kernel, so that a stop loses nothing.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clipfast.files import replace_text
from clipfast.kernels import configs
from clipfast.kernels.configs import Config
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Target, Tunable

from .case import Case, call, short
from .harness import Budget, Timing, leaves, measure, ratio_interval
from .inspection import Report, inspect_launch, offline
from .inspection.shipped import small_tile_problems
from .machine import use
from .suites import build
from .tune_targets import TARGETS, key_of, space

# An error may grow by at most this factor. It may grow at all because sums are then taken in another order.
ERROR_GROWTH = 1.5
# A configuration is worth a change if its time over the committed one's is below this, with the whole interval.
WORTH = 0.98
MIN_ROUNDS = 20


def spread(configurations: Sequence[Config], limit: int | None) -> list[Config]:
    """Return at most ``limit`` of ``configurations``, spread evenly over all of them."""
    step = len(configurations) / limit if limit and limit < len(configurations) else 1
    return [configurations[int(i * step)] for i in range(min(limit or len(configurations), len(configurations)))]


@contextlib.contextmanager
def compilers() -> Iterator[concurrent.futures.Executor]:
    """Start one compiling process for each core. Jobs that still wait when the context ends are dropped."""
    # The processes are spawned, since a process that has touched a GPU must not be forked.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Search:
    """The settings of a search, for operands of a dtype on an architecture."""

    dtype: str
    arch: int
    keep: int  # how many configurations of a kernel are timed
    limit: int | None  # how many are compiled; None: all
    pool: concurrent.futures.Executor  # compiles them


def prune(
    tunable: Tunable, target: Target, candidates: Sequence[Config], search: Search
) -> list[tuple[Config, Report]]:
    """Return the best sound configurations, with their reports, the best first.

    A sound one compiles, and its report has no failure. Print how many are not sound, and why the first one is not.
    """
    inspect = functools.partial(_inspect, tunable, target, search.dtype, search.arch)
    reports = list(zip(candidates, search.pool.map(inspect, candidates), strict=True))
    sound = [(config, report) for config, report in reports if isinstance(report, Report) and not report.failures]
    reasons = [
        f"{config}: {report if isinstance(report, str) else '; '.join(report.failures)}"
        for config, report in reports
        if isinstance(report, str) or report.failures
    ]
    if reasons:
        say(f"{len(reasons)} of {len(reports)} configurations are not sound: {reasons[0]}")
    return sorted(sound, key=lambda pair: pair[1].rank)[: search.keep]


def _inspect(tunable: Tunable, target: Target, dtype: str, arch: int, config: Config) -> Report | str:
    """Return the worst report of the kernel's launches under ``config``, or why one does not compile."""
    case = small_case(target, dtype)
    with configs.override(key_of(tunable, target, dtype), config):
        launches = offline.record(arch, functools.partial(call_ours, case))
    ours = [launch for launch in launches if launch.kernel.__name__ == tunable.function]
    if not ours:
        raise RuntimeError(f"{case.op} launches no {tunable.function}")
    known = small_tile_problems(arch) if tunable.small_tiles else ()
    try:
        reports = (dataclasses.replace(inspect_launch(launch, arch), known=known) for launch in ours)
        return max(reports, key=lambda report: report.rank)
    except Exception as error:
        # The kernel may need too much shared memory, or Triton may refuse its tile. ``prune`` prints the reason.
        return short(error)


def tune(op: str, device: torch.device, budget: Budget, search: Search) -> Iterator[tuple[str, Config | None]]:
    """Tune the kernels of ``op`` on ``device`` one after another, with the winners for earlier kernels in use.

    Yields:
        After each kernel, the key of its table entry, and a faster configuration or None if the committed one stays.
    """
    _, target = TARGETS[op]
    with contextlib.ExitStack() as better:
        for tunable in target.kernels:
            key, winner = _tune_kernel(tunable, target, device, budget, search)
            if winner is not None:
                better.enter_context(configs.override(key, winner))
            yield key, winner


def _tune_kernel(
    tunable: Tunable, target: Target, device: torch.device, budget: Budget, search: Search
) -> tuple[str, Config | None]:
    """Return the key of the kernel's table entry, and a faster configuration or None if the committed one stays."""
    key, committed = key_of(tunable, target, search.dtype), _committed(tunable, target, search)
    searched = spread(list(space(tunable)), search.limit)
    pruned = [config for config, _ in prune(tunable, target, searched, search) if config != committed]
    say(f"{key}: timing {len(pruned)} configurations against {committed}")
    timings, telemetry = measure(_case(target, search.dtype, device, key, pruned), budget)
    winner = None if telemetry["throttled"] else best(timings, pruned)
    stays = "the card was throttled, nothing is changed" if telemetry["throttled"] else "the committed one stays"
    say(f"{key}: {stays if winner is None else f'{winner} instead'}")
    return key, winner


def best(timings: Sequence[Timing], candidates: Sequence[Config]) -> Config | None:
    """Return the fastest configuration that is surely faster than the committed one and no less accurate, or None.

    The first of ``timings`` is that of the committed one, and the others are those of ``candidates``.
    """
    committed, *others = timings
    if committed.refused is not None:
        raise RuntimeError(f"the committed configuration cannot be timed: {committed.refused}")
    found: list[tuple[float, Config]] = []
    for timing, config in zip(others, candidates, strict=True):
        limits = {name: ERROR_GROWTH * error + 1e-7 for name, error in committed.errors.items()}
        # An error that is NaN fails this comparison, as it should.
        if timing.refused is not None or not all(error <= limits[name] for name, error in timing.errors.items()):
            continue
        ratio, _, high = ratio_interval(committed.samples, timing.samples)
        if high < WORTH:
            found.append((ratio, config))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def write_table(entries: dict[str, Config], arch: int, folder: Path = configs.TUNED) -> Path:
    """Add ``entries`` to the table of ``arch`` in ``folder``, and return its path.

    They replace entries with the same keys. A table that does not exist yet starts as a copy of the committed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{arch}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(configs.read_table(arch))
    table |= {key: dataclasses.asdict(config) for key, config in entries.items()}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def run(args: Any) -> int:
    """Tune the ops that the parsed command line names, or with ``--dry`` rank their configurations without a GPU."""
    ops = list(TARGETS) if "all" in args.op else args.op
    if args.dry:
        with compilers() as pool:
            for op in ops:
                _print_ranking(op, Search(args.dtype, args.arch, args.keep, args.limit, pool))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("tuning needs the GPU that is tuned for: --dry ranks configurations without one")
    device = use(torch.device("cuda"))
    name = torch.cuda.get_device_name(device)
    if args.card is None or args.card.lower() not in name.lower():
        raise ValueError(f"--card must name the card that is tuned for, part of {name!r}, got {args.card!r}")
    return _tune_all(ops, args, device)


def _tune_all(ops: Sequence[str], args: Any, device: torch.device) -> int:
    """Tune ``ops`` until the time is over, write each winner to the table, and return the exit status."""
    start, failed, arch = time.monotonic(), 0, _table_arch(device)
    budget = Budget(args.seconds, min_rounds=MIN_ROUNDS)
    with compilers() as pool:
        search = Search(args.dtype, arch, args.keep, args.limit, pool)
        for op in ops:
            try:
                for key, config in tune(op, device, budget, search):
                    write_table({key: config} if config is not None else {}, arch, args.tables)
                    if time.monotonic() - start > args.total:
                        say(f"{args.total:.0f} s are over: nothing is tuned after {key}")
                        return 1 if failed else 0
            except RuntimeError as error:
                # If one op cannot be tuned, the others still are.
                say(f"{op}: {short(error)}")
                failed += 1
    say("now run: clipfast verify, clipfast inspect, and tests/kernels/test_offline.py --update-resources")
    return 1 if failed else 0


def add_arguments(parser: Any) -> None:
    """Add the options of the tuner."""
    add = parser.add_argument
    add("--op", nargs="+", default=["all"], choices=("all", *TARGETS))
    add("--card", help="part of the name of this machine's GPU, such as H100, to confirm that you mean it")
    add("--dtype", default="bf16", choices=tuple(DTYPES))
    add("--keep", type=int, default=8, help="configurations to time for each kernel (default 8)")
    add("--seconds", type=float, default=10, help="time for each kernel (default 10)")
    add("--total", type=float, default=float("inf"), metavar="SECONDS", help="begin no further kernel after this time")
    add("--tables", type=Path, default=configs.TUNED, help="folder of the tables to write")
    add("--dry", action="store_true", help="compile and rank only; needs no GPU, changes nothing")
    add("--arch", type=int, default=90, choices=configs.ARCHS, help="for --dry (default 90)")
    add("--limit", type=int, default=None, help="configurations to compile for each kernel (default: all)")


def _print_ranking(op: str, search: Search) -> None:
    """Print the best configurations of each kernel of ``op``, ranked by what the compiler made of them."""
    _, target = TARGETS[op]
    for tunable in target.kernels:
        key, committed = key_of(tunable, target, search.dtype), _committed(tunable, target, search)
        searched = list(space(tunable))
        chosen = [committed, *(config for config in spread(searched, search.limit) if config != committed)]
        print(f"{key} on sm_{search.arch}, {len(chosen)} of {len(searched)} configurations:")
        for config, report in prune(tunable, target, chosen, search):
            note = "  <- committed" if config == committed else ""
            share = f"{100 * report.bound.share:.0f}%" if report.bound is not None else "unknown"
            print(f"  bound {share:>7}  {report.resources.registers:3} registers  {config}{note}", flush=True)


def say(text: str) -> None:
    """Print progress without buffering, so that a tuner that is stopped has printed all that it found."""
    print(text, flush=True)


def _case(target: Target, dtype: str, device: torch.device, key: str, candidates: Sequence[Config]) -> Case:
    """Make the case of ``target`` whose candidates are our op as committed, and with each configuration for ``key``."""
    spec, _ = TARGETS[target.name]
    case = build(spec.suite_name, target.shape.to_dict(), dtype, device)
    changed = [
        dataclasses.replace(case.ours, name=str(config), context=functools.partial(configs.override, key, config))
        for config in candidates
    ]
    return dataclasses.replace(case, candidates=(case.ours, *changed))


def _committed(tunable: Tunable, target: Target, search: Search) -> Config:
    """Return the committed configuration of a kernel; refuse a kernel that has none on this architecture."""
    key = key_of(tunable, target, search.dtype)
    entry = configs.committed(key, search.arch)
    if entry is None:
        raise ValueError(f"{key}: another kernel serves it on sm_{search.arch}, so there is nothing to compare with")
    return tunable.kind(**entry)


def _table_arch(device: torch.device) -> int:
    """Return the architecture whose table serves ``device``: the newest one that is not newer than the device."""
    major, minor = torch.cuda.get_device_capability(device)
    return next(arch for arch in configs.ARCHS if arch <= 10 * major + minor)


def small_case(target: Target, dtype: str) -> Case:
    """Make the case of ``target`` with a small batch, for compiling.

    The batch does not change what is compiled, and even tensors without values take memory.
    """
    small = {"pairs": 1024, "images": 1024, "texts": 5120, "batch": 2, "rows": 1024}
    shape = {key: small.get(key, value) for key, value in target.shape.to_dict().items()}
    return build(TARGETS[target.name][0].suite_name, shape, dtype, torch.device("cpu"))


def call_ours(case: Case) -> object:
    """Call clipfast's own candidate once."""
    return call(case, case.ours, case.ours.make(), leaves(case, case.inputs()))
