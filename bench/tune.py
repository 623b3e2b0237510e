"""The tuner: it searches launch configurations on this machine's GPU, and writes the table that is committed.

For each kernel of an op, every configuration of its search space is first compiled for the GPU's architecture. Those
that spill registers, exceed a limit or miss the tensor cores are dropped. The others are ranked by their time on an
H100 in the model of ``clipfast inspect --predict``, and on other GPUs by the warps that fit on a multiprocessor.

With a GPU, the best few are timed, in turns with the committed one, on the whole op, since a kernel that is fast alone
may slow down the next one. A configuration whose error is larger than the committed one's is refused. One that is
surely faster, by more than noise, takes its place. Without a GPU, ``--by model`` lets the model choose among the best
few. Its entries say so in the tables, and never replace one that was measured. The table is written after each kernel,
so that a stop loses nothing.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipfast.cli.arguments import COUNT
from clipfast.io.files import replace_text
from clipfast.kernels import configs
from clipfast.kernels.configs import Config
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.launch import Launch
from clipfast.kernels.spec import OpSpec, Target, Tunable, specs

from .case import Candidate, short
from .harness import Budget, Timing, measure, ratio_interval
from .inspection import offline, shipped
from .inspection.command import inspect_launch
from .inspection.forecast import op_work, predict_parts
from .inspection.model import ARCH, FULL, H100, QUICK, Effort
from .inspection.offline import compilers
from .inspection.report import Report
from .machine import use
from .suites import build, rivals

# An error may grow by at most this factor. It may grow at all because sums are then taken in another order.
ERROR_GROWTH = 1.5
# A configuration replaces the committed one if the 95% interval of its time over the committed one's is below this.
WORTH = 0.98
MIN_ROUNDS = 20
# By the model, a configuration counts as faster if the ratio of predicted times is below this; see docs/gpu-model.md.
WORTH_BY_MODEL = 0.95
MEASURED, MODEL = "measured", "model"
_TILES, _SMALL_TILES, _STAGES = (64, 128, 256), (16, 32, 64, 128), (1, 2, 3, 4)
_REGISTERS = (None, 128, 168)  # no limit; four or three programs of four warps on a multiprocessor
# The values to search for each field of a configuration.
SPACES: dict[type[Config], dict[str, tuple[int | None, ...]]] = {
    configs.GemmConfig: {
        "block_m": _TILES, "block_n": _TILES, "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": _STAGES,
    },
    configs.RowConfig: {
        "block_m": (4, 8, 16, 32), "block_n": _TILES, "num_warps": (2, 4, 8), "num_stages": (1,),
    },
    configs.ShortConfig: {
        "block_m": _SMALL_TILES, "num_warps": (4, 8), "num_stages": _STAGES, "max_registers": _REGISTERS,
    },
    configs.LoopedConfig: {
        "block_m": _SMALL_TILES, "block_n": _SMALL_TILES, "num_warps": (4, 8), "num_stages": _STAGES,
        "max_registers": _REGISTERS,
    },
}  # fmt: skip
TARGETS: dict[str, tuple[OpSpec, Target]] = {
    target.name: (spec, target) for spec in specs().values() for target in spec.targets
}
# The target in ``--op`` that finds from how many keys on PyTorch's attention is faster than ours, and the numbers of
# keys at which both are timed.
SDPA, SDPA_TOKENS = "attention_sdpa", (50, 77, 197, 257, 577)
NEVER = 1 << 30  # more keys than any model has, so that PyTorch's attention is never taken
# Progress is not buffered, so a tuner that is stopped has printed all that it found.
say = functools.partial(print, flush=True)


def space(tunable: Tunable) -> Iterator[Config]:
    """Iterate over every configuration that the tuner tries for a kernel."""
    axes = {**SPACES[tunable.kind], **tunable.axes}
    for values in itertools.product(*axes.values()):
        fields: dict[str, Any] = dict(zip(axes, values, strict=True))
        yield tunable.kind(**fields)


def key_of(tunable: Tunable, target: Target, dtype: str) -> str:
    """Return the key of the table entry that the tuner determines."""
    sizes = target.shape.to_dict()
    head_dim = sizes.get("head_dim")
    has_length = tunable.kind in (configs.ShortConfig, configs.LoopedConfig) and not tunable.any_length
    num_keys = sizes["tokens"] if has_length else None
    if num_keys is not None and num_keys > configs.NUM_KEYS[-1]:
        num_keys = None
    width = sizes["width"] if tunable.per_width else None
    whole = (size if isinstance(size, int) else None for size in (head_dim, num_keys, width))
    return configs.config_key(tunable.kernel, DTYPES[dtype], *whole)


@dataclasses.dataclass(frozen=True)
class Search:
    """The settings of a search for launch configurations, for operands of a dtype on an architecture."""

    dtype: str
    arch: int
    keep: int  # how many configurations of a kernel are timed
    limit: int | None  # how many configurations are compiled; None: all
    pool: concurrent.futures.Executor  # the processes that compile them

    def configurations(self, tunable: Tunable) -> list[Config]:
        """Return the configurations of a kernel that the tuner compiles, spread evenly over all of them."""
        found = list(space(tunable))
        return found if self.limit is None else found[:: max(1, -(-len(found) // self.limit))]


class Ranked(NamedTuple):
    """A configuration, the worst report of the kernel's launches, and the predicted seconds of all of them."""

    config: Config
    report: Report
    seconds: float  # infinite if the GPU model does not describe the architecture

    @property
    def rank(self) -> tuple[Any, ...]:
        """Return the key by which the tuner sorts configurations of a kernel, the best first."""
        is_unsound, *others = self.report.rank
        return is_unsound, self.seconds, *others


