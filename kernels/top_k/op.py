"""The k best items of each query by the product of features, exactly; the Q x N scores are never all in memory.

With queries x [Q, D], items y [N, D], scores s_qi = x_q . y_i, and groups of GROUP neighbouring items:

    g_qb = max over the items i of group b of s_qi

An item that is among the k best of a query lies in one of the k groups with the highest maxima: otherwise k other
groups would each have an item that scores higher. So the first pass over the scores keeps only the maxima. The second
pass computes the scores of the items in the k best groups of each query, and takes the k best of these.

FLOPs: 2 Q N D, and 2 Q k GROUP D for the second pass. Memory beyond the inputs: a limited number of maxima and of items
at a time, since queries are taken in blocks; on the CPU a tile of scores.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import registered, uses_reference
from ..checks import check_device, check_float, check_like, check_tensor
from ..common import cdiv, slices
from ..dtypes import accumulate_dtype
from ..launch import triton_runs_on
from . import cpu, launches
from .cpu import GROUP

MAXIMA = 1 << 24  # maxima of groups that are in memory at once
GATHERED = 1 << 24  # elements of the chosen groups' items that are in memory at once


@registered("top_k")
def _top_k(query: Tensor, items: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best items of each query. This is the registered op."""
    q, n, on_gpu = query.shape[0], items.shape[0], triton_runs_on(query.device)
    if not on_gpu and 0 < n <= cpu.MOST_SORTED:
        return cpu.find_among_few(query, items, allowed, k)
    scores, indices = _top_k_fake(query, items, allowed, k)
    if 0 in (q, n):
        return scores.fill_(float("-inf")), indices.fill_(-1)
    find = launches.find if on_gpu else cpu.find
    groups = cdiv(n, GROUP)
    gathered = min(k, groups) * GROUP * max(1, items.shape[1])
    for rows in slices(q, max(1, min(MAXIMA // groups, GATHERED // gathered))):
        find(query[rows], items, allowed, scores[rows], indices[rows])
    return scores, indices


_top_k.planned_by(lambda *_: _top_k.run)  # Each call decides anew: nothing calls this op as often as a block's ops.


@_top_k.register_fake
def _top_k_fake(query: Tensor, items: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised results of top_k, for tracing and as buffers."""
    size = (query.shape[0], k)
    return query.new_empty(size, dtype=accumulate_dtype(query.dtype)), query.new_empty(size, dtype=torch.int64)


def top_k(
    query: Tensor, items: Tensor, k: int, *, allowed: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Find the k items of the highest score for each query, exactly, without the Q x N scores.

    The score is the product of the features: the cosine, if they have unit length. Scores are summed in float32, or in
    float64 for float64 operands. Of items with the same score, the first come first; scores that only rounding tells
    apart may come in either order. An item whose score is NaN is never found.

    Autocast changes nothing. There is no gradient.

    Args:
        query: features of the queries [Q, D], float32, float16 or bfloat16 (float64 on the CPU); any strides.
        items: features of the items [N, D], same dtype and device as ``query``.
        k: how many items to find, at least 1.
        allowed: bool [N], False for items that are not to be found. Default: all may be.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Scores [Q, k] in falling order, and the indices [Q, k] of the items, int64. Where fewer than k items can be
        found, the last scores are -inf, and the indices -1.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together, or a k below 1.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op, options = "top_k", (k, backend)
    tensors = (query, items) if allowed is None else (query, items, allowed)
    free = (1,) * len(tensors)  # Nothing depends on the numbers of queries and items.
    if k.__class__ is int:
        compute = _top_k.find(options, tensors, free)
        if compute is not None and (allowed is None or allowed.shape == items.shape[:1]):
            return compute(query, items, allowed, k)
    check_tensor(op, "query", query, 2)
    check_tensor(op, "items", items, 2)
    check_like(op, "items", items, "query", query)
    if query.shape[1] != items.shape[1]:
        raise ValueError(
            f"{op}: query and items must have the same width, got {tuple(query.shape)} and {tuple(items.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{op}: k must be an integer of at least 1, got {k!r}")
    if allowed is not None:
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.shape != items.shape[:1]:
            got = f"{allowed.dtype} {tuple(allowed.shape)}" if isinstance(allowed, Tensor) else type(allowed).__name__
            raise ValueError(f"{op}: allowed must be a bool tensor [{len(items)}], one per item, got {got}")
        check_device(op, "allowed", allowed, "items", items)
    query, items = query.detach(), items.detach()
    if uses_reference(op, backend, query):
        return reference.top_k(query, items, k, allowed=allowed)
    check_float(op, query=query)
    tensors = (query, items) if allowed is None else (query, items, allowed)
    return _top_k.learn(options, tensors, (query, items, allowed, k), free)(query, items, allowed, k)
