"""The choice of the sizes of the blocks of logits that a loss computes one after the other, and of a block's programs.

A block of R x C logits takes one launch of the gradient kernel, which writes G (the gradient with respect to the
logits, see ``contrastive``), and one launch of the kernel for the products G y and G^T x with the features. Each
multiprocessor runs one program at a time. Both launches should end with few
idle multiprocessors, and there should be few launches. The choice minimises an estimate of the time, which is counted
in steps of a program's loop:

    gradient    each multiprocessor computes tiles one after another, each in D / BLOCK_K steps
    products    tiles of G y have C / BLOCK_K steps and those of G^T x R / BLOCK_K; the longer ones start first

At the end of a launch, multiprocessors without a program are idle. So a slightly larger block, whose programs need one
more wave, can take much longer.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..common import cdiv
from ..configs import GemmConfig, gemm_config, planned
from ..launch import arch_of
from .operands import tile_config

# The time in loop steps that a tile takes in addition to its loop (to be stored), and that a launch takes in addition
# to its tiles. Both numbers come from simulating tiles of 128 x 256 by the model of an H100.
STEPS_AROUND_LOOP = 5
STEPS_OF_LAUNCH = 4
# Blocks with fewer rows or columns are not considered: their launches would take longer to start than to run.
LEAST_EDGE = 1024
# How many numbers of blocks are considered along the rows, and along the columns, from the fewest possible number up.
ROW_COUNTS, COL_COUNTS = 16, 4
MOST_SEGMENTS = 32
# A program that computes a whole segment of a column of tiles saves time, but the tiles with pairs then need programs
# of their own. If a segment has at most this many tiles, these programs take longer than the segments save (by the
# model of an H100).
SHORT_WALK = 4
# The first loads and the last stores of such a program take as long as this many tiles, by the model of an H100: 0.65
# for the statistics with 512 dimensions, 0.35 for G with 1,024.
TILES_AROUND_WALK = 0.5


def segments_of_column(num_m: int, num_n: int, at_once: int) -> tuple[int, int]:
    """Return the number of segments that each of ``num_n`` columns of ``num_m`` tiles is cut into, and a segment's
    tiles.

    A program computes one segment, and ``at_once`` programs run at the same time. The number of segments is chosen for
    the least total time. Of equally fast numbers the smallest is taken, since it leaves the fewest sums to add up.
    """

    def time(segments: int) -> float:
        """Return the time of one multiprocessor, in tiles of logits, if each column has this many segments."""
        return cdiv(num_n * segments, at_once) * (cdiv(num_m, segments) + TILES_AROUND_WALK)

    segments = min(range(1, min(num_m, MOST_SEGMENTS) + 1), key=time)
    return segments, cdiv(num_m, segments)


class GradGrid(NamedTuple):
    """The programs that compute a block of G.

    If ``segments`` is not 0, each column of tiles is cut into that many segments, each of which one program computes
    from top to bottom. The other programs compute one tile each.
    """

    programs: int
    segments: int
    tiles: int  # the number of tiles of a segment


def grad_grid(rows: int, cols: int, offset: int, cfg: GemmConfig, at_once: int, *, walks: bool) -> GradGrid:
    """Return the programs that compute a block of G [rows, cols] with the pairs (i, i + offset).

    ``walks`` says whether a program can compute a segment of a column of tiles.
    """
    num_m, num_n = cdiv(rows, cfg.block_m), cdiv(cols, cfg.block_n)
    has_pairs = -num_m * cfg.block_m < offset < num_n * cfg.block_n
    segments, tiles = segments_of_column(num_m, num_n, at_once) if walks else (0, 0)
    if not walks or (has_pairs and tiles <= SHORT_WALK):
        return GradGrid(num_m * num_n, 0, 0)
    return GradGrid(segments * num_n + (num_m * span(cfg) if has_pairs else 0), segments, tiles)


def span(cfg: GemmConfig) -> int:
    """Return the most tiles in one row of tiles of logits that may hold pairs."""
    return (cfg.block_m + cfg.block_n - 2) // cfg.block_n + 1


def most_bytes(cols: int, width: int) -> int:
    """Return the most bytes that a block of G may take if the columns' gradients have ``cols`` rows of ``width``.

    The limit is the size of their float32 accumulator, but at least 32 MiB and at most 128 MiB. With it, the loss of
    32,768 pairs of 512 dimensions takes 176 MB beyond its inputs: 34 for the gradient of the rows, 75 for accumulators
    and 67 for G.
    """
    return max(2**25, min(2**27, 4 * cols * width))


def products_config(device: torch.device, dtype: torch.dtype, width: int, *rows: int, copies: int = 1) -> GemmConfig:
    """Return the configuration of the kernel for the products of G with features of ``width`` numbers.

    A launch computes ``copies`` products for each of the numbers ``rows`` of rows; without them, it has many tiles.
    A tile that is wider than high is turned if it then computes fewer columns for nothing: for 640 numbers, three tiles
    of 256 columns would compute 768, and five of 128 columns compute 640.
    """
    sizes = [(count, width) for count in rows]
    cfg = tile_config("contrastive_products", device, dtype, *sizes, copies=copies)
    is_turned = cfg.block_m < cfg.block_n and -width % cfg.block_m < -width % cfg.block_n
    return dataclasses.replace(cfg, block_m=cfg.block_n, block_n=cfg.block_m) if is_turned else cfg


@planned
def edges_of(
    device: torch.device, dtype: torch.dtype, rows: int, cols: int, width: int, most_edge: int, at_once: int
) -> tuple[int, int]:
    """Return the rows and columns of a block of G for ``rows`` x ``cols`` features of ``width`` numbers."""
    gradient, products = (
        gemm_config("contrastive_grad_tile", arch_of(device), dtype),
        products_config(device, dtype, width),
    )
    return block_edges(rows, cols, width, dtype.itemsize, most_edge, at_once, gradient, products)


@functools.lru_cache(maxsize=256)
def block_edges(
    rows: int, cols: int, width: int, itemsize: int, most_edge: int, multiprocessors: int,
    gradient: GemmConfig, products: GemmConfig,
) -> tuple[int, int]:  # fmt: skip
    """Return the rows and columns of a block of G for ``rows`` x ``cols`` features of ``width`` numbers.

    Args:
        rows, cols, width: sizes of the features.
        itemsize: bytes of an element of G.
        most_edge: the most rows that a block may have; a block has at most ``most_edge**2`` logits.
        multiprocessors: the number of multiprocessors of the GPU.
        gradient, products: the configurations of the gradient kernel and of the kernel for the products.
    """
    limit = most_bytes(cols, width) // itemsize
    unit = max(gradient.block_m, gradient.block_n, products.block_m)
    candidates = [
        (block_rows, block_cols)
        for block_rows in _edges(rows, unit, min(most_edge, math.isqrt(limit)), ROW_COUNTS)
        for block_cols in _edges(cols, unit, min(most_edge**2, limit) // block_rows, COL_COUNTS)
    ]

    def steps(block: tuple[int, int]) -> float:
        """Return the estimated time of all blocks of logits of this size, in loop steps."""
        blocks = cdiv(rows, block[0]) * cdiv(cols, block[1])
        return blocks * steps_of_block(*block, width, multiprocessors, gradient, products)

    return min(candidates, key=steps)


def _edges(size: int, unit: int, most: int, count: int) -> Iterator[int]:
    """Yield candidates for the rows or columns of a block of logits, if ``size`` of them are divided into blocks.

    The first candidate gives the fewest blocks, the next one block more, and so on; all blocks but the last are equally
    large. A candidate is a multiple of ``unit`` and at most ``most``, unless ``most`` itself is less than ``unit``.
    """
    most = max(most // unit * unit, min(most, unit), 1)
    fewest = cdiv(max(size, 1), most)
    for parts in range(fewest, fewest + count):
        edge = min(most, cdiv(cdiv(max(size, 1), parts), unit) * unit)
        if parts == fewest or edge >= LEAST_EDGE:
            yield edge


def steps_of_block(
    rows: int, cols: int, width: int, multiprocessors: int, gradient: GemmConfig, products: GemmConfig
) -> float:
    """Return the estimated time of a block of logits, in loop steps of the kernel for the products."""
    num_m, num_n = cdiv(rows, gradient.block_m), cdiv(cols, gradient.block_n)
    segments, tiles = segments_of_column(num_m, num_n, multiprocessors)
    rounds = cdiv(num_n * segments, multiprocessors) * tiles
    of_gradient = rounds * (cdiv(width, gradient.block_k) + STEPS_AROUND_LOOP)
    tiles_of_row = cdiv(width, products.block_n)
    shorter, longer = sorted(
        (cdiv(length, products.block_k) + STEPS_AROUND_LOOP, cdiv(size, products.block_m) * tiles_of_row)
        for length, size in ((cols, rows), (rows, cols))
    )
    of_products = makespan(*longer, *shorter, multiprocessors)
    return of_gradient * _elements(gradient) / _elements(products) + of_products + 2 * STEPS_OF_LAUNCH


def _elements(config: GemmConfig) -> int:
    """Return the number of multiply-adds in one loop step of a contrastive kernel."""
    return config.block_m * config.block_n * config.block_k


def makespan(long: int, num_long: int, short: int, num_short: int, multiprocessors: int) -> int:
    """Return when the last program of a launch for contrastive gradients ends.

    The long programs start first, and each next program starts as soon as a multiprocessor is free.
    """
    rounds, late = divmod(num_long, multiprocessors)
    # Most multiprocessors take short programs from ``start`` on. The other ``late`` ones first run one more long
    # program.
    start = rounds * long
    end = start + long if late else start

    def done(since: int) -> int:
        """Return how many short programs for contrastive gradients a multiprocessor runs from ``since`` to ``end``."""
        return max(end - since, 0) // short

    while (multiprocessors - late) * done(start) + late * done(start + long) < num_short:
        end = min(since + (done(since) + 1) * short for since in (start, *[start + long] * bool(late)))
    return end
