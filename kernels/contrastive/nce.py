"""InfoNCE, the contrastive loss of one direction, and NT-Xent, SimCLR's loss of two views of each image.

InfoNCE takes its negatives from the batch, from a queue, or from both. With queries x [N, D], their keys y [N, D],
negatives q [K, D] and scale s:

    Z_i = sum_k exp(s x_i . q_k) + sum_{j != i} exp(s x_i . y_j)                  the second sum with ``in_batch`` only
    L = 1/N sum_i log(1 + Z_i / exp(s x_i . y_i))               p_i = exp(s x_i . y_i) / (Z_i + exp(s x_i . y_i))
    dL/dx = s/N (P_q q + P_y y - (1 - p) * y)    dL/dq = s/N P_q^T x    dL/dy = s/N (P_y^T x - (1 - p) * x)

P_q and P_y hold the probabilities of the negatives. The keys and the queue are two blocks of columns. The statistics of
both blocks are merged before the loss is computed from them. The gradients of each block use the merged statistics, so
they do not depend on the other block otherwise. As in ``contrastive``, the logits of pairs are left out of all sums and
are never stored in 16 bits, and the whole matrix of logits is never in memory. Without a queue this is the loss of
``contrastive`` in one direction.

FLOPs for C columns: 2 N C D forward and 6 N C D backward (4 where the columns need no gradient).

NT-Xent: with views x, y [N, D] and scale s, each of the 2N views is classified among all views but itself:

    Z of x_i = sum_{j != i} [exp(s x_i . x_j) + exp(s x_i . y_j)], and of y_i likewise
    L = 1/2N sum over all views of log(1 + Z / exp(s x_i . y_i))

The product x y^T serves both views, and x x^T and y y^T are symmetric. That makes three products in place of four:
6 N^2 D FLOPs forward and 14 N^2 D backward. Pairs and logits are treated as in InfoNCE.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_bool, check_like, check_tensor
from ..common import LOG2E
from ..dtypes import accumulate_dtype
from ..launch import triton_runs_on
from . import cpu, launches, merges
from .contrastive import pairwise_loss
from .one_block import softmax_gradients
from .shared import (
    check_pairs,
    gradients_in_strips,
    logit_blocks,
    new_gradient,
    operand_dtype,
    prepare_both,
    register_gradients,
    scale_gradient,
    scale_tensor,
)
from .small_batch import suits_whole, whole_info_nce_loss, whole_nt_xent_loss, whole_operands
from .stats import Features, Normalizers, merge, new_stats, pair_products, pair_terms


@registered("info_nce_fwd")
def _info_nce_fwd(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the InfoNCE loss, and for the backward pass row [3, N] and uses_shared_shift [].

    row holds maximum, inv_denom and one_minus_p of the queries.
    """
    joined = _joined(query, key, negatives, dtype, normalize=normalize) if in_batch else None
    if joined is not None:
        x, columns = (side.rows for side in joined)
        loss, row, _, uses_shared_shift = launches.pair_losses(x, columns, logit_scale, 0, both=False)
        return loss, row, uses_shared_shift
    x, y = (side.rows for side in prepare_both(query, key, dtype, normalize=normalize))
    queue = logit_blocks(query.device).prepare(negatives, dtype, normalize=normalize).rows
    if triton_runs_on(query.device):
        return merges.info_nce(x, y, queue, logit_scale, in_batch=in_batch)
    # With the offset len(queue), no query forms a pair with a negative of the queue.
    parts = [cpu.statistics(x, queue, logit_scale, len(queue)) if len(queue) else new_stats(x, queue)]
    if in_batch:
        parts.append(cpu.statistics(x, y, logit_scale, 0))
        positive = parts[-1].positive
    else:
        positive = pair_products(x, y) * (logit_scale * LOG2E)
    maximum, total = merge([part.rows for part in parts])
    uses_shared_shift = torch.stack([part.uses_shared_shift for part in parts]).amin()
    rows = pair_terms(maximum, total, positive)
    return rows.nll.mean(), torch.stack([maximum, rows.inv_denom, rows.one_minus_p]), uses_shared_shift


