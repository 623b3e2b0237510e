"""The launches of top_k's Triton kernels."""

import torch
from torch import Tensor

from ..common import cdiv
from ..configs import RowConfig, gemm_config
from ..launch import arch_of, launch
from .cpu import GROUP
from .kernels import _group_maxima_kernel, _group_scores_kernel, _results_kernel

RESULTS = RowConfig(block_m=1, block_n=1024, num_warps=4, num_stages=1)  # a program writes block_n results


def find(query: Tensor, items: Tensor, allowed: Tensor | None, scores: Tensor, indices: Tensor) -> None:
    """Write the k best items of a block of top_k's queries to ``scores`` and ``indices``, which are contiguous [Q, k].

    All keys of a query differ, so PyTorch's topk finds the same items in every run.
    """
    (q, d), n, k, device = query.shape, len(items), scores.shape[1], query.device
    cfg, groups = gemm_config("top_k", arch_of(device), query.dtype), cdiv(n, GROUP)
    strides, has_allowed = (*query.stride(), *items.stride()), allowed is not None
    mask = query if allowed is None else allowed.contiguous().view(torch.uint8)
    maxima = query.new_empty((q, groups), dtype=torch.int64)
    launch(
        _group_maxima_kernel, (cdiv(q, cfg.block_m) * cdiv(n, cfg.block_n),),
        query, items, mask, maxima, q, n, d, groups, *strides, config=cfg, device=device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, GROUP=GROUP, GROUP_M=8, HAS_ALLOWED=has_allowed,
    )  # fmt: skip
    chosen = min(k, groups)
    best = maxima.topk(chosen, sorted=False).values
    keys = query.new_empty((q, chosen * GROUP), dtype=torch.int64)
    launch(
        _group_scores_kernel, (q * chosen,), query, items, mask, best, keys, n, d, chosen, *strides,
        config=cfg, device=device, BLOCK_K=cfg.block_k, GROUP=GROUP, HAS_ALLOWED=has_allowed,
    )  # fmt: skip
    found = min(k, chosen * GROUP)
    launch(
        _results_kernel, (cdiv(q * k, RESULTS.block_n),), keys.topk(found).values, scores, indices, q * k, found, k,
        config=RESULTS, device=device, BLOCK=RESULTS.block_n,
    )  # fmt: skip
