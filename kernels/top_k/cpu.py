"""The scores of top_k on the CPU, by PyTorch's own matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import cdiv, slices
from ..dtypes import accumulate_dtype

MOST_SORTED = 512  # scores with at most this many items are sorted: to choose groups first would take more time
GROUP = 32  # neighbouring items that share one maximum
TILE = 1 << 23  # scores that are computed at once; smaller tiles make threads wait for each other more often
CONVERTED = 1 << 22  # at most so many elements of bfloat16 or float16 are converted to float32 at once, to save memory
GATHERED = 1 << 22  # elements of the chosen groups' items that are gathered at once, which limits the copy


def find(query: Tensor, items: Tensor, allowed: Tensor | None, scores: Tensor, indices: Tensor) -> None:
    """Write the k best items of a block of top_k's queries to ``scores`` and ``indices`` [Q, k]."""
    k = scores.shape[1]
    maxima = _group_maxima(query, items, allowed)
    groups = best_places(maxima, min(k, maxima.shape[1]))  # [Q, C]
    found = _group_scores(query, items, groups).flatten(1)
    places = (groups[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    hidden = (places >= len(items)) | found.isnan()
    if allowed is not None:
        hidden |= ~allowed[places.clamp(max=len(items) - 1)]
    lacking = max(0, k - found.shape[1])
    found = F.pad(found.masked_fill(hidden, float("-inf")), (0, lacking), value=float("-inf"))
    best = best_places(found, k)
    order = torch.sort(found.gather(1, best), dim=1, descending=True, stable=True, out=(scores, indices))[1]
    places = F.pad(places, (0, lacking)).gather(1, best.gather(1, order))
    indices.copy_(places.masked_fill_(scores == float("-inf"), -1))


def find_among_few(query: Tensor, items: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of at most MOST_SORTED items for each of top_k's queries, from their sorted scores with all."""
    n, work, none = items.shape[0], accumulate_dtype(query.dtype), float("-inf")
    at_once = TILE // n
    if query.shape[0] > at_once:
        parts = [find_among_few(block, items, allowed, k) for block in query.split(at_once)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    # BLAS multiplies whole groups of items, as in _group_scores: it sums an incomplete block of rows in another order,
    # and equal items could then have scores with other bits.
    groups = F.pad(items.to(work), (0, 0, 0, -n % GROUP)).contiguous()
    scores = torch.bmm(groups.expand(query.shape[0], -1, -1), query.to(work).unsqueeze(2)).squeeze(2)[:, :n]
    if allowed is not None:
        scores.masked_fill_(~allowed, none)
    scores.nan_to_num_(none, float("inf"), none)
    if k > n:
        scores = F.pad(scores, (0, k - n), value=none)
    scores, indices = scores.sort(dim=1, descending=True, stable=True)
    scores, indices = scores[:, :k].contiguous(), indices[:, :k].contiguous()
    return scores, indices.masked_fill_(scores.isneginf(), -1)


def _group_maxima(query: Tensor, items: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the highest score [Q, G] of each of top_k's queries in each group of items, -inf if a group has none."""
    (q, d), n, work = query.shape, len(items), accumulate_dtype(query.dtype)
    maxima = query.new_full((q, cdiv(n, GROUP)), float("-inf"), dtype=work)
    query = query.to(work)
    most = max(1, TILE // q) if items.dtype == work else min(max(1, TILE // q), max(1, CONVERTED // max(d, 1)))
    size = cdiv(most, GROUP) * GROUP
    buffer = query.new_empty(q * min(size, n))
    for rows in slices(n, size):
        scores = buffer[: q * (rows.stop - rows.start)].view(q, -1)
        torch.mm(query, items[rows].to(work).T, out=scores)
        if allowed is not None:
            scores.masked_fill_(~allowed[rows], float("-inf"))
        groups = slice(rows.start // GROUP, cdiv(rows.stop, GROUP))
        torch.amax(_in_groups(scores), 2, out=maxima[:, groups])
        if maxima[:, groups].isnan().any():  # rare; amax propagates NaN, but here a NaN counts as the lowest score
            maxima[:, groups] = _in_groups(scores.masked_fill_(scores.isnan(), float("-inf"))).amax(2)
    return maxima


def _in_groups(scores: Tensor) -> Tensor:
    """Return the scores of items [Q, N] by groups of items [Q, G, GROUP]; the last group is filled up with -inf."""
    lacking = -scores.shape[1] % GROUP
    if lacking:
        scores = F.pad(scores, (0, lacking), value=float("-inf"))
    return scores.unflatten(1, (-1, GROUP))


def _group_scores(query: Tensor, items: Tensor, groups: Tensor) -> Tensor:
    """Return the scores [Q, C, GROUP] of each of top_k's queries with the items of its chosen ``groups`` [Q, C]."""
    work, (q, chosen), d = accumulate_dtype(query.dtype), groups.shape, items.shape[1]
    scores = query.new_empty(q, chosen * GROUP, dtype=work)
    for rows in slices(q, max(1, GATHERED // max(1, chosen * GROUP * d))):
        places = groups[rows, :, None] * GROUP + torch.arange(GROUP)
        gathered = items[places.clamp_(max=len(items) - 1).flatten(1)].to(work)  # [B, C GROUP, D]
        torch.bmm(gathered, query[rows, :, None].to(work), out=scores[rows, :, None])
    return scores.view(q, chosen, GROUP)


def best_places(scores: Tensor, k: int) -> Tensor:
    """Return the indices [Q, k] of the k highest of each row's ``scores`` [Q, W], in ascending order of the indices.

    Of equal scores, the first count as the highest.

    ``torch.topk`` leaves open which of equal scores it takes.

    Args:
        scores: no NaN.
        k: at most W.
    """
    best = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    least = best.values[:, k - 1 : k]
    if not (best.values[:, k:] == least).any():  # no further score equals the lowest of the k
        return best.indices[:, :k].sort(dim=1).values
    above, level = scores > least, scores == least
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    slots = (chosen.cumsum(1) - 1).masked_fill_(~chosen, k)  # scores that are not chosen share an extra slot
    places = torch.arange(scores.shape[1]).expand_as(slots)
    return slots.new_empty(len(scores), k + 1).scatter_(1, slots, places)[:, :k]
