"""Matrix products of other projects for the validation, called as these projects call them, with the bytes they move.

Each function takes the folder of sources and the columns of a figure, and returns the launches. A product that is tuned
on the GPU has several variants, and the fastest one counts.

A tiled product reads panels from device memory: each wave of blocks reads the row panels of A and the column panels of
B that it needs once, unless they are still in L2 from earlier waves. The blocks of a wave advance along K together, so
they share the data that they read.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.autotuner import Autotuner

from clipfast.kernels.hardware import FP8_SPEEDUP

from .recording import MULTIPROCESSORS, Launched, Other, Recorded, recording
from .sources import gluon, module

HALF = 2  # bytes of an element in 16 bits
# The part of an H100's 50 MB of L2 that is assumed to hold panels.
L2_BYTES = 40e6
Wave = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Work:
    """The launches of one configuration that computes the case of a figure.

    Attributes:
        launches: the launches, each with the bytes that it moves from and to device memory; None counts each tensor
        once.
        others: kernels of PyTorch in the same pass.
        flops: the FLOPs of the case, as the source counts them for its rate.
        variant: the name of the configuration that an autotuner could choose.
    """

    launches: tuple[tuple[Launched, float | None], ...]
    others: tuple[Other, ...] = ()
    flops: float = 0.0
    variant: str = ""


def of(found: Recorded, flops: float = 0.0, *, moved: float | None = None, variant: str = "") -> Work:
    """Return the recorded launches of a published kernel as the work of one figure; each moves ``moved`` bytes."""
    return Work(tuple((one, moved) for one in found.launches), tuple(found.others), flops, variant)


def half(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = False) -> torch.Tensor:
    """Return an uninitialised 16-bit tensor, as an argument of a recorded kernel."""
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def panel_bytes(waves: Iterable[Wave], *, a_panel: float, b_panel: float) -> float:
    """Return the bytes that a tiled product reads; ``waves`` has the row and column of each tile of each wave."""
    total = 0.0
    held: collections.OrderedDict[tuple[str, int], float] = collections.OrderedDict()
    for tiles in waves:
        panels = {("a", row): a_panel for row, _ in tiles} | {("b", column): b_panel for _, column in tiles}
        total += sum(size for panel, size in panels.items() if panel not in held)
        for panel, size in panels.items():
            held[panel] = size
            held.move_to_end(panel)
        while held and sum(held.values()) > L2_BYTES:
            held.popitem(last=False)
    return total


def row_major(rows: int, columns: int, at_once: int) -> Iterator[Wave]:
    """Yield the waves of a published kernel's grid in which neighbouring programs differ in the row."""
    yield from _waves([(tile % rows, tile // rows) for tile in range(rows * columns)], at_once)


def grouped(rows: int, columns: int, at_once: int, group: int) -> Iterator[Wave]:
    """Yield the waves of a published kernel's grid that takes ``group`` rows at a time, as Triton's tutorial does."""
    tiles = []
    for tile in range(rows * columns):
        first = tile // (group * columns) * group
        size = min(rows - first, group)
        within = tile % (group * columns)
        tiles.append((first + within % size, within // size))
    yield from _waves(tiles, at_once)


def _waves(tiles: Wave, at_once: int) -> Iterator[Wave]:
    """Divide the tiles of a published kernel's grid into waves of tiles that run at once."""
    for first in range(0, len(tiles), at_once):
        yield tiles[first : first + at_once]


# Gluon tutorials: M = N = 8192, float16


def _product(call: Callable[..., object], block: Sequence[int], k: int, order: Callable[..., Any]) -> list[Work]:
    """Record a product of the Gluon tutorials, with the bytes that it moves."""
    m = n = 8192
    with recording() as found:
        call(half(m, k), half(k, n), half(m, n))
    block_m, block_n = block[:2]
    launched = found.launches[0]
    at_once = MULTIPROCESSORS * (2 if launched.compiled.metadata.shared < 114_000 and block_m * block_n <= 16384 else 1)
    panels = {"a_panel": block_m * k * HALF, "b_panel": block_n * k * HALF}
    moved = panel_bytes(order(m // block_m, n // block_n, at_once), **panels) + m * n * HALF
    return [of(found, 2.0 * m * n * k, moved=moved)]


def gluon_synchronous(folder: Path, block_m: int, block_n: int, block_k: int, warps: int) -> list[Work]:
    """Launch the Gluon product that waits for each load and each wgmma."""
    run = gluon(folder, "wgmma").blocked_matmul
    block = block_m, block_n, block_k
    return _product(lambda a, b, c: run(a, b, c, *block, False, warps), block, 16384, row_major)


def gluon_overlapped(folder: Path, block_m: int, block_n: int, block_k: int, warps: int) -> list[Work]:
    """Launch the Gluon product that loads while wgmma runs."""
    run = gluon(folder, "wgmma").blocked_matmul_pipelined
    block = block_m, block_n, block_k
    return _product(lambda a, b, c: run(a, b, c, *block, warps), block, 16384, row_major)


def gluon_pipelined(folder: Path, k: int, block_k: int, buffers: int) -> list[Work]:
    """Launch the Gluon product with several buffers, one tile for each program."""
    run = gluon(folder, "persistence").matmul_pipelined
    return _product(lambda a, b, c: run(a, b, c, 128, 256, block_k, buffers, 8), (128, 256), k, row_major)


def gluon_persistent(folder: Path, k: int, block_k: int, buffers: int, name: str = "persistent_matmul") -> list[Work]:
    """Launch the Gluon product whose programs each compute several tiles."""
    tutorial = gluon(folder, "persistence")
    run, scheduler = getattr(tutorial, name), tutorial.PersistentTileScheduler
    return _product(lambda a, b, c: run(a, b, c, 128, 256, block_k, buffers, 8, scheduler), (128, 256), k, _chunked)


def gluon_persistent_pipelined(folder: Path, k: int, block_k: int, buffers: int) -> list[Work]:
    """Launch the Gluon product that loads the next tile's panels while it stores a tile."""
    return gluon_persistent(folder, k, block_k, buffers, "persistent_matmul_pipelined")


def _chunked(rows: int, columns: int, at_once: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the tiles that run at once if each program of a published kernel takes a run of neighbouring tiles."""
    tiles = [(tile % rows, tile // rows) for tile in range(rows * columns)]
    each = -(-len(tiles) // at_once)
    for step in range(each):
        yield [tiles[first + step] for first in range(0, len(tiles), each) if step < len(tiles) - first]


# Products of the Triton tutorial: one of two bfloat16 matrices, and one of a bfloat16 with an int16 matrix


def bf16_product(folder: Path, m: int, n: int, k: int) -> list[Work]:
    """Launch tutorial 03's product in bfloat16, in the configuration that the source names."""
    kernels = module(folder, "integer product")
    a, b = half(m, k, dtype=torch.bfloat16), half(k, n, dtype=torch.bfloat16)
    wanted = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 64, "num_stages": 3, "num_warps": 8}
    return [_tutorial_product(kernels.bf16xbf16_matmul_kernel, kernels.bf16xbf16_matmul, a, b, wanted)]


def integer_product(folder: Path, m: int, n: int, k: int) -> list[Work]:
    """Launch tutorial 03's product with an int16 right operand, which the kernel converts to bfloat16.

    Under the current Triton, the configuration that the source names needs more shared memory than there is, and the
    autotuner would choose another one. Therefore the autotuner's configurations with large tiles are tried.
    """
    kernels = module(folder, "integer product")
    tuner, call = kernels.bf16xint16_matmul_kernel, kernels.bf16xint16_matmul
    a, b = half(m, k, dtype=torch.bfloat16), torch.empty(k, n, dtype=torch.int16)
    works = []
    for config in tuner.configs:
        wanted = config.kwargs | {"num_stages": config.num_stages, "num_warps": config.num_warps}
        if wanted["BLOCK_SIZE_M"] * wanted["BLOCK_SIZE_N"] >= 128 * 128:
            works.append(_tutorial_product(tuner, call, a, b, wanted))
    return works


def scaled_product(folder: Path, m: int, n: int, k: int, result: str, by: str) -> list[Work]:  # noqa: ARG001
    """Return a product of rows in 8 bits, which is no kernel of Triton and takes the rate of ``FP8_SPEEDUP``."""
    flops, out = 2.0 * m * n * k, m * n * (1 if result == "e4m3" else HALF)
    return [Work((), (Other("_scaled_mm", (m + n) * k + out, round(flops / FP8_SPEEDUP)),), flops)]


def _tutorial_product(
    tuner: Autotuner, call: Callable[..., object], a: torch.Tensor, b: torch.Tensor, wanted: dict[str, int]
) -> Work:
    """Record the product of Triton's tutorial in one configuration."""
    with configured(tuner, **wanted), recording() as found:
        call(a, b)
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n = wanted["BLOCK_SIZE_M"], wanted["BLOCK_SIZE_N"]
    order = grouped(-(-m // block_m), -(-n // block_n), MULTIPROCESSORS, wanted.get("GROUP_SIZE_M", 8))
    moved = panel_bytes(order, a_panel=block_m * k * HALF, b_panel=block_n * k * HALF) + m * n * HALF
    variant = f"{block_m}x{block_n}x{wanted['BLOCK_SIZE_K']} w{wanted['num_warps']} s{wanted['num_stages']}"
    return of(found, 2.0 * m * n * k, moved=moved, variant=variant)


@contextlib.contextmanager
def configured(tuner: Autotuner, **wanted: int) -> Iterator[None]:
    """Reduce an autotuner to the one configuration that has these constants, warps and stages."""
    chosen = [config for config in tuner.configs if wanted.items() <= config.all_kwargs().items()]
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} configurations of {tuner.base_fn.__name__} have {wanted}, not one")
    with mock.patch.object(tuner, "configs", chosen):
        yield
