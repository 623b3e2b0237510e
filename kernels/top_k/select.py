"""Selection of the best of a row of scores, on any device."""

import torch
from torch import Tensor

from ..launch import triton_runs_on

GROUP = 32  # neighbouring items that share one maximum


def best_places(scores: Tensor, k: int) -> Tensor:
    """Return the places [Q, k] of the k highest of each row's scores [Q, W] in rising order; the first of equal ones.

    ``torch.topk`` leaves open which of equal scores it takes.

    Args:
        scores: no NaN.
        k: at most W.
    """
    best = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    least = best.values[:, k - 1 : k]
    # A GPU would have to wait for the answer whether there are others of the lowest score.
    if not triton_runs_on(scores.device) and not (best.values[:, k:] == least).any():
        return best.indices[:, :k].sort(dim=1).values
    above, level = scores > least, scores == least
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    slots = (chosen.cumsum(1) - 1).masked_fill_(~chosen, k)  # what is not chosen shares one more slot
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(slots)
    return slots.new_empty(len(scores), k + 1).scatter_(1, slots, places)[:, :k]
