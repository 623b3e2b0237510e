"""InfoNCE, the contrastive loss of one direction.

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
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import planned_op, uses_reference
from ..checks import check_bool, check_like, check_tensor
from ..common import LOG2E
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from . import cpu, launches, merges
from .contrastive import known_loss, pairwise_loss
from .one_block import softmax_gradients
from .shared import (
    call_planned,
    check_pairs,
    features_pass,
    gradients_in_strips,
    is_small_block,
    logit_blocks,
    new_gradient,
    operand_dtype,
    prepare_both,
    register_gradients,
    scale_gradient,
    scale_tensor,
)
from .small_batch import suits_whole, whole_info_nce_loss, whole_operands
from .stats import Normalizers, merge, new_accumulator, new_stats, pair_products, pair_terms


@planned_op("info_nce_fwd")
def _info_nce_fwd(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes the InfoNCE loss for tensors with the layout of the arguments.

    It returns the loss, and for the backward pass row [3, N] and uses_shared_shift []. row holds maximum, inv_denom and
    one_minus_p of the queries.
    """
    if not triton_runs_on(query.device):
        return _info_nce_on_cpu
    how: dict[str, Any] = {"normalize": normalize, "dtype": dtype}
    if not in_batch or not _are_joined(query, key, negatives, dtype):
        forward: Any = functools.partial(merges.info_nce, in_batch=in_batch, **how)
        return features_pass(forward, (query, key, negatives, None), **how)
    forward = functools.partial(launches.pair_losses, offset=0, both=False, **how)
    joined = features_pass(forward, (query, _columns_like(key, negatives), None), **how)

    def compute(
        query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, *_: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the InfoNCE loss of keys and negatives in one matrix."""
        loss, row, _col, uses_shared_shift = joined(query, torch.cat((key, negatives)), logit_scale)
        return loss, row, uses_shared_shift

    return compute


def _info_nce_on_cpu(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the results of the op for InfoNCE, on a CPU."""
    x, y, queue = (cpu.prepare(side, dtype, normalize=normalize).rows for side in (query, key, negatives))
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


@planned_op("info_nce_bwd")
def _info_nce_bwd(
    grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    row: Tensor, uses_shared_shift: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype, needs_key: bool, needs_negatives: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes InfoNCE's gradients of queries, keys, negatives and scale for tensors with the
    layout of the arguments. The gradients of keys and negatives have no rows if they are not needed.
    """
    how: dict[str, Any] = {"normalize": normalize, "dtype": dtype}
    if in_batch and _are_joined(query, key, negatives, dtype):
        return _joined_gradients(query, key, negatives, needs_key, needs_negatives, how)
    needs: dict[str, Any] = {"in_batch": in_batch, "needs_key": needs_key, "needs_negatives": needs_negatives}
    function: Any = functools.partial(_info_nce_parts, **needs, **how, grad_dtype=query.dtype)
    if not in_batch and is_small_block(query, negatives, dtype):
        function = features_pass(function, (query, key, negatives, *[None] * (5 + needs_key)), **how)

    def inputs_of(grad_loss: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of ``_info_nce_parts`` after the coefficient of InfoNCE's gradients."""
        query, key, negatives, logit_scale, row, _ = others
        coefficient = grad_loss.to(row.dtype) / max(len(query), 1)
        of_negatives = _nothing_from_columns(row, len(negatives))
        zeros = [row.new_zeros(key.shape)] if needs_key and not in_batch else []
        return coefficient, *others, coefficient * logit_scale, of_negatives, *zeros

    def compute(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of InfoNCE."""
        coefficient, *inputs = inputs_of(*args[:7])
        query_grad, *parts = function(*inputs)
        key_grad = parts.pop(0) if needs_key else new_gradient(args[2][:0])
        negatives_grad = parts.pop(0) if needs_negatives else new_gradient(args[3][:0])
        return query_grad, key_grad, negatives_grad, scale_gradient(parts, coefficient)

    return compute


def _columns_like(key: Tensor, negatives: Tensor) -> Tensor:
    """Return a tensor with the layout of keys and negatives in one matrix, and without their values."""
    return key.new_empty(len(key) + len(negatives), key.shape[1])


def _joined_gradients(
    query: Tensor, key: Tensor, negatives: Tensor, needs_key: bool, needs_negatives: bool, how: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function that computes InfoNCE's gradients for keys and negatives in one matrix."""
    n = len(key)
    backward = functools.partial(
        softmax_gradients, offset=0, weight=1 / n, grad_dtype=query.dtype, has_text=needs_key or needs_negatives, **how
    )  # fmt: skip
    replay = features_pass(backward, (None, query, _columns_like(key, negatives), *[None] * 4), **how)

    def compute(
        grad_loss: Tensor, query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, row: Tensor,
        uses_shared_shift: Tensor, *_: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute the gradients of InfoNCE."""
        columns = torch.cat((key, negatives))
        of_columns = _nothing_from_columns(row, len(columns))
        query_grad, *grads, scale_grad = replay(
            grad_loss, query, columns, logit_scale, row, of_columns, uses_shared_shift
        )
        key_grad, negatives_grad = (grads[0][:n], grads[0][n:]) if grads else (query[:0], query[:0])
        # The results of an op must not share memory, and a compiler takes them to start at multiples of 16 bytes.
        key_grad = key_grad.clone() if needs_key else new_gradient(key[:0])
        negatives_grad = negatives_grad if needs_negatives else new_gradient(negatives[:0])
        if negatives_grad.storage_offset() * negatives_grad.itemsize % 16:
            negatives_grad = negatives_grad.clone()
        return query_grad, key_grad, negatives_grad, scale_grad

    return compute


def _info_nce_parts(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor, row: Tensor, uses_shared_shift: Tensor,
    factor: Tensor, of_queue: Tensor, acc_key: Tensor | None = None, *,
    in_batch: bool, needs_key: bool, needs_negatives: bool, normalize: bool, dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return InfoNCE's gradients of the queries, of keys and negatives if needed, and the terms of that of the scale.

    Without ``in_batch``, nothing is added to the zeros of ``acc_key``: the gradient of a key comes from its pair alone.
    """
    blocks = logit_blocks(query.device)
    x, y = prepare_both(query, key, dtype, normalize=normalize)
    queue = blocks.prepare(negatives, dtype, normalize=normalize)
    if needs_key and in_batch:
        acc_key = new_accumulator(y.rows)
    acc_queue = new_accumulator(queue.rows) if needs_negatives else None
    of_keys = _nothing_from_columns(row, len(key)) if in_batch else None
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
        """Add the InfoNCE gradient of a strip of queries, against the batch's keys and the queue."""
        own, of_rows, is_first = x.rows[strip], row[:, strip], strip.start == 0
        scale_sums = []
        if of_keys is not None:
            block = own, y.rows, logit_scale, Normalizers(of_rows, of_keys, uses_shared_shift), strip.start
            scale_sums.append(blocks.add_gradients(*block, acc, acc_key, is_new_x=True, is_new_y=is_first))
        block = own, queue.rows, logit_scale, Normalizers(of_rows, of_queue, uses_shared_shift), len(negatives)
        scale_sums.append(blocks.add_gradients(*block, acc, acc_queue, is_new_x=not in_batch, is_new_y=is_first))
        return scale_sums

    grads = [new_gradient(query, grad_dtype)]
    # PyTorch adds up the parts of an accumulator, which cannot be recorded.
    columns = None if is_small_block(x.rows, queue.rows, dtype) else queue.rows
    parts = gradients_in_strips(blocks, x, y.rows, 0, one_minus_p, factor, grads[0], add, columns)
    # These gradients are allocated here, so that they can reuse the memory of G.
    if acc_key is not None:
        grads.append(new_gradient(key, grad_dtype))
        blocks.finish(acc_key, y, x.rows, 0, one_minus_p, factor, grads[-1])
    if acc_queue is not None:
        grads.append(new_gradient(negatives, grad_dtype))
        # With the offset len(query), no negative of the queue is part of a pair. The zeros stand for one_minus_p.
        blocks.finish(acc_queue, queue, x.rows, len(query), of_queue[1], factor, grads[-1])
    return *grads, *(part for part in parts if part is not None)


register_gradients(_info_nce_fwd, _info_nce_bwd, optional=(1, 2))


def _are_joined(query: Tensor, key: Tensor, negatives: Tensor, dtype: torch.dtype) -> bool:
    """Return whether kernels take the keys and negatives as one matrix.

    They do if they compute the gradients from one block of the logits. Then InfoNCE with the keys of the batch is the
    contrastive loss of the queries with these columns, in one direction.
    """
    sizes = len(query), len(key) + len(negatives), query.shape[1]
    return triton_runs_on(query.device) and launches.is_one_block(query.device, dtype, *sizes)


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
    options = op, in_batch, in_batch.__class__, normalize, normalize.__class__, backend
    if negatives is None:
        known = known_loss(options, query, key, logit_scale, both=False, normalize=normalize)
        if known is not None:
            return known
        check_pairs(op, ("query", "key"), query, key)
        check_bool(op, "in_batch", in_batch)
        check_bool(op, "normalize", normalize)
        scale = scale_tensor(op, logit_scale, query, like_name="query")
        if not in_batch:
            raise ValueError(f"{op}: in_batch=False needs negatives [K, D], got None")
        return pairwise_loss(
            op, "query", query, key, scale, backend, options,
            both=False, normalize=normalize, offset=0, save_memory=False,
        )  # fmt: skip
    tensors: Any = (query, key, negatives, logit_scale)
    compute = _info_nce_fwd.find(options, tensors)
    if compute is not None:
        found: Tensor = compute(*tensors, in_batch, normalize, autocast_dtype(query))[0]
        return found
    check_pairs(op, ("query", "key"), query, key)
    check_bool(op, "in_batch", in_batch)
    check_bool(op, "normalize", normalize)
    scale = scale_tensor(op, logit_scale, query, like_name="query")
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
        whole = whole_info_nce_loss(x, y, queue, scale, in_batch=in_batch)
        if whole is not None:
            return whole
    args = query, key, negatives, scale, in_batch, normalize, dtype
    loss: Tensor = call_planned(_info_nce_fwd, options, args[:4], args)[0]
    return loss
