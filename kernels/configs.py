"""Launch configurations: frozen dataclasses, looked up by kernel, architecture and operand.

Numbers are committed, in ``tuned/sm_<arch>.json``, not tuned at run time: an autotuner would make results depend on a
race of timings, and cannot run without a GPU. ``python -m clipfast.bench tune`` writes the files. Every entry compiles
for its architecture without a spill (tests/kernels/resources.json holds the proof).
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

TUNED = Path(__file__).parent / "tuned"
# Newest first: an architecture takes the entry of the newest that is not newer than itself.
ARCHS = (100, 90, 80)
# Attention has one entry for each of these largest head dimensions.
HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile of a matrix product: output BLOCK_M x BLOCK_N, reduction in steps of BLOCK_K."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Tile of an attention kernel: BLOCK_M queries against BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Tile of a kernel that walks rows: BLOCK_M rows, BLOCK_K columns at a time."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


C = TypeVar("C", GemmConfig, AttentionConfig, RowConfig)
_overrides: dict[str, GemmConfig | AttentionConfig | RowConfig] = {}


def gemm_config(kernel: str, arch: int, dtype: torch.dtype) -> GemmConfig:
    """Configuration of a matrix-product kernel for compute capability ``arch`` (90: sm_90) and ``dtype`` operands."""
    return _lookup(GemmConfig, config_key(kernel, dtype), arch)


def row_config(kernel: str, arch: int, dtype: torch.dtype) -> RowConfig:
    """Configuration of a row-walking kernel for compute capability ``arch`` and operands of ``dtype``."""
    return _lookup(RowConfig, config_key(kernel, dtype), arch)


def attention_config(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """Configuration of an attention kernel for compute capability ``arch``, operands of ``dtype`` and ``head_dim``."""
    return _lookup(AttentionConfig, config_key(kernel, dtype, head_dim), arch)


def config_key(kernel: str, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """Name of an entry in the tables: kernel, width of the operands, and the head dimensions that it serves."""
    key = f"{kernel} {8 * dtype.itemsize}-bit"
    return key if head_dim is None else f"{key} head_dim<={min(limit for limit in HEAD_DIMS if head_dim <= limit)}"


@contextlib.contextmanager
def override(key: str, config: GemmConfig | AttentionConfig | RowConfig) -> Iterator[None]:
    """Use ``config`` for the entry :func:`config_key` names, on every architecture: for the tuner and for tests."""
    before = dict(_overrides)
    _overrides[key] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def read_table(arch: int) -> dict[str, dict[str, int]]:
    """The committed entries of compute capability ``arch``, by :func:`config_key`."""
    table: dict[str, dict[str, int]] = json.loads((TUNED / f"sm_{arch}.json").read_text())
    return table


@functools.cache
def committed(key: str, arch: int) -> dict[str, int]:
    """The entry of the tables that serves compute capability ``arch``."""
    return next(table[key] for known in ARCHS if known <= arch and key in (table := read_table(known)))


def _lookup(kind: type[C], key: str, arch: int) -> C:
    config = _overrides.get(key) or kind(**committed(key, arch))
    if not isinstance(config, kind):
        raise TypeError(f"{key}: expected a {kind.__name__}, got {config!r}")
    return config
