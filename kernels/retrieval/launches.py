"""The launches of the retrieval ranks' Triton kernels."""

import torch
from torch import Tensor

from ..common import cdiv
from ..configs import gemm_config
from ..launch import arch_of, launch
from .cpu import best_scores
from .kernels import _count_ahead_kernel, _own_score_kernel

SPAN = 1024  # texts that one program compares with its images; this takes fewer atomics than a program per tile


def ahead(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the counts of :func:`clipfast.kernels.retrieval.cpu.ahead` for ``retrieval_ranks``, by Triton kernels."""
    (m, d), n, device = image.shape, len(text), image.device
    cfg = gemm_config("retrieval_ranks", arch_of(device), image.dtype)
    blocks = {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "BLOCK_K": cfg.block_k}
    owner32, strides = owner.to(torch.int32), (*image.stride(), *text.stride())
    own = torch.empty(n, dtype=torch.float32, device=device)
    pairs = min(cfg.block_m, cfg.block_n)
    launch(
        _own_score_kernel, (cdiv(n, pairs),), image, text, owner32, own, n, d, *strides,
        config=cfg, device=device, PAIRS=pairs, **blocks,
    )  # fmt: skip
    counts = torch.zeros(m, dtype=torch.int32, device=device), torch.zeros(n, dtype=torch.int32, device=device)
    launch(
        _count_ahead_kernel, (cdiv(m, cfg.block_m) * cdiv(n, SPAN),),
        image, text, owner32, *best_scores(own, owner, m), *counts, m, n, d, *strides,
        config=cfg, device=device, SPAN=SPAN, GROUP_M=8, **blocks,
    )  # fmt: skip
    image_ahead, text_ahead = counts
    return image_ahead.long(), text_ahead.long()