@_info_nce_fwd.register_fake
def _(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    row = logit_scale.new_empty(3, query.shape[0])
    return logit_scale.new_empty(()), row, logit_scale.new_empty((), dtype=torch.int8)


@registered("info_nce_bwd")
def _info_nce_bwd(
    grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    row: Tensor, uses_shared_shift: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype, needs_key: bool, needs_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the InfoNCE gradients of queries, keys, negatives and scale.

    The gradients of keys and negatives have no rows if they are not needed.
    """
    joined = _joined(query, key, negatives, dtype, normalize=normalize) if in_batch else None
    if joined is not None:
        normalizers = Normalizers(row, _nothing_from_columns(row, len(key) + len(negatives)), uses_shared_shift)
        query_grad, n = new_gradient(query), len(key)
        grad = query.new_empty(n + len(negatives), query.shape[1]) if needs_key or needs_negatives else None
        scale_grad = softmax_gradients(grad_loss, *joined, logit_scale, normalizers, 0, 1 / n, query_grad, grad)
        key_grad, negatives_grad = (query[:0], query[:0]) if grad is None else (grad[:n], grad[n:])
        # The results of an op must not share memory, and a compiler takes them to start at multiples of 16 bytes.
        key_grad = key_grad.clone() if needs_key else new_gradient(key[:0])
        negatives_grad = negatives_grad if needs_negatives else new_gradient(negatives[:0])
        if negatives_grad.storage_offset() * negatives_grad.itemsize % 16:
            negatives_grad = negatives_grad.clone()
        return query_grad, key_grad, negatives_grad, scale_grad
    blocks = logit_blocks(query.device)
    x, y = prepare_both(query, key, dtype, normalize=normalize)
    queue = blocks.prepare(negatives, dtype, normalize=normalize)
    coefficient = grad_loss.to(row.dtype) / max(len(query), 1)
    factor = coefficient * logit_scale
    query_grad = new_gradient(query)
    acc_key = blocks.new_accumulator(len(key), y.rows) if needs_key else None
    acc_queue = blocks.new_accumulator(len(negatives), queue.rows) if needs_negatives else None
    of_keys = _nothing_from_columns(row, len(key) if in_batch else 0)
    of_queue = _nothing_from_columns(row, len(negatives))
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the InfoNCE gradient of a strip of queries, against the batch's keys and the queue."""
        own, of_rows = x.rows[strip], row[:, strip]
        scale_sums = []
        if in_batch:
            normalizers = Normalizers(of_rows, of_keys, uses_shared_shift)
            scale_sums.append(blocks.add_gradients(own, y.rows, logit_scale, normalizers, strip.start, acc, acc_key))
        normalizers = Normalizers(of_rows, of_queue, uses_shared_shift)
        no_pair = len(negatives)
        scale_sums.append(blocks.add_gradients(own, queue.rows, logit_scale, normalizers, no_pair, acc, acc_queue))
        return scale_sums

    parts = gradients_in_strips(blocks, x, y.rows, 0, one_minus_p, factor, query_grad, add)
    key_grad = new_gradient(key if needs_key else key[:0])  # allocated here, so that it can reuse the memory of G
    negatives_grad = new_gradient(negatives if needs_negatives else negatives[:0])
    if acc_key is not None:
        blocks.finish(acc_key, y, x.rows, 0, one_minus_p, factor, key_grad)
    if acc_queue is not None:
        # With the offset len(query), no negative of the queue is part of a pair.
        zeros = row.new_zeros(len(negatives))
        blocks.finish(acc_queue, queue, x.rows, len(query), zeros, factor, negatives_grad)
    return query_grad, key_grad, negatives_grad, scale_gradient(parts, coefficient)


register_gradients(_info_nce_fwd, _info_nce_bwd, optional=(1, 2))


def _joined(
    query: Tensor, key: Tensor, negatives: Tensor, dtype: torch.dtype, *, normalize: bool
) -> tuple[Features, Features] | None:
    """Return the queries, and the keys and negatives as one matrix, in the form that products take.

    Return None unless kernels compute the gradients from one block of their logits. Then InfoNCE with the keys of the
    batch is the contrastive loss of the queries with these columns, in one direction.
    """
    columns, width = len(key) + len(negatives), query.shape[1]
    if not triton_runs_on(query.device) or not launches.is_one_block(query.device, dtype, len(query), columns, width):
        return None
    return prepare_both(query, torch.cat((key, negatives)), dtype, normalize=normalize)


def _nothing_from_columns(row: Tensor, columns: int) -> Tensor:
    """Return normalizers [2, columns] that leave the softmax over columns out of G, for logits of any size."""
    col = row.new_zeros(2, columns)
    col[0].fill_(float("inf"))  # the assignment col[0] = inf would first make a tensor of the number
    return col


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE: each query's own key against the other keys of the batch, a queue of negatives, or both.

    The defaults are the loss of van den Oord et al. 2018. With ``negatives=queue, in_batch=False`` it is MoCo's (He et
    al. 2020, algorithm 1): the positive and the queue, nothing else. With a queue and ``in_batch``, the other keys are
    negatives as well. The loss has one direction: queries are classified among keys, not keys among queries.

    Args:
        query: features [N, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Under autocast all
            features are taken in the autocast dtype, as a matrix product would.
        key: features [N, D]; row i is the positive of query i. Same dtype and device as ``query``.
        logit_scale: the factor on the products, one over the temperature: a one-element tensor, into which gradients
            flow, or a number.
        negatives: features [K, D], same dtype and device as ``query``; or None. Gradients of keys and negatives are
            computed only if they are required.
        in_batch: take the other keys as negatives; if False, there must be ``negatives``.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over queries, a float32 scalar (float64 for float64 input); NaN without queries, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together, or no negatives at all.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "info_nce_loss"
    check_pairs(op, ("query", "key"), query, key)
    check_bool(op, "in_batch", in_batch)
    check_bool(op, "normalize", normalize)
    scale = scale_tensor(op, logit_scale, query, like_name="query")
    if negatives is None:
        if not in_batch:
            raise ValueError(f"{op}: in_batch=False needs negatives [K, D], got None")
        return pairwise_loss(
            op, "query", query, key, scale, backend, both=False, normalize=normalize, offset=0, save_memory=False
        )
    check_tensor(op, "negatives", negatives, 2)
    check_like(op, "negatives", negatives, "query", query)
    if negatives.shape[1] != query.shape[1]:
        raise ValueError(f"{op}: negatives must be [K, {query.shape[1]}], got {tuple(negatives.shape)}")
    if uses_reference(op, backend, query):
        return reference.info_nce_loss(query, key, scale, negatives=negatives, in_batch=in_batch, normalize=normalize)
    dtype = operand_dtype(op, "query", query)
    scale = scale.to(accumulate_dtype(dtype))
    if suits_whole(query, negatives, dtype) and (not in_batch or suits_whole(query, key, dtype)):
        x, y, queue = whole_operands(query, key, negatives, normalize=normalize, dtype=dtype)
        loss = whole_info_nce_loss(x, y, queue, scale, in_batch=in_batch)
        if loss is not None:
            return loss
    return _info_nce_fwd(query, key, negatives, scale, in_batch, normalize, dtype)[0]


@registered("nt_xent_fwd")
def _nt_xent_fwd(
    first: Tensor, second: Tensor, logit_scale: Tensor, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the NT-Xent loss, and for the backward pass row [2, 3, N], col [2, 3, N] and uses_shared_shift [].

    ``row`` belongs to the first views and ``col`` to the second. Both hold maximum, inv_denom and one_minus_p (summed
    over both views of the pair) twice: [0] treats a view as a row of the logits of its own side, and [1] as a column.
    These logits are symmetric, so [0] and [1] differ by rounding only.
    """
    x, y = (side.rows for side in prepare_both(first, second, dtype, normalize=normalize))
    if triton_runs_on(first.device):
        return merges.nt_xent(x, y, logit_scale)
    # Among the logits of first views with first views, and of second with second, the pairs with offset 0 are each view
    # with itself. They are left out; all other logits belong to negatives.
    within = [cpu.statistics(side, side, logit_scale, 0) for side in (x, y)]
    across = cpu.statistics(x, y, logit_scale, 0)
    sums = [
        [merge([part, other]) for part in (own.rows, own.cols)]
        for own, other in zip(within, (across.rows, across.cols), strict=True)
    ]
    terms = [[pair_terms(*part, across.positive) for part in side] for side in sums]
    one_minus_p = terms[0][0].one_minus_p + terms[1][0].one_minus_p
    row, col = (
        torch.stack([torch.stack([sums[side][i][0], terms[side][i].inv_denom, one_minus_p]) for i in range(2)])
        for side in range(2)
    )
    uses_shared_shift = torch.stack([part.uses_shared_shift for part in (*within, across)]).amin()
    return (terms[0][0].nll.mean() + terms[1][0].nll.mean()) / 2, row, col, uses_shared_shift


@_nt_xent_fwd.register_fake
def _(first: Tensor, second: Tensor, logit_scale: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, col = (logit_scale.new_empty(2, 3, x.shape[0]) for x in (first, second))
    return logit_scale.new_empty(()), row, col, logit_scale.new_empty((), dtype=torch.int8)


@registered("nt_xent_bwd")
def _nt_xent_bwd(
    grad_loss: Tensor, first: Tensor, second: Tensor, logit_scale: Tensor,
    row: Tensor, col: Tensor, uses_shared_shift: Tensor, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the NT-Xent gradients of both views and of the scale."""
    blocks = logit_blocks(first.device)
    x, y = prepare_both(first, second, dtype, normalize=normalize)
    coefficient = grad_loss.to(row.dtype) / max(2 * len(first), 1)
    factor = coefficient * logit_scale
    first_grad = new_gradient(first)
    acc_second = blocks.new_accumulator(len(second), y.rows)
    (row, row_within), (col, col_within) = row, col
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the NT-Xent gradient of a strip of one view, against both views."""
        own, start = x.rows[strip], strip.start
        normalizers = Normalizers(row[:, strip], col, uses_shared_shift)
        across = blocks.add_gradients(own, y.rows, logit_scale, normalizers, start, acc, acc_second)
        # The G of first views with first views is symmetric, so its rows hold the whole gradient. Row sums and column
        # sums differ by rounding only. But a probability near 1 must be computed from the very sum that contains its
        # logit, so the columns take the column sums.
        normalizers = Normalizers(row[:, strip], row_within, uses_shared_shift)
        within = blocks.add_gradients(own, x.rows, logit_scale, normalizers, start, acc, None)
        # ``across`` counts twice, since its logits contribute to the gradients of first and of second views.
        return [across, across, within]

    parts = gradients_in_strips(blocks, x, y.rows, 0, one_minus_p, factor, first_grad, add)
    normalizers = Normalizers(col, col_within, uses_shared_shift)
    parts.append(blocks.add_gradients(y.rows, y.rows, logit_scale, normalizers, 0, acc_second, None))
    second_grad = new_gradient(second)  # allocated here, so that it can reuse the memory of G
    parts.append(blocks.finish(acc_second, y, x.rows, 0, one_minus_p, factor, second_grad))
    # Each logit is a product of two features, and the gradients of both count it. Therefore the sum is halved.
    return first_grad, second_grad, scale_gradient(parts, coefficient / 2)


register_gradients(_nt_xent_fwd, _nt_xent_bwd)


def nt_xent_loss(
    first: Tensor, second: Tensor, logit_scale: Tensor | float, *, normalize: bool = True, backend: str = "auto"
) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, equation 1): each view's other view against all views but itself.

    Args:
        first: features [N, D] of one view of each image, float32, float16 or bfloat16 (float64 on the CPU); any
            strides. Under autocast both are taken in the autocast dtype, as a matrix product would.
        second: features [N, D] of the other view, in the same order; same dtype and device as ``first``.
        logit_scale: the factor on the cosine similarities, one over the temperature: a one-element tensor, into which
            gradients flow, or a number.
        normalize: divide each row by its Euclidean norm first (at least 1e-12), in float32.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over 2N views, a float32 scalar (float64 for float64 input); NaN without views, as a mean is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "nt_xent_loss"
    check_pairs(op, ("first", "second"), first, second)
    check_bool(op, "normalize", normalize)
    scale = scale_tensor(op, logit_scale, first, like_name="first")
    if uses_reference(op, backend, first):
        return reference.nt_xent_loss(first, second, scale, normalize=normalize)
    dtype = operand_dtype(op, "first", first)
    scale = scale.to(accumulate_dtype(dtype))
    if suits_whole(first, second, dtype, 2):  # each side of the logits has both views
        (views,) = whole_operands(torch.cat((first, second)), normalize=normalize, dtype=dtype)
        loss = whole_nt_xent_loss(views, scale)
        if loss is not None:
            return loss
    return _nt_xent_fwd(first, second, scale, normalize, dtype)[0]
