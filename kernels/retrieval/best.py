"""The best own scores, which the others are compared with, on any device."""

from torch import Tensor


def slots(owner: Tensor, num_images: int) -> Tensor:
    """Return the index of each text's image; texts of no image share one more place, ``num_images``."""
    return owner.masked_fill(owner < 0, num_images)


def best_scores(own: Tensor, owner: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the best own score of each image [M] and of each text [N]: -inf where there is none, or only NaN.

    Nothing is worse than -inf, so all others are ahead of such an image or text.
    """
    text_best = own.masked_fill((owner < 0) | own.isnan(), float("-inf"))
    image_best = own.new_full((num_images + 1,), float("-inf"))
    return image_best.scatter_reduce_(0, slots(owner, num_images), text_best, "amax")[:num_images], text_best