def prune(
    tunable: Tunable, target: Target, candidates: Sequence[Config], search: Search, effort: Effort = QUICK
) -> list[Ranked]:
    """Return the best usable configurations of a kernel that the tuner has compiled, the best first.

    A usable configuration compiles, and its report has no failure. Print the number of unusable ones, and the reason
    for the first of them.
    """
    say(f"{key_of(tunable, target, search.dtype)}: compiling {len(candidates)} configurations")
    inspect = functools.partial(_inspect, tunable, target, search.dtype, search.arch, effort)
    sound, reasons = [], []
    for config, found in zip(candidates, search.pool.map(inspect, candidates), strict=True):
        if isinstance(found, Ranked) and not found.report.failures:
            sound.append(found)
        else:
            reason = "; ".join(found.report.failures) if isinstance(found, Ranked) else found
            reasons.append(f"{config}: {reason}")
    if reasons:
        say(f"{len(reasons)} of {len(candidates)} configurations are not sound: {reasons[0]}")
    return sorted(sound, key=lambda one: one.rank)[: search.keep]


def _inspect(tunable: Tunable, target: Target, dtype: str, arch: int, effort: Effort, config: Config) -> Ranked | str:
    """Report and predict the kernel's launches under ``config``, or return why one does not compile."""
    with configs.override(key_of(tunable, target, dtype), config):
        ours = [one for one in launches(target, dtype, arch) if tunable.function in ("", one.kernel.__name__)]
    if not ours:
        raise RuntimeError(f"{target.name} launches no {tunable.function}")
    known = shipped.small_tile_problems(arch) if tunable.small_tiles else ()
    try:
        reports = [
            dataclasses.replace(inspect_launch(one, arch, predicts=False), known=known)
            for one in offline.distinct(ours)
        ]
        seconds = float("inf")
        if arch == ARCH and not any(report.failures for report in reports):
            seconds = sum(part.seconds for part in predict_parts(ours, H100, effort))
        return Ranked(config, max(reports, key=lambda report: report.rank), seconds)
    except Exception as error:
        # The kernel may need too much shared memory, or Triton may refuse its tile. ``prune`` prints the reason.
        return short(error)


def launches(target: Target, dtype: str, arch: int) -> list[Launch]:
    """Record the launches of ``target`` at its size for the tuner, on tensors without memory."""
    spec, _ = TARGETS[target.name]
    return op_work(spec, target.shape, dtype, arch).launches


# A function that returns for a head dimension from how many keys on attention is PyTorch's, or None.
Route = Callable[[int, Search], configs.SdpaConfig | None]
# A function that returns a better configuration of a kernel than the committed one, or None.
Choose = Callable[[Tunable, Target, Config, Search], Config | None]


def tune(op: str, search: Search, choose: Choose) -> Iterator[tuple[str, Config | None]]:
    """Tune the kernels of ``op`` one after another, with the winners for earlier kernels in use.

    Yields:
        After each kernel, the key of its table entry, and a better configuration or None if the committed one stays.
    """
    _, target = TARGETS[op]
    with contextlib.ExitStack() as better:
        for tunable in target.kernels:
            key, committed = key_of(tunable, target, search.dtype), _committed(tunable, target, search)
            winner = choose(tunable, target, committed, search)
            say(f"{key}: {committed}{' stays' if winner is None else f' gives way to {winner}'}")
            if winner is not None:
                better.enter_context(configs.override(key, winner))
            yield key, winner


