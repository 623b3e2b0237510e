"""The launches of InfoNCE's and NT-Xent's forward passes on a GPU, whose rows have logits in several blocks.

One kernel merges the statistics of all blocks, and computes the terms of the loss from them. Another one adds up the
losses of its programs, and merges the flags of all programs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common import LOG2E, cdiv
from ..configs import RowConfig, planned, row_config
from ..launch import Plan, arch_of
from .launches import mean_of, programs_of_pairs, start_pairs
from .merge_kernels import _queries_kernel, _views_kernel
from .operands import Layout, layout_of, prepare, prepare_both, totals_plan, vector

VIEWS = RowConfig(block_m=128, block_n=1, num_warps=4, num_stages=1)  # a program merges block_m pairs of views
# The features of a block of logits, the offset of its pairs, and vectors [2, M] and [2, N] for its statistics.
Block = tuple[Tensor, Tensor, int, Tensor, Tensor]


def info_nce(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, *,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return InfoNCE's loss [], row [3, N] and uses_shared_shift [] for queries, keys [N, D] and negatives [K, D].

    The features are as the loss gets them.
    """
    x, y = (side.rows for side in prepare_both(query, key, dtype, normalize=normalize))
    queue = prepare(negatives, dtype, normalize=normalize).rows
    stats, row = vector(x, 2, 2, len(x)), vector(x, 3, len(x))
    # With the offset len(queue), no query forms a pair with a negative of the queue.
    blocks = [(x, queue, len(queue), stats[0], vector(x, 2, len(queue)))]
    if in_batch:
        blocks.append((x, y, 0, stats[1], vector(x, 2, len(y))))
    layouts = tuple([layout_of(own, other, offset) for own, other, offset, *_ in blocks])
    counts, merging, total = _queries_plan(layouts, y.stride(0))
    loss, flag = _merged(
        blocks, layouts, logit_scale, counts, total,
        lambda positive, *outs: merging.start(stats, positive, x, y, logit_scale, row, *outs),
    )  # fmt: skip
    return loss, row, flag


@planned
def _queries_plan(layouts: tuple[Layout, ...], stride_y: int) -> tuple[list[int], Plan, Plan]:
    """Return the programs of each kernel of InfoNCE's forward pass, and the plans that merge blocks and add losses."""
    device, dtype, n, _, d, _, stride_x, _ = layouts[0]
    cfg = row_config("contrastive_rows", arch_of(device), dtype)
    counts = [programs_of_pairs(layout)[0] for layout in layouts] + [cdiv(n, cfg.block_m)]
    merging = Plan(
        _queries_kernel, (counts[-1],), n, d, stride_x, stride_y, LOG2E,
        config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_n, IN_BATCH=len(layouts) > 1,
    )  # fmt: skip
    return counts, merging, totals_plan(device, 1, sum(counts), mean_of(n), has_flags=True, has_grad_loss=False)


def nt_xent(
    first: Tensor, second: Tensor, logit_scale: Tensor, *, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return NT-Xent's loss [], row and col [2, 3, N] and uses_shared_shift [] for both views [N, D].

    The features are as the loss gets them.
    """
    x, y = (side.rows for side in prepare_both(first, second, dtype, normalize=normalize))
    stats, row, col = vector(x, 6, 2, len(x)), vector(x, 2, 3, len(x)), vector(x, 2, 3, len(x))
    xx_row, xx_col, yy_row, yy_col, xy_row, xy_col = stats.unbind()
    # Among the logits of first views with first views, and of second with second, the pairs with offset 0 are each view
    # with itself. They are left out; all other logits belong to negatives. The last block has the logits of the pairs.
    blocks = [(x, x, 0, xx_row, xx_col), (y, y, 0, yy_row, yy_col), (x, y, 0, xy_row, xy_col)]
    layouts = tuple([layout_of(own, other, 0) for own, other, *_ in blocks])
    counts, merging, total = _views_plan(layouts)
    loss, flag = _merged(
        blocks, layouts, logit_scale, counts, total,
        lambda positive, *outs: merging.start(stats, positive, row, col, *outs),
    )  # fmt: skip
    return loss, row, col, flag


@planned
def _views_plan(layouts: tuple[Layout, ...]) -> tuple[list[int], Plan, Plan]:
    """Return the programs of each kernel of NT-Xent's forward pass, and the plans that merge blocks and add losses."""
    device, _, n, *_ = layouts[0]
    counts = [programs_of_pairs(layout)[0] for layout in layouts] + [cdiv(n, VIEWS.block_m)]
    merging = Plan(_views_kernel, (counts[-1],), n, config=VIEWS, device=device, BLOCK_M=VIEWS.block_m)
    return counts, merging, totals_plan(device, 1, sum(counts), mean_of(2 * n), has_flags=True, has_grad_loss=False)


def _merged(
    blocks: Sequence[Block], layouts: Sequence[Layout], logit_scale: Tensor, counts: list[int], total: Plan,
    merge: Callable[..., None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the statistics of blocks of logits, merge them, and return the loss [] and uses_shared_shift [].

    ``merge`` starts the kernel that merges: it gets the logits of the pairs, and vectors for that kernel's losses and
    flags. ``counts`` has the number of programs for each block, and then of that kernel. ``total`` adds up all losses.
    """
    x = blocks[0][0]
    positive, loss, losses = vector(x, len(x)), vector(x), vector(x, sum(counts))
    flags, flag = x.new_empty(sum(counts), dtype=torch.int8), x.new_empty((), dtype=torch.int8)
    *of_blocks, last = zip(losses.split(counts), flags.split(counts), strict=True)
    for (own, other, _, *stats), layout, numbers in zip(blocks, layouts, of_blocks, strict=True):
        start_pairs(own, other, logit_scale, layout, positive, *stats, *numbers)
    merge(positive, *last)
    total.start(losses, flags, loss, loss, loss, flag)
    return loss, flag
