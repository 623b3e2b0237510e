"""The launches of top_k's Triton kernels."""

import torch
from torch import Tensor

from ..common import cdiv
from ..configs import GemmConfig, gemm_config
from ..launch import arch_of, launch
from .cpu import GROUP
from .kernels import _group_maxima_kernel, _group_scores_kernel


def _config(x: Tensor) -> GemmConfig:
    """Return the launch configuration of top_k's kernels."""
    return gemm_config("top_k", arch_of(x.device), x.dtype)


def group_maxima(query: Tensor, items: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the highest score [Q, G] of each of top_k's queries in each group of items; -inf where there is none."""
    (q, d), n = query.shape, len(items)
    cfg, groups = _config(query), cdiv(n, GROUP)
    maxima = torch.empty(q, groups, dtype=torch.float32, device=query.device)
    launch(
        _group_maxima_kernel, (cdiv(q, cfg.block_m) * cdiv(n, cfg.block_n),),
        query, items, query if allowed is None else allowed.view(torch.uint8), maxima, q, n, d, groups,
        *query.stride(), *items.stride(), config=cfg, device=query.device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, GROUP=GROUP, GROUP_M=8,
        HAS_ALLOWED=allowed is not None,
    )  # fmt: skip
    return maxima


def group_scores(query: Tensor, items: Tensor, groups: Tensor) -> Tensor:
    """Return the scores [Q, C, GROUP] of each of top_k's queries with the items of its chosen ``groups`` [Q, C]."""
    (q, d), n = query.shape, len(items)
    cfg, chosen = _config(query), groups.shape[1]
    scores = torch.empty(q, chosen, GROUP, dtype=torch.float32, device=query.device)
    launch(
        _group_scores_kernel, (q * chosen,), query, items, groups.contiguous(), scores, n, d, chosen,
        *query.stride(), *items.stride(), config=cfg, device=query.device, BLOCK_K=cfg.block_k, GROUP=GROUP,
    )  # fmt: skip
    return scores
