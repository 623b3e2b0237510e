"""The symmetric contrastive loss of a batch that is spread over processes, each of which holds some of the pairs.

Rank r of W holds b_r of the N pairs (x_i, y_i). In the notation of ``contrastive``, its loss and gradients are

    L_r = W/(2N) sum_(i of r) [log Zr_i + log Zc_i - 2 s_ii]        the mean of all L_r is the loss of the batch
    dx_i = d(sum_r L_r)/dx_i,  dy_i likewise                        so the mean in DDP is the gradient of the batch
    ds = 1/W d(sum_r L_r)/ds                                        the same on every rank

If all b_r are equal, this is OpenCLIP's ``ClipLoss(local_loss=True, gather_with_grad=True)``, in values and gradients.
Only ds differs: in OpenCLIP each rank has another share of it. The mean that DDP takes of ds is the same.

Each rank sends the maximum and inv_denom of its rows and columns, and the gradient of its loss, to all ranks. For
features and gradients there are three modes. The table shows the rows that a rank sends and holds if each of W > 2
ranks has b pairs. A row has D numbers, in the dtype of the products, or in float32 where there is a prime.

    mode       sent forward    sent backward        FLOPs       held at most
    gather     (W-1) b         (W-1) b'             8 b N D     N + 2 b' + 2 g b'
    ring       (W-1) b         (W-1) b + W b'       8 b N D     2 b + 5 b'
    scalars    2 (W-1) b       0                    12 b N D    2 N + 2 b + 2 b'

"gather" collects the texts of all ranks and sends text gradients back to their owners, those of g ranks together.
"ring" passes texts round, in the forward pass and again in the backward pass, in which the sums of their gradients
follow them one step later. "scalars" collects texts and images. Gradients, and the texts of the ring, are sent while
the next block is computed.

The table leaves out vectors, which are in float32: a rank sends 2 (W-1) b such numbers in the forward pass in "gather"
and "ring", and 6 (W-1) b in the backward pass, in which it holds at most 10 N + 7 b of them. It also leaves out the
memory of a block while it is computed. ``clipfast plan`` counts all of this.

Methods: the loss over a rank's own rows is that of Cherti et al. 2023 (OpenCLIP), the ring that of Liu et al. 2023
(Ring Attention), and the exchange of scalars in place of gradients that of Wei et al. 2024 (FastCLIP).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from ..backends import outside_autocast
from ..dtypes import FLOATS, accumulate_dtype, dtype_name
from .contrastive import contrastive_loss
from .exchange import OwnerReduce, Ranks, RingReduce, check_initialised, gather_equal, gpus_per_node, start_gather
from .modes import MODES, choose_mode
from .shared import check_pairs, logit_blocks, new_gradient, operand_dtype, scale_gradient, scale_tensor
from .stats import Normalizers, SoftmaxStats, merge, new_stats

OP = "distributed_contrastive_loss"
AUTO = "auto"


class Options(NamedTuple):
    """The arguments of the distributed contrastive loss that are not tensors, after checks and with all defaults filled
    in.
    """

    ranks: Ranks
    mode: str  # "gather", "ring" or "scalars"
    normalize: bool
    dtype: torch.dtype  # the dtype of features in products


class RankStats(NamedTuple):
    """Statistics of this rank's b rows and b columns of the logits, and the features that the backward pass needs."""

    row: tuple[Tensor, Tensor]  # maximum and sum, each [b]
    col: tuple[Tensor, Tensor]  # maximum and sum in every block of logits that has a part of the columns, [blocks, b]
    positive: Tensor  # [b], logits of the pairs
    uses_shared_shift: Tensor  # [any] int8, as in SoftmaxStats
    gathered: tuple[Tensor, ...]  # features of all ranks, [N, D] each, for the backward pass


