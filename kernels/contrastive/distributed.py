"""The symmetric contrastive loss of a batch that is spread over processes: each holds some of the pairs.

Rank r of W holds b_r of the N pairs (x_i, y_i). With the terms of ``loss``, its loss and gradients are

    L_r = W/(2N) sum_(i of r) [log Zr_i + log Zc_i - 2 s_ii]        the mean of all L_r is the loss of the batch
    dx_i = d(sum_r L_r)/dx_i,  dy_i likewise                        so their mean in DDP is the gradient of the batch's
    ds = 1/W d(sum_r L_r)/ds                                        the same on every rank

which for equal b_r are the values and gradients of OpenCLIP's ``ClipLoss(local_loss=True, gather_with_grad=True)``, but
for ds, of which each of its ranks has a share; DDP's mean is the same.

Of a row or column, others need its maximum and its weight only. Three ways to get there. What a rank sends and holds,
in rows of D numbers of the dtype that is multiplied, or with a prime of float32, for b pairs on each of W > 2 ranks:

    mode       sent forward    sent backward        FLOPs       held at most
    gather     (W-1) b         (W-1) b'             8 b N D     N + 4 b'
    ring       (W-1) b         (W-1) b + W b'       8 b N D     2 b + 5 b'
    scalars    2 (W-1) b       0                    12 b N D    2 N + 2 b + 2 b'

"gather" collects texts and sends text gradients back; "ring" passes texts round, twice, and sums of their gradients
after them; "scalars" collects texts and images. Gradients travel while the next block is computed, and in the ring
texts as well. On top come vectors, in float32: 5 (W-1) b are sent forward, without "scalars" 2 (W-1) b more, and at
most 12 N + b held; and what blocks hold for a while. ``clipfast plan`` computes with all of it.
Method: loss of own rows after Cherti et al. 2023 (OpenCLIP); ring after Liu et al. 2023 (Ring Attention); exchange of
scalars in place of gradients after Wei et al. 2024 (FastCLIP).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import outside_autocast
from ..checks import check_float, check_like, check_tensor
from ..dtypes import FLOATS, accumulate_dtype, autocast_to, dtype_name
from .blocks import blocks_on
from .exchange import Ranks, Reduction, Sums, Travel, check_initialised, gather_equal
from .loss import contrastive_loss, scale_tensor
from .stats import Stats, Weights, merge, no_stats, terms
from .symmetric import scale_gradient

OP = "distributed_contrastive_loss"
MODES = ("auto", "gather", "ring", "scalars")
# What ``mode="auto"`` goes by: see :func:`choose_mode`.
FEW_ROWS = 1024
MANY_RANKS = 8
LARGEST_GATHER = 2**30  # bytes


class Plan(NamedTuple):
    """How a batch is worked on."""

    ranks: Ranks
    mode: str
    normalize: bool
    dtype: torch.dtype


class Found(NamedTuple):
    """Of this rank's rows, and of its columns over all rows: maximum and sum; logits of the pairs; whether all maxima
    are the shared shift; features of all ranks, for the backward pass.
    """

    row: tuple[Tensor, Tensor]
    col: tuple[Tensor, Tensor]
    positive: Tensor
    shared: Tensor
    gathered: tuple[Tensor, ...]


class _RankLoss(torch.autograd.Function):
    """L_r, and the gradients of the sum of all L_r."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan) -> Tensor:
        ranks = plan.ranks
        blocks = blocks_on(image.device)
        x, y = (blocks.prepare(side, plan.dtype, normalize=plan.normalize)[0] for side in (image, text))
        found = (_own_strips if plan.mode == "scalars" else _own_rows)(x, y, logit_scale, plan)
        rows, cols = terms(*found.row, found.positive), terms(*found.col, found.positive)
        shared = found.shared.to(x.device, rows.weight.dtype).expand(len(x))
        mine = torch.stack([found.row[0], rows.weight, found.col[0], cols.weight, shared], dim=1)
        everyones = ranks.gather(mine).T.contiguous()  # [5, N]
        ctx.plan = plan
        ctx.save_for_backward(image, text, logit_scale, everyones, rows.miss + cols.miss, *found.gathered)
        return (rows.nll + cols.nll).sum() * _pair_weight(ranks)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradients.apply(grad_loss, ctx.plan, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _Gradients(torch.autograd.Function):
    """The gradients of :class:`_RankLoss`: a function of its own, so that theirs are an error and not silently none."""

    @staticmethod
    @outside_autocast
    def forward(
        _: Any, grad_loss: Tensor, plan: Plan, image: Tensor, text: Tensor, logit_scale: Tensor,
        everyones: Tensor, miss: Tensor, *gathered: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ranks, blocks = plan.ranks, blocks_on(image.device)
        x, x_inv_norm = blocks.prepare(image, plan.dtype, normalize=plan.normalize)
        y, y_inv_norm = blocks.prepare(text, plan.dtype, normalize=plan.normalize)
        # Relative to the largest, since G may have 16 bits.
        grads = gather_equal(grad_loss.to(miss.dtype), ranks.group)
        largest = grads.abs().amax()
        share = ranks.spread(grads / largest.clamp(min=torch.finfo(miss.dtype).tiny))  # [N]
        row_max, row_weight, col_max, col_weight, shared = everyones
        row, col = (torch.stack([m, w * share, share]) for m, w in ((row_max, row_weight), (col_max, col_weight)))
        accumulate = _accumulate_strips if plan.mode == "scalars" else _accumulate_rows
        is_shared = (shared > 0).all().to(torch.int8)
        acc_x, acc_y, products = accumulate(x, y, logit_scale, row, col, is_shared, gathered, plan)
        coefficient = largest * _pair_weight(ranks)
        miss = miss * share[ranks.own]
        end = (miss, coefficient * logit_scale)
        image_grad, text_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (image, text))
        dot = blocks.finish(acc_x, x, y, 0, *end, x_inv_norm, image_grad)
        blocks.finish(acc_y, y, x, 0, *end, y_inv_norm, text_grad)
        of_scale = scale_gradient(dot, products, miss, x, y) * coefficient
        return image_grad, text_grad, gather_equal(of_scale, ranks.group).mean()

    @staticmethod
    def backward(*_: Any) -> None:
        raise RuntimeError(f"{OP}: there is no second derivative")


def _pair_weight(ranks: Ranks) -> float:
    return len(ranks.sizes) / (2 * ranks.total) if ranks.total > 0 else float("nan")


def _stats(x: Tensor, y: Tensor, logit_scale: Tensor, diagonal: int) -> Stats:
    if len(x) == 0 or len(y) == 0:
        # nothing that could not be shared
        return no_stats(x, y)._replace(shared=torch.ones((), dtype=torch.int8, device=x.device))
    return blocks_on(x.device).stats(x, y, logit_scale, diagonal)


def _operand(rows: Tensor, plan: Plan) -> Tensor:
    """Rows that were sent, as the blocks take them."""
    return blocks_on(rows.device).prepare(rows, plan.dtype, normalize=False)[0]


def _own_strips(x: Tensor, y: Tensor, logit_scale: Tensor, plan: Plan) -> Found:
    """Own images against all texts, and own texts against all images."""
    ranks = plan.ranks
    gathered = tuple(ranks.gather(side.to(plan.dtype)) for side in (x, y))
    all_x, all_y = (_operand(rows, plan) for rows in gathered)
    rows = _stats(x, all_y, logit_scale, ranks.own.start)
    cols = _stats(y, all_x, logit_scale, ranks.own.start)
    sums = (rows.row_max, rows.row_sum), (cols.row_max, cols.row_sum)
    return Found(*sums, rows.positive, rows.shared * cols.shared, gathered)


def _own_rows(x: Tensor, y: Tensor, logit_scale: Tensor, plan: Plan) -> Found:
    """Own images against all texts, at once or as they come round; what that says of columns goes to their owners."""
    ranks, rows = plan.ranks, y.to(plan.dtype)
    gathered: tuple[Tensor, ...] = ()
    source: Iterable[tuple[slice, Tensor]]
    if plan.mode == "gather":
        gathered = (ranks.gather(rows),)
        source = [(slice(0, ranks.total), gathered[0])]
    else:
        source = ((ranks.slices[owner], block) for owner, block in ranks.ring(rows))
    parts = [
        (cols.start, _stats(x, _operand(block, plan), logit_scale, ranks.own.start - cols.start))
        for cols, block in source
    ]
    # the first block has the pairs
    positive = parts[0][1].positive
    row = merge([(part.row_max, part.row_sum) for _, part in parts])
    shared = torch.stack([part.shared for _, part in parts]).amin()
    parts.sort(key=lambda item: item[0])
    of_cols = torch.stack([torch.cat([getattr(p, name) for _, p in parts]) for name in ("col_max", "col_sum")], dim=1)
    col = merge([(part[:, 0], part[:, 1]) for part in ranks.to_owners(of_cols)])
    return Found(row, col, positive, shared, gathered)


def _accumulate_strips(
    x: Tensor, y: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    gathered: tuple[Tensor, ...], plan: Plan,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """G times the other side, for own images and own texts; sums over own images of G_ij x_i . y_j."""
    own, blocks = plan.ranks.own, blocks_on(x.device)
    all_x, all_y = (_operand(rows, plan) for rows in gathered)
    acc_x, acc_y = (blocks.new_accumulator(len(side), side) for side in (x, y))
    product = blocks.add_gradients(x, all_y, logit_scale, Weights(row[:, own], col, shared), own.start, acc_x, None)
    blocks.add_gradients(y, all_x, logit_scale, Weights(col[:, own], row, shared), own.start, acc_y, None)
    return acc_x, acc_y, [product]


def _accumulate_rows(
    x: Tensor, y: Tensor, logit_scale: Tensor, row: Tensor, col: Tensor, shared: Tensor,
    gathered: tuple[Tensor, ...], plan: Plan,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """The same from own images only: block by block, and the part of each block of texts goes to its owner."""
    ranks, blocks = plan.ranks, blocks_on(x.device)
    own = ranks.own
    source: Iterable[tuple[int, Tensor]]
    sums: Sums
    if plan.mode == "gather":
        source, sums = enumerate(gathered[0][cols] for cols in ranks.slices), Reduction(ranks)
    else:
        source, sums = ranks.ring(y.to(plan.dtype)), Travel(ranks)
    acc_x = blocks.new_accumulator(len(x), x)
    products = []
    for owner, block in source:
        cols = ranks.slices[owner]
        acc = blocks.new_accumulator(len(block), x)
        weights = Weights(row[:, own], col[:, cols], shared)
        diagonal = own.start - cols.start
        products.append(blocks.add_gradients(x, _operand(block, plan), logit_scale, weights, diagonal, acc_x, acc))
        sums.add(owner, acc)
    return acc_x, sums.result(), products


@torch.compiler.disable
def distributed_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    group: "dist.ProcessGroup | None" = None,
    mode: str = "auto",
    normalize: bool = False,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """CLIP's symmetric contrastive loss of a batch that is spread over the processes of ``torch.distributed``.

    Every rank of the group calls it, with the same options, and runs the backward pass. The rank's loss is

        ranks / (2 * pairs of all ranks) * sum over its pairs of (loss among texts + loss among images)

    so that the mean over ranks is the loss of the whole batch. The gradients of features are those of the sum over
    ranks of ``grad * loss``, and that of ``logit_scale`` is, on every rank, its mean over ranks: with the mean over
    ranks that DistributedDataParallel takes of parameters' gradients, it is the gradient of the whole batch's loss.
    Results are the same bits from run to run, as far as the backend's own reduction is (``mode="gather"``).
    ``torch.compile`` leaves the call as it is. With one rank it is :func:`contrastive_loss`.

    Args:
        image: image features [b, D] of this rank, float32, float16 or bfloat16 (float64 on the CPU); b may differ
            between ranks, and be 0. Under autocast both sides are taken in the autocast dtype.
        text: text features [b, D]; row i belongs to row i of ``image``.
        logit_scale: factor on the cosine similarities: a one-element tensor or a number, the same on every rank.
        group: the ranks that share the batch; all by default.
        mode: "gather" collects the texts of all ranks; "ring" passes them round, in memory that does not grow with the
            number of ranks; "scalars" collects texts and images, for half as many FLOPs again and no gradients to
            send; "auto" is :func:`choose_mode`.
        normalize: divide each row by its Euclidean norm first.
        sizes: b of every rank, in order. Without it, they are exchanged first, which waits for the device.

    Returns:
        This rank's loss, a float32 scalar (float64 for float64 input); NaN if no rank has a pair.

    Raises:
        ValueError, TypeError: shapes, sizes or dtypes that do not fit together, here or, without ``sizes``, between
            ranks; a process that is not in ``group``.
        RuntimeError: ``torch.distributed`` is not initialised, or a rank of the group is gone.
    """
    _check(image, text, mode)
    operand = autocast_to(image.new_empty(0))
    check_float(OP, "image", operand)
    scale = scale_tensor(OP, logit_scale, image)
    ranks = _ranks(image, group, sizes)
    if len(ranks.sizes) == 1:
        return contrastive_loss(image, text, scale, normalize=normalize)
    if mode == "auto":
        mode = choose_mode(ranks.sizes, image.shape[1], operand.dtype)
    plan = Plan(ranks, mode, normalize, operand.dtype)
    return _RankLoss.apply(image, text, scale.to(accumulate_dtype(operand.dtype)), plan)  # type: ignore[no-untyped-call]


def _check(image: Tensor, text: Tensor, mode: str) -> None:
    check_tensor(OP, "image", image, 2)
    check_tensor(OP, "text", text, 2)
    if image.shape != text.shape:
        raise ValueError(f"{OP}: image and text must have the same shape, got {(*image.shape,)} and {(*text.shape,)}")
    check_like(OP, "text", text, "image", image)
    if mode not in MODES:
        raise ValueError(f"{OP}: mode must be one of {', '.join(MODES)}, got {mode!r}")


def choose_mode(sizes: Sequence[int], embed_dim: int, dtype: torch.dtype) -> str:
    """The mode that "auto" stands for; the same on every rank, since it goes by what all ranks know.

    With few rows per rank on many ranks ("scalars": at most 1,024 on more than 8) there is too little to compute while
    gradients travel. Texts of more than 1 GiB in all are not collected ("ring"). Otherwise "gather".
    """
    if max(sizes) <= FEW_ROWS and len(sizes) > MANY_RANKS:
        return "scalars"
    return "ring" if sum(sizes) * embed_dim * dtype.itemsize > LARGEST_GATHER else "gather"


def _ranks(image: Tensor, group: "dist.ProcessGroup | None", sizes: Sequence[int] | None) -> Ranks:
    check_initialised(OP)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{OP}: this process is not in the group")
    if sizes is None:
        return Ranks(group, rank, _exchange_sizes(image, group))
    if len(sizes) != world_size or sizes[rank] != len(image):
        raise ValueError(
            f"{OP}: sizes must have the rows of each of {world_size} ranks, {len(image)} of them on rank {rank}, "
            f"got {list(sizes)}"
        )
    return Ranks(group, rank, tuple(int(size) for size in sizes))


def _exchange_sizes(image: Tensor, group: "dist.ProcessGroup | None") -> tuple[int, ...]:
    mine = torch.tensor([*image.shape, FLOATS.index(image.dtype)], device=image.device)
    everyones = gather_equal(mine, group).tolist()
    if any(theirs[1:] != everyones[0][1:] for theirs in everyones):
        got = ", ".join(f"{dtype_name(FLOATS[kind])} [{rows}, {width}]" for rows, width, kind in everyones)
        raise ValueError(f"{OP}: features must have the same size and dtype on every rank, got {got}")
    return tuple(rows for rows, _, _ in everyones)