def by_timing(
    tunable: Tunable, target: Target, committed: Config, search: Search, device: torch.device, budget: Budget
) -> Config | None:
    """Choose a configuration by timing the whole op; return None if the card was throttled meanwhile."""
    spec, _ = TARGETS[target.name]
    case = build(spec.suite_name, target.shape.to_dict(), search.dtype, device)
    found = prune(tunable, target, search.configurations(tunable), search)
    pruned = [one.config for one in found if one.config != committed]
    override = functools.partial(configs.override, key_of(tunable, target, search.dtype))
    changed = [
        dataclasses.replace(case.ours, name=str(config), context=functools.partial(override, config))
        for config in pruned
    ]
    timings, telemetry = measure(dataclasses.replace(case, candidates=(case.ours, *changed)), budget)
    if telemetry["throttled"]:
        say("the card was throttled: nothing is changed")
        return None
    return best(timings, pruned)


def best(timings: Sequence[Timing], candidates: Sequence[Config]) -> Config | None:
    """Return the fastest configuration that is surely faster than the committed one and no less accurate, or None.

    The first of ``timings`` belongs to the committed configuration, and the others belong to ``candidates``.
    """
    committed, *others = timings
    if committed.refused is not None:
        raise RuntimeError(f"the committed configuration cannot be timed: {committed.refused}")
    found: list[tuple[float, Config]] = []
    for timing, config in zip(others, candidates, strict=True):
        limits = {name: ERROR_GROWTH * error + 1e-7 for name, error in committed.errors.items()}
        # A NaN error fails this comparison, and so refuses the configuration.
        if timing.refused is not None or not all(error <= limits[name] for name, error in timing.errors.items()):
            continue
        ratio, _, high = ratio_interval(committed.samples, timing.samples)
        if high < WORTH:
            found.append((ratio, config))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def sdpa_route(head_dim: int, search: Search, device: torch.device, budget: Budget) -> configs.SdpaConfig | None:
    """Return from how many keys on PyTorch's own attention is surely faster than ours, by timings of both.

    The result is None if it never is, or if the card was throttled.
    """
    key, least = configs.config_key(SDPA, DTYPES[search.dtype], head_dim), []
    with configs.override(key, configs.SdpaConfig(NEVER, NEVER)):  # so our attention runs, whatever a table says
        for causal in (False, True):
            least.append(NEVER)
            for tokens in reversed(SDPA_TOKENS):
                shape = {"batch": 64, "tokens": tokens, "heads": 12, "head_dim": head_dim, "causal": causal}
                case = build("attention", shape, search.dtype, device)
                theirs = Candidate("SDPA", functools.partial(rivals.sdpa, None, 12, causal))
                timings, telemetry = measure(dataclasses.replace(case, candidates=(case.ours, theirs)), budget)
                if telemetry["throttled"]:
                    say("the card was throttled: nothing is changed")
                    return None
                ours, other = timings
                if ours.refused or other.refused or ratio_interval(ours.samples, other.samples)[2] >= WORTH:
                    break
                least[-1] = tokens
    return configs.SdpaConfig(*least) if min(least) < NEVER else None


def tune_routes(search: Search, route: Route | None) -> Iterator[tuple[str, Config | None]]:
    """Find for each head dimension from how many keys on attention is PyTorch's, as :func:`tune` finds kernels."""
    if route is None:  # no model predicts PyTorch's kernel
        return
    for head_dim in configs.HEAD_DIMS:
        key, found = configs.config_key(SDPA, DTYPES[search.dtype], head_dim), route(head_dim, search)
        say(f"{key}: {'ours stays' if found is None else f'PyTorch is faster: {found}'}")
        yield key, found


def by_model(tunable: Tunable, target: Target, committed: Config, search: Search) -> Config | None:
    """Choose a configuration for the tuner by the predicted times of the kernel's launches."""
    few = [one.config for one in prune(tunable, target, search.configurations(tunable), search)]
    found = prune(tunable, target, [committed, *(one for one in few if one != committed)], search, FULL)
    before = next((one.seconds for one in found if one.config == committed), float("inf"))
    return found[0].config if found and found[0].seconds < WORTH_BY_MODEL * before else None


