"""InfoNCE, the contrastive loss of one direction, with negatives from the batch, from a queue, or from both.

With queries x [N, D], their keys y [N, D], negatives q [K, D] and scale s:

    Z_i = sum_k exp(s x_i . q_k) + sum_{j != i} exp(s x_i . y_j)                  the second sum with ``in_batch`` only
    L = 1/N sum_i log(1 + Z_i / exp(s x_i . y_i))               p_i = exp(s x_i . y_i) / (Z_i + exp(s x_i . y_i))
    dL/dx = s/N (P_q q + P_y y - (1 - p) * y)    dL/dq = s/N P_q^T x    dL/dy = s/N (P_y^T x - (1 - p) * x)

P_q and P_y hold the probabilities of the negatives. Keys and negatives are two blocks of columns. The statistics of
each are merged before the loss is taken from them, and each block's gradients use the merged ones, so no block needs to
know of the other. As in ``contrastive``, a pair is in no sum and passes through no 16-bit tile, and the logits never
exist. Without a queue this is the loss of ``contrastive`` in one direction.

FLOPs for C columns: 2 N C D forward and 6 N C D backward (4 where the columns need no gradient).
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_like, check_tensor
from ..common import LOG2E
from ..dtypes import accumulate_dtype
from .contrastive import pairwise_loss
from .features import pair_products
from .gradients import gradients_in_strips, new_gradient, scale_gradient
from .logit_blocks import logit_blocks
from .loss_arguments import check_pairs, operand_dtype, scale_tensor
from .registration import register_gradients
from .softmax_stats import Normalizers, merge, new_stats, pair_terms


@registered("info_nce_fwd")
def _info_nce_fwd(
    query: Tensor, key: Tensor, negatives: Tensor, logit_scale: Tensor,
    in_batch: bool, normalize: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss and what the backward pass needs: row [3, N] and uses_shared_shift [].

    row holds maximum, inv_denom and one_minus_p of the queries.
    """
    blocks = logit_blocks(query.device)
    x, y, queue = (blocks.prepare(side, dtype, normalize=normalize).rows for side in (query, key, negatives))
    # With this offset no negative of the queue is a pair.
    parts = [blocks.statistics(x, queue, logit_scale, len(queue)) if len(queue) else new_stats(x, queue)]
    if in_batch:
        parts.append(blocks.statistics(x, y, logit_scale, 0))
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
    """Return the gradients of queries, keys, negatives (these two without rows if not needed) and scale."""
    blocks = logit_blocks(query.device)
    x, y, queue = (blocks.prepare(side, dtype, normalize=normalize) for side in (query, key, negatives))
    coefficient = grad_loss.to(row.dtype) / max(len(query), 1)
    factor = coefficient * logit_scale
    query_grad = new_gradient(query)
    acc_key = blocks.new_accumulator(len(key), y.rows) if needs_key else None
    acc_queue = blocks.new_accumulator(len(negatives), queue.rows) if needs_negatives else None
    of_keys, of_queue = _nothing_from_columns(row, len(key)), _nothing_from_columns(row, len(negatives))
    one_minus_p = row[2]

    def add(strip: slice, acc: Tensor) -> list[Tensor | None]:
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
    key_grad = new_gradient(key if needs_key else key[:0])  # these two in the memory that G had
    negatives_grad = new_gradient(negatives if needs_negatives else negatives[:0])
    if acc_key is not None:
        blocks.finish(acc_key, y, x.rows, 0, one_minus_p, factor, key_grad)
    if acc_queue is not None:
        # With this offset no negative has a positive.
        zeros = row.new_zeros(len(negatives))
        blocks.finish(acc_queue, queue, x.rows, len(query), zeros, factor, negatives_grad)
    return query_grad, key_grad, negatives_grad, scale_gradient(parts, coefficient)


register_gradients(_info_nce_fwd, _info_nce_bwd, optional=(1, 2))


def _nothing_from_columns(row: Tensor, columns: int) -> Tensor:
    """Return normalizers [2, columns] with which columns add nothing to G, however large a logit is."""
    col = row.new_zeros(2, columns)
    col[0].fill_(float("inf"))  # an assignment would make a tensor of the number first
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
    if not isinstance(in_batch, bool):
        raise TypeError(f"{op}: in_batch must be a bool, got {type(in_batch).__name__}")
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
    return _info_nce_fwd(query, key, negatives, scale, in_batch, normalize, dtype)[0]
