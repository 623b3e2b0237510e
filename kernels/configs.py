"""Launch configurations: frozen dataclasses, looked up by kernel, architecture and operand.

Their numbers are committed in ``tuned/sm_<arch>.json``. Nothing is tuned at run time: an autotuner would make results
depend on a race of timings, and cannot run without a GPU. ``python -m clipfast.bench tune`` writes the files. Every
entry compiles for its architecture without a spill (bench/inspection/resources.json holds the proof).

The host's decisions about a launch follow from these tables and from the layout of the operands. They are made once
for each layout (:func:`planned`), and again after the tables or the GPU that launches are made for have changed.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from .hardware import ARCHITECTURES, architecture, target_name

TUNED = Path(__file__).parent / "tuned"
# The architectures, newest first. The table of an architecture holds the entries that were tuned on it. It also has an
# entry wherever that of an older table would spill or exceed the shared memory. If it lacks an entry, the tables that
# :attr:`Architecture.tables` names are searched in turn.
ARCHS = tuple(sorted(ARCHITECTURES, reverse=True))
# An attention kernel has an entry for head dimensions up to each limit in HEAD_DIMS. If it holds all keys, it has an
# entry for numbers of keys up to each limit in NUM_KEYS as well.
HEAD_DIMS = (64, 96, 128)
NUM_KEYS = (64, 128, 208, 256, 272)
# A kernel that holds whole rows has an entry for widths up to each of these limits.
WIDTHS = (1024, 2048, 4096, 8192)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """The compile options of a kernel that do not depend on the shape of its tile.

    Attributes:
        num_warps: warps of a program.
        num_stages: the number of loop steps whose loads are in flight at once.
        max_registers: registers that a thread may take, so that more programs run at once; None sets no limit.
    """

    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclasses.dataclass(frozen=True)
class GemmConfig(KernelConfig):
    """Tile of a matrix product: output BLOCK_M x BLOCK_N, reduction in steps of BLOCK_K."""

    block_m: int
    block_n: int
    block_k: int


@dataclasses.dataclass(frozen=True)
class ShortConfig(KernelConfig):
    """Tile of an attention kernel that holds all keys: BLOCK_M queries at a time."""

    block_m: int


@dataclasses.dataclass(frozen=True)
class LoopedConfig(KernelConfig):
    """Tile of an attention kernel that loops over keys or queries: BLOCK_M queries against BLOCK_N keys."""

    block_m: int
    block_n: int


@dataclasses.dataclass(frozen=True)
class RowConfig(KernelConfig):
    """Tile of a kernel that loops over rows: BLOCK_M rows, BLOCK_N columns at a time.

    A kernel that holds whole rows takes as many rows as fit into BLOCK_M * BLOCK_N elements.
    """

    block_m: int
    block_n: int


@dataclasses.dataclass(frozen=True)
class SdpaConfig:
    """The least numbers of keys for which PyTorch's attention is faster than ours, without and with a causal mask."""

    min_keys: int
    min_keys_causal: int


Config = KernelConfig | SdpaConfig
C = TypeVar("C", GemmConfig, ShortConfig, LoopedConfig, SdpaConfig, RowConfig)
P = ParamSpec("P")
R = TypeVar("R")
_overrides: dict[str, Config] = {}
# Texts come in many lengths, and batches in many sizes. Each planned function keeps this many results, those used last.
MOST_PLANS = 4096
_forget: list[Callable[[], None]] = []


def planned(decide: Callable[P, R]) -> Callable[P, R]:
    """Cache a function whose result depends on nothing but its arguments, the tables of launch configurations, and the
    GPU that kernels are launched for.
    """
    # The cache must tell 1 from 1.0, which are equal, because a kernel is compiled for only one of them.
    known: Any = functools.lru_cache(MOST_PLANS, typed=True)(decide)
    on_change(known.cache_clear)
    return known


def on_change(forget: Callable[[], None]) -> None:
    """Call ``forget`` when the tables of launch configurations, or the GPU that kernels are launched for, change."""
    _forget.append(forget)


def forget_plans() -> None:
    """Let every :func:`planned` function decide again, and every op forget its calls: the tables of launch
    configurations, or the GPU that kernels are launched for, have changed.
    """
    for forget in _forget:
        forget()


def gemm_config(kernel: str, arch: int, dtype: torch.dtype) -> GemmConfig:
    """Return the configuration of a matrix-product kernel on ``arch`` (90 for sm_90) for operands of ``dtype``."""
    return _lookup(GemmConfig, config_key(kernel, dtype), arch)


def smaller_gemm_configs(kernel: str, arch: int, dtype: torch.dtype) -> list[GemmConfig]:
    """Return the configurations with smaller tiles, if any, for products that would leave multiprocessors idle."""
    found = [_lookup_any(GemmConfig, config_key(f"{kernel}_{size}", dtype), arch) for size in ("half", "small")]
    return [config for config in found if config is not None]


