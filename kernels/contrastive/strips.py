"""The product G y of a strip: G has few rows, those of one process, and many columns, those of all processes.

G is the gradient with respect to the logits, and y are the features of its columns, as in ``contrastive``.

Such a product has few tiles, often fewer than there are multiprocessors, and each tile has a long loop over the
columns. Therefore the columns are cut into parts, each of which has an accumulator of its own: several programs may
then work on one tile, and the sums have the same bits in every run. The accumulators are added up once, at the end.
"""

from typing import NamedTuple

from torch import Tensor

from ..common import cdiv
from ..configs import GemmConfig, planned
from ..launch import Plan
from .block_sizes import STEPS_AROUND_LOOP, products_config
from .operands import Describe, Layout, Tile, has_tma, processors, tile_of
from .strip_kernels import _strip_products_kernel

PART_COLS = 64  # wide tiles are finished and stored in parts of this many columns, one after the other
MOST_BYTES = 2**26  # the most bytes that the accumulators of all parts may take
# Adding up one tile of accumulators for each multiprocessor takes as long as this many loop steps, by the model of an
# H100.
STEPS_OF_SUM = 7


@planned
def parts_of(layout: Layout, rows: int) -> tuple[int, int]:
    """Return the number of parts into which the columns of a strip are cut, and the rows of a part's accumulator.

    The number is 0 if the kernel without parts takes no longer. ``layout`` is that of one block of the strip, which has
    ``rows`` rows in all.
    """
    device, dtype, m, n, d, *_ = layout
    at_once, largest = processors(device), products_config(device, dtype, d)
    height = cdiv(rows, largest.block_m) * largest.block_m  # a tile must not reach into the rows of the next part
    if m * n * d == 0:
        return 0, height

    def tiles(cfg: GemmConfig) -> int:
        """Return the number of tiles of a strip's part."""
        return cdiv(m, cfg.block_m) * cdiv(d, cfg.block_n)

    def time(parts: int) -> float:
        """Return the estimated time of the products of a strip with this number of parts.

        A step of a loop takes as long as the loads of its numbers.
        """
        count = max(1, parts)
        cfg = products_config(device, dtype, d, m, copies=count)
        steps = cdiv(tiles(cfg) * count, at_once) * (cdiv(cdiv(n, cfg.block_k), count) + STEPS_AROUND_LOOP)
        steps_of_sum = STEPS_OF_SUM * tiles(largest) * parts / at_once
        return steps * (cfg.block_m + cfg.block_n) + steps_of_sum * (largest.block_m + largest.block_n)

    most = min(cdiv(n, largest.block_k), MOST_BYTES // (4 * height * d), cdiv(4 * at_once, tiles(largest)))
    return min(range(most + 1), key=time), height


class StripPlan(NamedTuple):
    """A launch that adds the product of G and y to the accumulators of the parts of a strip."""

    plan: Plan
    grad_tile: Tile
    operand_tile: Tile
    acc_tile: Tile

    def start(self, grad: Tensor, y: Tensor, acc: Tensor, describe: Describe) -> None:
        """Start the kernel for a strip's product G y; ``acc`` is [parts, height, D]."""
        rows = describe(acc.flatten(0, 1), self.acc_tile)
        self.plan.start(describe(grad, self.grad_tile), describe(y, self.operand_tile), rows)


@planned
def strip_plan(layout: Layout, stride_grad: int, parts: int, height: int, first: int, is_new: bool) -> StripPlan:
    """Plan the product of a block of G with y, whose rows belong to the rows of the accumulators from ``first`` on."""
    device, dtype, m, n, d, _, _, stride_y = layout
    cfg = products_config(device, dtype, d, m, copies=parts)
    is_tma, pieces = has_tma(device, dtype, d), max(1, cfg.block_n // PART_COLS)
    is_added = is_tma and d % 4 == 0
    length = cdiv(cdiv(n, cfg.block_k), parts) * cfg.block_k
    plan = Plan(
        _strip_products_kernel, (parts * cdiv(m, cfg.block_m) * cdiv(d, cfg.block_n),),
        m, n, d, first, height, parts * height, length, stride_grad, stride_y,
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PARTS=pieces,
        IS_TMA=is_tma, IS_ADDED=is_added, IS_NEW=is_new,
    )  # fmt: skip
    acc_tile = (cfg.block_m, cfg.block_n // pieces) if is_added else None
    return StripPlan(
        plan, tile_of(cfg.block_m, cfg.block_k, layout), tile_of(cfg.block_k, cfg.block_n, layout), acc_tile
    )
