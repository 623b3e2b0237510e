"""Choosing image-text pairs by the product of their features, as DataComp's CLIP score filtering does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 65536  # pairs that are scored at once


@torch.no_grad()
def pair_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine of image and text of each pair, [N], float32.

    Args:
        images, texts: features [N, D] of any length but 0.

    Raises:
        ValueError: shapes do not fit, or a feature is not finite or has no length.
    """
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(f"images and texts must both be [N, D], got {[*images.shape]} and {[*texts.shape]}")
    blocks = zip(images.split(BLOCK), texts.split(BLOCK), strict=True)
    scores = torch.cat([_cosine(image.float(), text.float()) for image, text in blocks])
    wrong = (~scores.isfinite()).nonzero()
    if len(wrong):
        raise ValueError(f"pair {int(wrong[0])} has a feature with NaN or infinity, or without length")
    return scores


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / lengths


def chosen(scores: Tensor, *, min_score: float | None = None, top: float | None = None) -> Tensor:
    """Return which pairs are kept, bool [N].

    Args:
        scores: of the pairs.
        min_score: keep those with at least this score.
        top: keep this share of the pairs, those of the highest scores; the number is rounded up. Of equal scores, the
            first are kept.

    Raises:
        ValueError: not one of the two is given, or a value is out of range.
    """
    if min_score is not None and top is None:
        if math.isnan(min_score):
            raise ValueError("the least score is not a number")
        return scores >= min_score
    if min_score is not None or top is None:
        raise ValueError("give either the least score of a pair that is kept, or the share of pairs to keep")
    if not 0 < top <= 1:
        raise ValueError(f"the share to keep must be more than 0 and at most 1, got {top:g}")
    count = math.ceil(round(top * len(scores), 6))  # 0.07 * 100 is a little more than 7
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:count].cpu()] = True
    return kept.to(scores.device)
