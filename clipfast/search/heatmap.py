"""Heat maps: the similarity of each pixel of a picture to texts, by a CLIP model trained on whole pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.common import slices
from ..models import CLIP, dense_features
from ..models.naflex import NaFlexVision

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

STEPS = 8  # a sliding window moves by 1/8 of its side
MARGIN = 4  # the picture is extended by 1/4 of a window's side, by repeating the pixels of its edge
COLOURS = "inferno"  # a colour map that is perceptually uniform, even when it is printed in grey
OPACITY = 0.55  # the opacity of a heat map's colours over a picture


def side_of(model: Any) -> int:
    """Return the width and height in pixels of a model's training images, and so of the windows of a heat map.

    Raises:
        ValueError: the model was not made by ``clipfast.create_model``, or takes images of any size (NaFlex).
    """
    if not isinstance(model, CLIP):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"heat maps need a model of clipfast.create_model, got {kind}")
    if isinstance(model.visual, NaFlexVision):
        raise ValueError("heat maps need a model for images of one size, got a NaFlex model")
    side: int = model.visual.image_size
    return side


@torch.no_grad()
def heat_maps(
    model: CLIP, image: Tensor, texts: Tensor, *, features: str = "values", stride: int | None = None,
    margin: int | None = None, batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """Compute heat maps of an image: the cosine similarity of each pixel and each text.

    A window of the model's training size moves over the image. In each window, the similarities of the patches are
    interpolated bilinearly between the centres of the patches. Where windows overlap, their similarities are averaged,
    with a weight that falls with the distance from the centre of the window.

    Args:
        model: a model of clipfast in evaluation mode.
        image: [3, H, W] of uint8, or of normalised floats.
        texts: the features of the texts [T, D].
        features: as :func:`clipfast.dense_features` takes it.
        stride: the number of pixels by which the window moves; default: an eighth of its side. With a stride of less
            than a patch, the map is finer than patches.
        margin: the least number of pixels by which the image is extended on each side, with the pixels of its edge;
            default: a quarter of the side of the window.
        batch_size: the number of windows to encode at once.

    Returns:
        The heat maps [T, H, W], from -1 to 1.

    Raises:
        ValueError: the model is not supported by :func:`side_of`, stride or margin are out of range, or as
            :func:`clipfast.dense_features`.
    """
    side = side_of(model)
    stride, margin = max(1, side // STEPS) if stride is None else stride, side // MARGIN if margin is None else margin
    if not 0 < stride <= side or margin < 0:
        raise ValueError(f"heat_maps: stride must be from 1 to {side} and margin at least 0, got {stride} and {margin}")
    height, width = image.shape[-2:]
    before, after = zip(*(_margins(length, side, stride, margin) for length in (height, width)), strict=True)
    dtype = image.dtype if image.is_floating_point() else torch.float32
    around = (before[1], after[1], before[0], after[0])
    padded = F.pad(image[None].to(dtype), around, mode="replicate")[0].to(image.dtype)
    hat = 1 - ((torch.arange(side, device=image.device) + 0.5) / side * 2 - 1).abs()
    weight = hat[:, None] * hat
    texts = F.normalize(texts, dim=-1)
    total = texts.new_zeros(len(texts), *padded.shape[1:])
    weights = texts.new_zeros(padded.shape[1:])
    every = _places(padded.shape[1:], side, stride)
    for places in (every[some] for some in slices(len(every), batch_size)):
        windows = torch.stack([padded[:, y : y + side, x : x + side] for y, x in places])
        dense = F.normalize(dense_features(model, windows, features), dim=-1)
        scores = (dense @ texts.T.to(dense.dtype)).permute(0, 3, 1, 2).to(total.dtype)
        for (y, x), found in zip(places, F.interpolate(scores, (side, side), mode="bilinear"), strict=True):
            total[:, y : y + side, x : x + side] += weight * found
            weights[y : y + side, x : x + side] += weight
    inside = (slice(before[0], before[0] + height), slice(before[1], before[1] + width))
    return total[:, *inside] / weights[inside]


def _margins(length: int, side: int, stride: int, margin: int) -> tuple[int, int]:
    """Return how many pixels a heat map adds before and after ``length`` pixels, so that windows cover them exactly.

    At least ``margin`` are added at either end; ``side`` and ``stride`` are those of the windows.
    """
    extended = max(length + 2 * margin, side)
    extended += -(extended - side) % stride
    before = (extended - length) // 2
    return before, extended - length - before


def _places(size: Sequence[int], side: int, stride: int) -> list[tuple[int, int]]:
    """Return the upper left corner (y, x) of each sliding window of a heat map over an image of (height, width)."""
    rows, columns = (range(0, length - side + 1, stride) for length in size)
    return [(y, x) for y in rows for x in columns]


def shares(maps: Tensor, logit_scale: float) -> Tensor:
    """Return the softmax over the texts of heat maps [T, H, W], as the share of each text at each pixel.

    Raises:
        ValueError: there is only one text, whose share would be 1 everywhere.
    """
    if len(maps) < 2:
        raise ValueError("heat maps by softmax compare texts: two are needed at least, got 1")
    return (logit_scale * maps).softmax(0)


def to_tensor(picture: Image.Image, size: int) -> Tensor:
    """Convert a picture for a heat map to uint8 [3, H, W], with its shorter side resized to ``size`` pixels."""
    import numpy as np
    from PIL import Image

    factor = size / min(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def overlay(picture: Image.Image, heat: Tensor, limits: tuple[float, float]) -> Image.Image:
    """Return a picture overlaid with a heat map [h, w]: dark at the lower limit, and bright at the upper one."""
    import matplotlib as mpl
    import numpy as np
    from PIL import Image

    low, high = limits
    colours = mpl.colormaps[COLOURS](((heat - low) / max(high - low, 1e-12)).cpu().double().numpy())
    image = Image.fromarray((255 * colours[..., :3]).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    return Image.blend(picture.convert("RGB"), image, OPACITY)


def limits_of(maps: Tensor) -> tuple[float, float]:
    """Return the limits of the common colour scale of a picture's heat maps [T, h, w]: the lowest and highest value."""
    return float(maps.min()), float(maps.max())


def draw(picture: Image.Image, maps: Tensor, texts: Sequence[str], label: str = "cosine similarity") -> Figure:
    """Draw a picture and its heat maps [T, h, w] with a common colour scale and the texts as titles.

    Args:
        picture: the picture.
        maps: the heat maps of the texts.
        texts: the texts, which become the titles.
        label: the meaning of the scale.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    limits = limits_of(maps)
    figure = Figure(figsize=(2.9 * (1 + len(texts)), 3.0), layout="constrained")
    figure.supxlabel(label, fontsize=9)
    axes: Any = figure.subplots(1, 1 + len(texts), squeeze=False)[0]
    panels = [picture.convert("RGB"), *(overlay(picture, heat, limits) for heat in maps)]
    for axis, panel, text in zip(axes, panels, ["", *texts], strict=True):
        axis.axis("off")
        axis.imshow(panel)
        axis.set_title(text, fontsize=9, wrap=True, parse_math=False)
    scale = ScalarMappable(Normalize(*limits), COLOURS)
    figure.colorbar(scale, ax=axes[-1], shrink=0.8).ax.tick_params(labelsize=7)
    return figure
