"""The blocks of the sigmoid loss on a CPU: the chunks and pieces of ``cpu``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import _chunks, _pieces
from .stats import pairs_in


def sums(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all but the pairs (i, i + diagonal) of losses and of probabilities, [] in float64; logits of the pairs,
    [M].
    """
    positive = x.new_empty(len(x))
    loss, probability = x.new_zeros(2, dtype=torch.float64).unbind()
    for rows, logits in _chunks(x, y, logit_scale):
        paired, _ = pairs_in(len(logits), len(y), rows.start + diagonal)
        pairs = logits.diagonal(rows.start + diagonal)
        positive[rows][paired] = pairs + logit_bias
        pairs.fill_(float("-inf"))
        for piece in _pieces(logits):
            tile = logits[piece].add_(logit_bias)
            loss += F.softplus(tile).sum()
            probability += tile.sigmoid_().sum()
    return loss, probability, positive


def add_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    diagonal: int,
    acc_x: Tensor,
    acc_y: Tensor,
) -> None:
    """acc_x += G y and acc_y += G^T x, with G recomputed once for both."""
    for rows, logits in _chunks(x, y, logit_scale):
        for piece in _pieces(logits):
            logits[piece].add_(logit_bias).sigmoid_()
        logits.diagonal(rows.start + diagonal).zero_()
        acc_x[rows].addmm_(logits, y)
        acc_y.addmm_(logits.T, x[rows])
