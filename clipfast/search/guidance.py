"""Guidance: an image whose pixels follow the gradient of a model's similarity to a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from ..models import CLIP

ZOOM = 0.2  # a view shows this much more or less of the image
SHIFT = 0.2  # and is shifted by up to so many halves of its side
NOISE = 0.1  # of each pixel of a view


class Guided(NamedTuple):
    """What came of an image.

    Attributes:
        images: float [K, 3, S, S] from 0 to 1, the first one and one after each ``every`` steps.
        similarities: of each step, the mean over its views before the step.
    """

    images: Tensor
    similarities: list[float]


def similarity(model: CLIP, images: Tensor, text: Tensor) -> Tensor:
    """Return the cosine similarities [B] of a text feature [D] and images [B, 3, H, W] from 0 to 1, with gradients."""
    visual = model.visual
    mean, std = (images.new_tensor(values)[:, None, None] for values in (visual.image_mean, visual.image_std))
    return model.encode_image((images - mean) / std, normalize=True) @ F.normalize(text, dim=-1)


def guide(
    model: CLIP, text: Tensor, *, steps: int = 200, lr: float = 0.05, views: int = 8, smoothness: float = 1.0,
    every: int = 25, seed: int = 0,
) -> Guided:  # fmt: skip
    """Optimise an image, from noise, to be similar to a text.

    Each step looks at the image several times, shifted, scaled and with noise, for otherwise the pixels find a pattern
    that only the one grid of patches sees.

    Args:
        model: a model of clipfast in evaluation mode; its parameters get no gradients.
        text: a feature [D].
        steps: of Adam.
        lr: its rate.
        views: how often the image is looked at in a step.
        smoothness: weight of the mean difference of neighbouring pixels, which is made small.
        every: how many steps lie between two of the images that are kept.
        seed: of the noise and of the views.

    Raises:
        ValueError: ``steps``, ``views`` or ``every`` is less than 1.
    """
    for name, value in (("steps", steps), ("views", views), ("every", every)):
        if value < 1:
            raise ValueError(f"guide: {name} must be at least 1, got {value}")
    side = model.visual.image_size
    generator = torch.Generator().manual_seed(seed)
    # The sigmoid keeps the pixels from 0 to 1.
    pixels = (0.3 * torch.randn(1, 3, side, side, generator=generator)).to(text.device).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr)
    kept, similarities = [pixels.detach().sigmoid()], []
    for step in range(steps):
        image = pixels.sigmoid()
        found = similarity(model, _views(image, views, generator), text).mean()
        (gradient,) = torch.autograd.grad(smoothness * roughness(image) - found, pixels)
        pixels.grad = gradient
        optimizer.step()
        similarities.append(found.item())
        if (step + 1) % every == 0:
            kept.append(pixels.detach().sigmoid())
    return Guided(torch.cat(kept), similarities)


def roughness(images: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels (total variation)."""
    return (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2


def _views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return an image [1, 3, S, S] as seen from several places: [count, 3, S, S]."""
    draws = (2 * torch.rand(count, 3, generator=generator) - 1).to(image.device)
    theta = image.new_zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + ZOOM * draws[:, 0]
    theta[:, :, 2] = SHIFT * draws[:, 1:]
    grid = F.affine_grid(theta, [count, *image.shape[1:]], align_corners=False)
    views = F.grid_sample(image.expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    return views + NOISE * torch.randn(views.shape, generator=generator).to(image.device)


def strip(rows: Sequence[Tensor], side: int = 96) -> Image.Image:
    """Return images [K, 3, S, S] from 0 to 1 as one picture, one row for each tensor."""
    from PIL import Image

    images = [(255 * row).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    picture = Image.new("RGB", (side * max(map(len, images)), side * len(images)), "white")
    for y, row in enumerate(images):
        for x, image in enumerate(row):
            picture.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (side * x, side * y))
    return picture
