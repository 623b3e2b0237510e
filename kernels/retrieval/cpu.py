"""Retrieval ranks on the CPU: the scores are computed tile by tile, by PyTorch's own matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import cdiv, slices
from ..dtypes import accumulate_dtype

TILE = 768  # side of a tile of scores; its scores and marks fit into the cache
TILE_UNIT = 192  # a multiple of the rows and columns that any BLAS keeps in registers


def ahead(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Count for ``retrieval_ranks`` the other texts that score at least as high as an image's best own text [M], and
    the other images that score at least as high as a text's own image [N].

    For an image without texts these are all texts, and for a text without image all images.
    """
    (m, d), n = image.shape, text.shape[0]
    # Every product has the same shape, of whole register blocks. BLAS would sum an incomplete block in another order,
    # and pairs with equal features could then have scores with other bits.
    side = min(TILE, cdiv(max(min(m, n), 1), TILE_UNIT) * TILE_UNIT)
    if min(m, n) > 0 and max(m, n) <= side:
        return _ahead_in_one_tile(image, text, owner, side)
    x, y = image.new_zeros(2, side, d, dtype=accumulate_dtype(image.dtype))
    scores, marks = x.new_empty(2, side, side)
    own, one = x.new_empty(n), x.new_ones(())
    for texts in (owner >= 0).nonzero().squeeze(1).split(side):
        x[: len(texts)], y[: len(texts)] = image[owner[texts]], text[texts]
        own[texts] = torch.mm(x, y.T, out=scores).diagonal()[: len(texts)]
    image_best, text_best = best_scores(own, owner, m)
    image_ahead, text_ahead = owner.new_full((m,), n), owner.new_full((n,), m)
    for images in slices(m, side):
        rows = images.stop - images.start
        x[:rows] = image[images]
        for texts in slices(n, side):
            columns = texts.stop - texts.start
            y[:columns] = text[texts]
            tile, mark = torch.mm(x, y.T, out=scores)[:rows, :columns], marks[:rows, :columns]
            row = owner[texts] - images.start
            column = ((row >= 0) & (row < rows)).nonzero().squeeze(1)
            pairs = row[column], column
            # An image's or text's own pairs are not ahead, nor are scores below the best of these pairs. Both are
            # marked by 1 and counted by a sum, since sums of ones are exact.
            behind = torch.lt(tile, image_best[images, None], out=mark).index_put_(pairs, one)
            image_ahead[images] -= behind.sum(1).long()
            behind = torch.lt(tile, text_best[texts], out=mark).index_put_(pairs, one)
            text_ahead[texts] -= behind.sum(0).long()
    return image_ahead, text_ahead


def _ahead_in_one_tile(image: Tensor, text: Tensor, owner: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the counts of :func:`ahead` for at most ``side`` images and texts, whose scores are one product."""
    (m, _), n, work, none = image.shape, text.shape[0], accumulate_dtype(image.dtype), float("-inf")
    x, y = F.pad(image.to(work), (0, 0, 0, side - m)), F.pad(text.to(work), (0, 0, 0, side - n))
    scores = torch.mm(x.contiguous(), y.contiguous().T)[:m, :n]
    is_own = owner == torch.arange(m)[:, None]  # [M, N]
    own = scores.where(is_own, none).nan_to_num_(none, float("inf"), none)
    image_behind = (scores < own.amax(1, keepdim=True)).logical_or_(is_own).sum(1)
    text_behind = (scores < own.amax(0)).logical_or_(is_own).sum(0)
    return n - image_behind, m - text_behind


def slots(owner: Tensor, num_images: int) -> Tensor:
    """Return the index of each text's image for the op ``retrieval_ranks``; ``num_images`` for a text without image."""
    return owner.masked_fill(owner < 0, num_images)


def best_scores(own: Tensor, owner: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the best score of each image with its own texts [M], and the score of each text with its own image [N].

    It is -inf if there is no such score, or only NaN. No score is below -inf, so all other images or texts then count
    as ahead.
    """
    text_best = own.masked_fill((owner < 0) | own.isnan(), float("-inf"))
    image_best = own.new_full((num_images + 1,), float("-inf"))
    return image_best.scatter_reduce_(0, slots(owner, num_images), text_best, "amax")[:num_images], text_best
