"""Search launch configurations on the card at hand, and write the table that is committed.

For each kernel of an op, every configuration of a declared space is compiled first, for the card's architecture:
what spills, passes a limit or misses the tensor cores is dropped, and what is left is ranked by the bound that
``inspect`` reads from its machine code. The best few are timed, in turns with the committed one, on the whole op: a
kernel that is fast alone may leave the next one slow. A configuration whose error is larger than the committed one's is
refused; one that is faster beyond doubt, and by more than noise, takes its place. The table is written after each
kernel, so that a stop loses nothing.
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
from clipfast.kernels.spec import Target, Tunable

from .case import DTYPES, OURS, Candidate, Case, Sizes, call, short
from .harness import Budget, Timing, leaves, measure, ratio_interval
from .inspection import Report, inspect_launch, offline
from .inspection.shipped import small_tile_problems
from .machine import use
from .suites import build
from .tune_targets import TARGETS, key_of, space

# An error may not grow by more than this when sums are taken in another order.
ERROR_GROWTH = 1.5
# The whole interval of the ratio has to be below this.
WORTH = 0.98
MIN_ROUNDS = 20


def spread(configurations: Sequence[Config], limit: int | None) -> list[Config]:
    """At most ``limit`` of ``configurations``, from all over them."""
    step = len(configurations) / limit if limit and limit < len(configurations) else 1
    return [configurations[int(i * step)] for i in range(min(limit or len(configurations), len(configurations)))]


@contextlib.contextmanager
def compilers() -> Iterator[concurrent.futures.Executor]:
    """Processes that compile, one for each core; work that is waiting when they are left is dropped."""
    # spawned: a process that has touched a GPU must not be forked
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def prune(
    tunable: Tunable,
    target: Target,
    dtype: str,
    arch: int,
    candidates: Sequence[Config],
    keep: int,
    pool: concurrent.futures.Executor,
) -> list[tuple[Config, Report]]:
    """The ``keep`` best configurations that compile soundly for ``arch``, with their reports, best first; says how many
    do not, and why the first of them does not.
    """
    reports = list(pool.map(functools.partial(_inspect, tunable, target, dtype, arch), candidates))
    sound = [(c, r) for c, r in zip(candidates, reports, strict=True) if isinstance(r, Report) and not r.failures]
    if len(sound) < len(candidates):
        why = next(
            f"{config}: {report if isinstance(report, str) else '; '.join(report.failures)}"
            for config, report in zip(candidates, reports, strict=True)
            if isinstance(report, str) or report.failures
        )
        say(f"{len(candidates) - len(sound)} of {len(candidates)} configurations are not sound: {why}")
    return sorted(sound, key=lambda pair: pair[1].rank)[:keep]


def _inspect(tunable: Tunable, target: Target, dtype: str, arch: int, config: Config) -> Report | str:
    """The worst report of the kernel's launches under ``config``, or why one does not compile: it asks for more shared
    memory than there is, or for a tile that Triton refuses.

    Raises:
        RuntimeError: the op does not launch this kernel.
    """
    case = build(_suite(target), _small(target.shape.to_dict()), dtype, torch.device("cpu"))
    with configs.override(key_of(tunable, target, dtype), config):
        launches = offline.record(arch, functools.partial(_once, case))
    ours = [launch for launch in launches if launch.kernel.__name__ == tunable.function]
    if not ours:
        raise RuntimeError(f"{case.op} launches no {tunable.function}")
    try:
        known = small_tile_problems(arch) if tunable.small_tiles else ()
        reports = (dataclasses.replace(inspect_launch(launch, arch), known=known) for launch in ours)
        return max(reports, key=lambda report: report.rank)
    except Exception as error:
        # compilers raise many kinds; none is lost, prune says them
        return short(error)


def tune(
    op: str, dtype: str, device: torch.device, budget: Budget, keep: int, limit: int | None,
    pool: concurrent.futures.Executor,
) -> Iterator[tuple[str, Config | None]]:  # fmt: skip
    """Search the kernels of ``op`` on ``device``, one after another, each with what was found for those before.

    Yields:
        after each kernel, its entry's key and what is faster, or None if the committed configuration stays.
    """
    (_, target), arch = TARGETS[op], _table_arch(device)
    better: dict[str, Config] = {}
    for tunable in target.kernels:
        key = key_of(tunable, target, dtype)
        committed = _committed(tunable, arch, target, dtype)
        searched = spread(list(space(tunable)), limit)
        pruned = [c for c, _ in prune(tunable, target, dtype, arch, searched, keep, pool) if c != committed]
        say(f"{key}: timing {len(pruned)} configurations against {committed}")
        with _overrides(better):
            case = _case(target, dtype, device, key, pruned)
            timings, telemetry = measure(case, budget)
        winner = None if telemetry["throttled"] else best(timings, pruned)
        if winner is not None:
            better[key] = winner
        stays = "the card was throttled, nothing is changed" if telemetry["throttled"] else "the committed one stays"
        say(f"{key}: {stays if winner is None else f'{winner} instead'}")
        yield key, winner


def best(timings: Sequence[Timing], candidates: Sequence[Config]) -> Config | None:
    """The fastest configuration that is beyond doubt faster than the committed one and no less accurate.

    Args:
        timings: the committed one's first, then one for each of ``candidates``.
    """
    committed, *others = timings
    if committed.refused is not None:
        raise RuntimeError(f"the committed configuration cannot be timed: {committed.refused}")
    found: list[tuple[float, Config]] = []
    for timing, config in zip(others, candidates, strict=True):
        if timing.refused is not None or _less_accurate(timing, committed):
            continue
        ratio, _, high = ratio_interval(committed.samples, timing.samples)
        if high < WORTH:
            found.append((ratio, config))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def write_table(entries: dict[str, Config], arch: int, folder: Path = configs.TUNED) -> Path:
    """Put ``entries`` into the table of ``arch`` in ``folder``, in the order of their names; where there is none, it
    starts as the committed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{arch}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(configs.read_table(arch))
    table |= {key: dataclasses.asdict(config) for key, config in entries.items()}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def run(args: Any) -> int:
    """Tune what the parsed command line names, or with ``--dry`` rank configurations without a card."""
    ops = list(TARGETS) if "all" in args.op else args.op
    if args.dry:
        with compilers() as pool:
            for op in ops:
                _print_ranking(op, args.dtype, args.arch, args.keep, args.limit, pool)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("tuning needs the GPU that is tuned for: --dry ranks configurations without one")
    device = use(torch.device("cuda"))
    name = torch.cuda.get_device_name(device)
    if args.card is None or args.card.lower() not in name.lower():
        raise ValueError(f"--card must name the card that is tuned for, part of {name!r}, got {args.card!r}")
    return _tune_all(ops, args, device)


