"""The launches that compute, from the statistics of all ranks, the terms of the contrastive loss and its gradients."""

import torch
from torch import Tensor

from ..common import cdiv
from ..configs import RowConfig, planned
from ..launch import Plan, launch
from .merge_kernels import _rank_terms_kernel, _rank_weights_kernel
from .operands import totals_plan, vector
from .stats import Normalizers, RankWeights

TERMS = RowConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)  # a program merges block_n blocks at a time
WEIGHTS = RowConfig(block_m=256, block_n=1024, num_warps=4, num_stages=1)  # a program reads block_n ranks at a time
FLAGS = 1024  # a program reads this many flags at a time


def rank_terms(
    row: tuple[Tensor, Tensor], col: tuple[Tensor, Tensor], positive: Tensor, uses_shared_shift: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a rank sends of its b pairs [b, 5], one_minus_p [b], and ``weight`` times the sum of the losses [].

    Args:
        row: maximum and sum of each row of logits, [b] each.
        col: maximum and sum of each column in every block that has a part of it, [blocks, b] each, in one layout.
        positive: [b], the logits of the pairs.
        uses_shared_shift: [any] int8.
        weight: the weight of a pair in the loss.
    """
    (blocks, rows), (stride_block, stride_n) = col[0].shape, col[0].stride()
    programs = cdiv(rows, TERMS.block_m)
    sent, one_minus_p = vector(positive, rows, 5), vector(positive, rows)
    losses, loss = vector(positive, programs), vector(positive)
    launch(
        _rank_terms_kernel, (programs,), *row, *col, positive, uses_shared_shift, sent, one_minus_p, losses,
        rows, blocks, stride_block, stride_n, len(uses_shared_shift),
        config=TERMS, device=positive.device, BLOCK_M=TERMS.block_m, BLOCK_N=TERMS.block_n, BLOCK_FLAGS=FLAGS,
    )  # fmt: skip
    _total_plan(positive.device, programs, weight).start(losses, losses, loss, loss, loss, losses)
    return sent, one_minus_p, loss


@planned
def _total_plan(device: torch.device, programs: int, weight: float) -> Plan:
    """Return the plan that adds up the losses of the programs of ``_rank_terms_kernel``."""
    return totals_plan(device, 1, programs, weight, has_flags=False, has_grad_loss=False)


def rank_weights(
    terms: Tensor, heads: Tensor, one_minus_p: Tensor, own: slice, logit_scale: Tensor, weight: float
) -> RankWeights:
    """Return what the gradients of this rank's b pairs need, given the gradients of the losses of all ranks.

    Args:
        terms: [N, 6], what :func:`rank_terms` returned on each rank, and in the last column the gradient of its loss.
        heads: [ranks, 6], the terms of the first pair of each rank; zeros for a rank without pairs.
        one_minus_p: [b], of this rank.
        own: the pairs of this rank.
        logit_scale, weight: the factor on the cosine similarities, and the weight of a pair in the loss.
    """
    pairs = len(terms)
    row, col = vectors = vector(terms, 2, 2, pairs)
    weighted = vector(terms, len(one_minus_p))
    flag, coefficient, factor = terms.new_empty((), dtype=torch.int8), vector(terms), vector(terms)
    launch(
        _rank_weights_kernel, (max(1, cdiv(pairs, WEIGHTS.block_m)),),
        terms, heads, one_minus_p, logit_scale, vectors, flag, weighted, coefficient, factor,
        pairs, len(heads), heads.stride(0), own.start, len(one_minus_p), weight,
        config=WEIGHTS, device=terms.device, BLOCK_M=WEIGHTS.block_m, BLOCK_N=WEIGHTS.block_n,
    )  # fmt: skip
    return RankWeights(Normalizers(row, col, flag), weighted, coefficient, factor)