def row_config(kernel: str, arch: int, dtype: torch.dtype, width: int | None = None) -> RowConfig:
    """Return the configuration of a kernel that loops over rows, or holds whole rows of ``width``, on ``arch``."""
    return _lookup(RowConfig, config_key(kernel, dtype, width=width), arch)


def looped_config(
    kernel: str, arch: int, dtype: torch.dtype, head_dim: int, num_keys: int | None = None
) -> LoopedConfig:
    """Return the configuration of an attention kernel that loops.

    The tables have a configuration for each head dimension, and for some numbers of keys a special one, which takes
    precedence. ``num_keys`` is None for packed sequences of several lengths.
    """
    if num_keys is not None and num_keys <= NUM_KEYS[-1]:
        found = _lookup_any(LoopedConfig, config_key(kernel, dtype, head_dim, num_keys), arch)
        if found is not None:
            return found
    return _lookup(LoopedConfig, config_key(kernel, dtype, head_dim), arch)


def short_config(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, num_keys: int) -> ShortConfig | None:
    """Return the configuration of an attention kernel that holds all keys, or None if they do not fit."""
    if num_keys > NUM_KEYS[-1]:
        return None
    return _lookup_any(ShortConfig, config_key(kernel, dtype, head_dim, num_keys), arch)


def sdpa_config(arch: int, dtype: torch.dtype, head_dim: int) -> SdpaConfig | None:
    """Return the least numbers of keys for which ``arch`` uses PyTorch's own attention, or None if it never was
    faster.
    """
    return _lookup_any(SdpaConfig, config_key("attention_sdpa", dtype, head_dim), arch)


@functools.cache
def config_key(
    kernel: str, dtype: torch.dtype, head_dim: int | None = None, num_keys: int | None = None, width: int | None = None
) -> str:
    """Return the name of a table entry: the kernel, the bits of its operands, and the sizes that the entry serves."""
    key = f"{kernel} {8 * dtype.itemsize}-bit"
    if head_dim is not None:
        key += f" head_dim<={min(limit for limit in HEAD_DIMS if head_dim <= limit)}"
    if num_keys is not None:
        key += f" keys<={min(limit for limit in NUM_KEYS if num_keys <= limit)}"
    if width is not None:
        key += f" width<={min(limit for limit in WIDTHS if width <= limit)}"
    return key


def override(key: str, config: Config) -> AbstractContextManager[None]:
    """Return a context in which ``config`` replaces entry ``key`` of the tables of launch configurations, on every
    architecture; for the tuner and tests.
    """
    return overrides({key: config})


@contextlib.contextmanager
def overrides(configs: Mapping[str, Config]) -> Iterator[None]:
    """Replace several entries of the tables of launch configurations, as :func:`override` does with one."""
    before = dict(_overrides)
    _overrides.update(configs)
    forget_plans()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        forget_plans()


def table_path(arch: int) -> Path:
    """Return the path of the committed table of launch configurations of ``arch``."""
    return TUNED / f"{target_name(arch)}.json"


def read_table(arch: int) -> dict[str, dict[str, int]]:
    """Return the committed launch configurations of ``arch``, by the names that :func:`config_key` returns.

    The field ``"by"`` is left out. It tells how the tuner chose an entry: "measured" on a GPU, or by the GPU "model".
    """
    table: dict[str, dict[str, Any]] = json.loads(table_path(arch).read_text())
    return {key: entry and {name: entry[name] for name in entry if name != "by"} for key, entry in table.items()}


def entry_of(config: Config) -> dict[str, int]:
    """Return a launch configuration in the form of a table entry, without the fields that are None."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


@functools.cache
def committed(key: str, arch: int) -> dict[str, int] | None:
    """Return the committed launch configuration ``key`` that serves ``arch``, or None if no table has it.

    The tables are searched in the order of :attr:`Architecture.tables`. An entry that is null ends the search too: it
    keeps the architecture from using the entry of a later table.
    """
    return next((table[key] for known in architecture(arch).tables if key in (table := read_table(known))), None)


def _lookup_any(kind: type[C], key: str, arch: int) -> C | None:
    """Return an overridden or committed launch configuration, or None."""
    cached: Any = kind  # mypy does not accept a class as an argument of a cached function
    config = _overrides.get(key) or _from_table(cached, key, arch)
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"{key}: expected a {kind.__name__}, got {config!r}")
    return config


@functools.cache
def _from_table(kind: Any, key: str, arch: int) -> Any:
    """Return the committed launch configuration of a key, or None."""
    entry = committed(key, arch)
    return kind(**entry) if entry else None


def _lookup(kind: type[C], key: str, arch: int) -> C:
    """Return a launch configuration, or raise an error if there is none."""
    config = _lookup_any(kind, key, arch)
    if config is None:
        raise KeyError(f"no configuration of {key} for {target_name(arch)}")
    return config