def write_table(entries: dict[str, Config], arch: int, folder: Path = configs.TUNED, *, by: str) -> Path:
    """Add ``entries`` to the table of ``arch`` in ``folder``, and return its path.

    They replace entries with the same keys, but an entry that the model chose does not replace a measured one. A table
    that does not exist yet starts as a copy of the committed one. ``by`` says how the entries were chosen: ``MEASURED``
    or ``MODEL``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{arch}.json"
    table: dict[str, Any] = json.loads((path if path.exists() else configs.table_path(arch)).read_text())
    for key, config in entries.items():
        if by == MODEL and (table.get(key) or {}).get("by") == MEASURED:
            say(f"{key}: the entry that was measured stays")
        else:
            table[key] = configs.entry_of(config) | {"by": by}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items())]
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def run(args: Any) -> int:
    """Tune the ops that the parsed command line names."""
    arch, choose = ARCH, by_model
    route: Route | None = None
    if args.by == MEASURED:
        if torch.version.hip is not None:
            raise ValueError("the tuner compiles for GPUs of NVIDIA only")
        if not torch.cuda.is_available():
            raise ValueError("tuning needs the GPU that is tuned for: --by model does without one")
        device = use(torch.device("cuda"))
        name = torch.cuda.get_device_name(device)
        if args.card is None or args.card.lower() not in name.lower():
            raise ValueError(f"--card must name the card that is tuned for, part of {name!r}, got {args.card!r}")
        # The card is served by the table of the newest architecture that is not newer than the card.
        major, minor = torch.cuda.get_device_capability(device)
        arch = next(known for known in configs.ARCHS if known <= 10 * major + minor)
        budget = Budget(args.seconds, min_rounds=MIN_ROUNDS)
        choose = functools.partial(by_timing, device=device, budget=budget)
        route = functools.partial(sdpa_route, device=device, budget=budget)
    with compilers(os.cpu_count() or 1) as pool:
        return tune_all(named(args.op), args, Search(args.dtype, arch, args.keep, args.limit, pool), choose, route)


def named(ops: Sequence[str]) -> list[str]:
    """Return the names of the targets that ``ops`` name (targets, ops or "all"), each once, in the order of ``ops``."""
    names = {name: (name, spec.name, "all") for name, (spec, _) in TARGETS.items()} | {SDPA: (SDPA, "attention", "all")}
    return list(dict.fromkeys(name for op in ops for name, found in names.items() if op in found))


def tune_all(ops: Sequence[str], args: Any, search: Search, choose: Choose, route: Route | None = None) -> int:
    """Tune ``ops`` until the time is over, write each winner to the table, and return the exit status."""
    start, failed = time.monotonic(), 0
    for op in ops:
        try:
            for key, config in tune_routes(search, route) if op == SDPA else tune(op, search, choose):
                write_table({key: config} if config is not None else {}, search.arch, args.tables, by=args.by)
                if time.monotonic() - start > args.total:
                    say(f"{args.total:.0f} s are over: nothing is tuned after {key}")
                    return 1 if failed else 0
        except RuntimeError as error:
            # If one op cannot be tuned, the other ops are still tuned.
            say(f"{op}: {short(error)}")
            failed += 1
    say("now run: clipfast verify, clipfast inspect, and tests/kernels/test_offline.py --update-resources")
    return 1 if failed else 0


def _committed(tunable: Tunable, target: Target, search: Search) -> Config:
    """Return the committed configuration of a kernel to tune; refuse a kernel without one on this architecture."""
    key = key_of(tunable, target, search.dtype)
    entry = configs.committed(key, search.arch)
    if entry is None:
        raise ValueError(f"{key}: another kernel serves it on sm_{search.arch}, so there is nothing to compare with")
    return tunable.kind(**entry)


def add_arguments(parser: Any) -> None:
    """Add the options of the tuner of launch configurations."""
    add = parser.add_argument
    ops = dict.fromkeys(["all", *(spec.name for spec, _ in TARGETS.values()), *TARGETS, SDPA])
    add("--op", nargs="+", default=["all"], choices=tuple(ops))
    add("--card", help="part of the name of this machine's GPU, such as H100, to confirm that you mean it")
    add("--dtype", default="bf16", choices=tuple(DTYPES))
    add("--keep", type=COUNT, default=8, help="configurations to time for each kernel (default 8)")
    add("--seconds", type=float, default=10, help="time for each kernel (default 10)")
    add("--total", type=float, default=float("inf"), metavar="SECONDS", help="begin no further kernel after this time")
    add("--tables", type=Path, default=configs.TUNED, metavar="FOLDER", help="folder of the tables to write")
    by = "time on this machine's GPU, or choose by the model of an H100, without a GPU (default: measured)"
    add("--by", default=MEASURED, choices=(MEASURED, MODEL), help=by)
    add("--limit", type=COUNT, default=None, help="configurations to compile for each kernel (default: all)")