def _tune_all(ops: Sequence[str], args: Any, device: torch.device) -> int:
    start, failed = time.monotonic(), 0
    with compilers() as pool:
        for op in ops:
            budget = Budget(args.seconds, min_rounds=MIN_ROUNDS)
            try:
                for key, config in tune(op, args.dtype, device, budget, args.keep, args.limit, pool):
                    write_table({key: config} if config is not None else {}, _table_arch(device), args.tables)
                    if time.monotonic() - start > args.total:
                        say(f"{args.total:.0f} s are over: nothing is tuned after {key}")
                        return 1 if failed else 0
            except RuntimeError as error:
                # one op that cannot be tuned does not keep the others from it
                say(f"{op}: {short(error)}")
                failed += 1
    say("now run: clipfast verify, clipfast inspect, and tests/kernels/test_offline.py --update-resources")
    return 1 if failed else 0


def add_arguments(parser: Any) -> None:
    """Options of the tuner."""
    parser.add_argument("--op", nargs="+", default=["all"], choices=("all", *TARGETS))
    parser.add_argument("--card", help="part of the name of the card here, such as H100: says that you mean this one")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--keep", type=int, default=8, help="configurations to time for each kernel (default 8)")
    parser.add_argument("--seconds", type=float, default=10, help="time for each kernel (default 10)")
    parser.add_argument(
        "--total", type=float, default=float("inf"), metavar="SECONDS", help="begin no kernel after this long"
    )
    parser.add_argument("--tables", type=Path, default=configs.TUNED, help="folder of the tables to write")
    parser.add_argument("--dry", action="store_true", help="compile and rank only; needs no GPU, changes nothing")
    parser.add_argument("--arch", type=int, default=90, choices=configs.ARCHS, help="for --dry (default 90)")
    parser.add_argument(
        "--limit", type=int, default=None, help="configurations to compile for each kernel (default: all)"
    )


def _print_ranking(
    op: str, dtype: str, arch: int, keep: int, limit: int | None, pool: concurrent.futures.Executor
) -> None:
    _, target = TARGETS[op]
    for tunable in target.kernels:
        committed = _committed(tunable, arch, target, dtype)
        searched = list(space(tunable))
        chosen = [committed, *(config for config in spread(searched, limit) if config != committed)]
        print(f"{key_of(tunable, target, dtype)} on sm_{arch}, {len(chosen)} of {len(searched)} configurations:")
        for config, report in prune(tunable, target, dtype, arch, chosen, keep, pool):
            note = "  <- committed" if config == committed else ""
            share = f"{100 * report.bound.share:.0f}%" if report.bound is not None else "unknown"
            print(f"  bound {share:>7}  {report.resources.registers:3} registers  {config}{note}", flush=True)


def say(text: str) -> None:
    """Progress, at once: a tuner that is stopped has said what it knew."""
    print(text, flush=True)


def _case(target: Target, dtype: str, device: torch.device, key: str, candidates: Sequence[Config]) -> Case:
    case = build(_suite(target), target.shape.to_dict(), dtype, device)
    ours = next(c for c in case.candidates if c.name == OURS)
    changed = [
        Candidate(str(config), ours.make, context=functools.partial(configs.override, key, config))
        for config in candidates
    ]
    return dataclasses.replace(case, candidates=(ours, *changed))


def _suite(target: Target) -> str:
    spec, _ = TARGETS[target.name]
    return spec.suite_name


def _less_accurate(timing: Timing, committed: Timing) -> bool:
    return any(not error <= ERROR_GROWTH * committed.errors[name] + 1e-7 for name, error in timing.errors.items())


def _committed(tunable: Tunable, arch: int, target: Target, dtype: str) -> Config:
    key = key_of(tunable, target, dtype)
    entry = configs.committed(key, arch)
    if entry is None:
        raise ValueError(f"{key}: another kernel serves it on sm_{arch}, so that there is nothing to compare with")
    return tunable.kind(**entry)


def _table_arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return next(arch for arch in configs.ARCHS if arch <= 10 * major + minor)


def _overrides(entries: dict[str, Config]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for key, config in entries.items():
        stack.enter_context(configs.override(key, config))
    return stack


def _small(shape: Sizes) -> Sizes:
    """The same shape with a small batch: what is compiled does not depend on it, but empty tensors take memory."""
    small = {"pairs": 1024, "images": 1024, "texts": 5120, "batch": 2, "rows": 1024}
    return {key: small.get(key, value) for key, value in shape.items()}


def _once(case: Case) -> object:
    ours = next(candidate for candidate in case.candidates if candidate.name == OURS)
    return call(case, ours, ours.make(), leaves(case, case.inputs()))