class _RankLoss(torch.autograd.Function):
    """The loss L_r of this rank. Its backward pass returns the gradients dx, dy and ds at the top of this file."""

    @staticmethod
    @outside_autocast
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, options: Options) -> Tensor:
        """Compute the contrastive loss of this rank from the statistics of all ranks."""
        ranks = options.ranks
        blocks = logit_blocks(image.device)
        x, y = (blocks.prepare(side, options.dtype, normalize=options.normalize).rows for side in (image, text))
        found = (_stats_from_strips if options.mode == "scalars" else _stats_from_rows)(x, y, logit_scale, options)
        terms, one_minus_p, loss = blocks.rank_terms(*found[:4], _pair_weight(ranks))
        ctx.options = options
        ctx.save_for_backward(image, text, logit_scale, terms, one_minus_p, *found.gathered)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of this rank's features and the scale in the contrastive loss of all ranks."""
        return *_RankGradients.apply(grad_loss, ctx.options, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _RankGradients(torch.autograd.Function):
    """The gradients of :class:`_RankLoss`.

    They are an autograd function of their own so that a second derivative raises an error instead of silently missing.
    """

    @staticmethod
    @outside_autocast
    def forward(
        _: Any, grad_loss: Tensor, options: Options, image: Tensor, text: Tensor, logit_scale: Tensor,
        terms: Tensor, one_minus_p: Tensor, *gathered: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Compute the gradients of this rank's features and the scale in the contrastive loss of all ranks."""
        ranks, blocks = options.ranks, logit_blocks(image.device)
        x, y = (blocks.prepare(side, options.dtype, normalize=options.normalize) for side in (image, text))
        grads = grad_loss.to(terms.dtype).expand(len(terms), 1)
        everyones = ranks.gather_padded(torch.cat([terms, grads], 1))  # one message is faster than two
        normalizers, one_minus_p, coefficient, factor = blocks.rank_weights(
            ranks.joined(everyones), everyones[:, 0], one_minus_p, ranks.own, logit_scale, _pair_weight(ranks)
        )
        accumulate = _accumulate_strips if options.mode == "scalars" else _accumulate_rows
        acc_x, result_y, scale_sums = accumulate(x.rows, y.rows, logit_scale, normalizers, gathered, options)
        image_grad = new_gradient(image)
        parts = [*scale_sums, blocks.finish(acc_x, x, y.rows, 0, one_minus_p, factor, image_grad)]
        of_scale = start_gather(scale_gradient(parts, coefficient), ranks.group)
        acc_y = result_y()  # waits until the other ranks' sums have arrived
        text_grad = new_gradient(text)
        blocks.finish(acc_y, y, x.rows, 0, one_minus_p, factor, text_grad)
        return image_grad, text_grad, of_scale.wait().mean()

    @staticmethod
    def backward(*_: Any) -> None:
        """Refuse a second derivative of the contrastive loss of all ranks."""
        raise RuntimeError(f"{OP}: there is no second derivative")


def _pair_weight(ranks: Ranks) -> float:
    """Return W/(2N), the weight of a pair in the loss of one of W ranks; NaN if there are no pairs."""
    return len(ranks.sizes) / (2 * ranks.total) if ranks.total > 0 else float("nan")


def _statistics(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> SoftmaxStats:
    """Return the statistics of the logits of x against y, where row i and column i + offset are a pair.

    The flags ``uses_shared_shift`` are a vector [any] on every device.
    """
    if len(x) == 0 or len(y) == 0:
        # All blocks subtract the same number from their logits before exp, if its sums are exact in each block. A block
        # without logits must not prevent this, so its flag is 1.
        return new_stats(x, y)._replace(uses_shared_shift=torch.ones(1, dtype=torch.int8, device=x.device))
    found = logit_blocks(x.device).statistics(x, y, logit_scale, offset)
    return found._replace(uses_shared_shift=found.uses_shared_shift.view(-1))


def _prepared(rows: Tensor, options: Options) -> Tensor:
    """Return received features in the form that the products take; the rank that sent them has normalised them."""
    return logit_blocks(rows.device).prepare(rows, options.dtype, normalize=False).rows


def _stats_from_strips(x: Tensor, y: Tensor, logit_scale: Tensor, options: Options) -> RankStats:
    """Compute the statistics of this rank's images against all texts, and of its texts against all images."""
    ranks = options.ranks
    both = ranks.gather(torch.cat([side.to(options.dtype) for side in (x, y)], dim=1))  # one message is faster than two
    gathered = both.tensor_split(2, dim=1)
    all_x, all_y = (_prepared(rows, options) for rows in gathered)
    of_images = _statistics(x, all_y, logit_scale, ranks.own.start)
    of_texts = _statistics(y, all_x, logit_scale, ranks.own.start)
    uses_shared_shift = torch.cat([of_images.uses_shared_shift, of_texts.uses_shared_shift])
    col = of_texts.row_max[None], of_texts.row_sum[None]
    return RankStats(of_images.rows, col, of_images.positive, uses_shared_shift, gathered)


def _stats_from_rows(x: Tensor, y: Tensor, logit_scale: Tensor, options: Options) -> RankStats:
    """Compute the statistics of this rank's images against all texts, which are gathered or come round the ring.

    This gives a part of the statistics of every column. Each rank sends these parts to the ranks that own the columns.
    """
    ranks, rows = options.ranks, y.to(options.dtype)
    gathered: tuple[Tensor, ...] = ()
    source: Iterable[tuple[slice, Tensor]]
    if options.mode == "gather":
        gathered = (ranks.gather(rows),)
        source = [(slice(0, ranks.total), gathered[0])]
    else:
        source = ((ranks.slices[owner], block) for owner, block in ranks.ring(rows))
    parts = [
        (cols.start, _statistics(x, _prepared(block, options), logit_scale, ranks.own.start - cols.start))
        for cols, block in source
    ]
    positive = parts[0][1].positive  # the first block has the pairs
    row, uses_shared_shift = parts[0][1].rows, parts[0][1].uses_shared_shift
    col_max, col_sum = parts[0][1].cols
    if len(parts) > 1:
        row = merge([part.rows for _, part in parts])
        uses_shared_shift = torch.cat([part.uses_shared_shift for _, part in parts])
        parts.sort(key=lambda item: item[0])
        col_max, col_sum = (torch.cat(vectors) for vectors in zip(*(part.cols for _, part in parts), strict=True))
    received = ranks.to_owners(torch.stack([col_max, col_sum], dim=1))  # [ranks, b, 2]
    return RankStats(row, (received[..., 0], received[..., 1]), positive, uses_shared_shift, gathered)


def _accumulate_strips(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, gathered: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Callable[[], Tensor], list[Tensor | None]]:
    """Return G y for this rank's images, G^T x for its texts, and the images' terms of the gradient of the scale.

    G^T x comes as a function that computes it, or in other modes waits for parts that are still being sent. The terms
    are those of ``add_gradients``.
    """
    own, blocks = options.ranks.own, logit_blocks(x.device)
    row, col, uses_shared_shift = normalizers
    all_x, all_y = (_prepared(rows, options) for rows in gathered)

    def accumulate(side: Tensor, others: Tensor, vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the accumulator of a strip of images or texts, and its terms of the gradient of the scale."""
        acc = blocks.strip_accumulator(side, others)
        of_strip = Normalizers(vectors[0][:, own], vectors[1], uses_shared_shift)
        return acc, blocks.add_gradients(side, others, logit_scale, of_strip, own.start, acc, None, is_new_x=True)

    acc_x, scale_sum = accumulate(x, all_y, (row, col))
    # The texts are computed while the gradient of the scale is sent.
    return acc_x, lambda: accumulate(y, all_x, (col, row))[0], [scale_sum]


def _accumulate_rows(
    x: Tensor, y: Tensor, logit_scale: Tensor, normalizers: Normalizers, gathered: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Callable[[], Tensor], list[Tensor | None]]:
    """Return the same as :func:`_accumulate_strips`, but compute G only in the rows of this rank's images.

    Each rank sends its part of G^T x to the ranks that own the texts, and receives the other parts for its own texts.
    """
    ranks, blocks = options.ranks, logit_blocks(x.device)
    columns = blocks.columns_of_block(len(x), ranks.total, x.shape[1], x.dtype)
    source: Iterable[tuple[list[range], Tensor]]
    reduce: OwnerReduce | RingReduce
    if options.mode == "gather":
        shared = ranks.blocks(ranks.groups(4 * x.shape[1], columns), columns)
        source = ((groups, gathered[0][ranks.of_owners([*itertools.chain(*groups)])]) for groups in shared)
        reduce = OwnerReduce(ranks)
    else:
        source = (([range(owner, owner + 1)], block) for owner, block in ranks.ring(y.to(options.dtype)))
        reduce = RingReduce(ranks)
    acc_x: Tensor | None = None
    scale_sums: list[Tensor | None] = []
    for groups, block in source:
        widths = [sum(ranks.sizes[owner] for owner in owners) for owners in groups]
        cols, block_y = ranks.of_owners([*itertools.chain(*groups)]), _prepared(block, options)
        is_block, is_new = 0 < len(block_y) <= columns, acc_x is None
        acc_x = blocks.strip_accumulator(x, block_y, is_block=is_block) if acc_x is None else acc_x
        of_block = x, block_y, logit_scale, normalizers.part(ranks.own, cols), ranks.own.start - cols.start
        if is_block:
            parts = blocks.add_strip(*of_block, widths, acc_x, scale_sums, is_new=is_new)
        else:
            parts = [x.new_empty(block.shape, dtype=acc_x.dtype)]
            scale_sums.append(blocks.add_gradients(*of_block, acc_x, *parts, is_new_x=is_new, is_new_y=True))
        for acc_y, owners in zip(parts, groups, strict=True):
            reduce.add(owners, acc_y)
    assert acc_x is not None
    return acc_x, reduce.result, scale_sums


# _disable_dynamo is torch.compiler.disable, but imports the compiler at the function's first call, not before.
@_disable_dynamo
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
    """Compute CLIP's symmetric contrastive loss of a batch that is spread over processes of ``torch.distributed``.

    Every rank of the group must call it with the same options, and must run the backward pass. The rank's loss is

        ranks / (2 * pairs of all ranks) * sum over its pairs of (loss among texts + loss among images)

    so that the mean over ranks is the loss of the whole batch. The gradients of features are those of the sum over
    ranks of ``grad * loss``; the gradient of ``logit_scale`` is the mean over ranks, the same on every rank. After the
    mean over ranks that DistributedDataParallel takes, a parameter has the gradient of the whole batch's loss. Results
    have the same bits in every run; in ``mode="gather"``, only if those of the backend's reduction do, too.
    ``torch.compile`` does not compile the call. With one rank, the call is that of :func:`contrastive_loss`.

    Args:
        image: image features [b, D] of this rank, float32, float16 or bfloat16 (float64 on the CPU); b may differ
            between ranks, and be 0. Under autocast both sides are taken in the autocast dtype.
        text: text features [b, D]; row i belongs to row i of ``image``.
        logit_scale: factor on the cosine similarities: a one-element tensor or a number, the same on every rank.
        group: the ranks that share the batch; all by default.
        mode: "gather" collects the texts of all ranks; "ring" passes them round, in memory that does not grow with the
            number of ranks; "scalars" collects texts and images, which costs 1.5 times the FLOPs but sends no
            gradients; with "auto", :func:`choose_mode` decides, and in the first call of a group, ranks exchange which
            of them share a node, for which the host waits.
        normalize: divide each row by its Euclidean norm first.
        sizes: b of every rank, in order of rank. Without it the ranks first exchange these numbers, for which the host
            waits for the device.

    Returns:
        This rank's loss, a float32 scalar (float64 for float64 input); NaN if no rank has a pair.

    Raises:
        ValueError, TypeError: shapes, sizes or dtypes that do not fit together, here or, without ``sizes``, between
            ranks; a process that is not in ``group``.
        RuntimeError: ``torch.distributed`` is not initialised, or a rank of the group is gone.
    """
    check_pairs(OP, ("image", "text"), image, text)
    if mode not in (AUTO, *MODES):
        raise ValueError(f"{OP}: mode must be one of {', '.join((AUTO, *MODES))}, got {mode!r}")
    dtype = operand_dtype(OP, "image", image)
    scale = scale_tensor(OP, logit_scale, image)
    ranks = _ranks(image, group, sizes)
    if len(ranks.sizes) == 1:
        return contrastive_loss(image, text, scale, normalize=normalize)
    if mode == AUTO:
        mode = choose_mode(ranks.sizes, image.shape[1], dtype, gpus_per_node(group, image.device))
    options = Options(ranks, mode, normalize, dtype)
    return _RankLoss.apply(image, text, scale.to(accumulate_dtype(dtype)), options)  # type: ignore[no-untyped-call]


def _ranks(image: Tensor, group: "dist.ProcessGroup | None", sizes: Sequence[int] | None) -> Ranks:
    """Return the ranks that share the contrastive loss. Check ``sizes``; if they are None, the ranks exchange them."""
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
    """Return the number of rows of every rank. Refuse ranks whose features differ in width or dtype."""
    mine = torch.tensor([*image.shape, FLOATS.index(image.dtype)], device=image.device)
    everyones = gather_equal(mine, group).tolist()
    if any(theirs[1:] != everyones[0][1:] for theirs in everyones):
        got = ", ".join(f"{dtype_name(FLOATS[kind])} [{rows}, {width}]" for rows, width, kind in everyones)
        raise ValueError(f"{OP}: features must have the same size and dtype on every rank, got {got}")
    return tuple(rows for rows, _, _ in everyones)
