"""Pictures of one coloured shape each, drawn by PyTorch operations on the device that trains.

All numbers are integers: sides and distances are counted in 64ths of a pixel, and cosines in 4096ths. Therefore a
picture has the same bits on every device, with any number of threads, compiled or not.

The distance of a pixel from a straight edge is a term of its row plus a term of its column, and so, nearly, is the
distance from a circle. Distances are combined: a convex shape has the largest of the distances from its edges, and the
union of two shapes has the smaller of their two distances. Where the distance is less than half a pixel, the shape
covers a part of the pixel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PIXEL = 64
ONE = 4096  # the integer that stands for a cosine of 1
SIDE = 1024  # side of a picture in the units in which positions and radii are given
FRAMES_PER_SIDE = 24
# The number of pixels that are drawn together: on a CPU they fit into its cache, and they are enough to fill a GPU.
PIXELS_ON_CPU, PIXELS_ON_GPU = 1 << 16, 1 << 24


class Columns(NamedTuple):
    """The content of each column of :attr:`Drawings.numbers`; a colour has three columns: red, green and blue."""

    shape: int = 0
    x: int = 1
    y: int = 2
    radius: int = 3
    degrees: int = 4
    colour: slice = slice(5, 8)
    background: slice = slice(8, 11)
    frame: slice = slice(11, 14)


COLUMNS = Columns()
WIDTH = COLUMNS.frame.stop


@dataclasses.dataclass(frozen=True)
class Drawings:
    """A batch of pictures that are still to be drawn, as integers that describe their content.

    Attributes:
        numbers: int32 [B, 14] on the host, with the columns of ``COLUMNS``: the number of a shape in ``SHAPES``; its
            centre and radius in 1024ths of the side; its rotation in degrees from 0 to 359; and the colours of the
            shape, of the background, and of a frame along the edges of the picture, from 0 to 255.
        image_size: side in pixels.
    """

    numbers: Tensor
    image_size: int

    def __len__(self) -> int:
        return len(self.numbers)

    def pin_memory(self) -> Drawings:
        """Return the drawings of synthetic pairs unchanged: their few bytes need no pinned memory."""
        return self

    def on(self, device: torch.device) -> Tensor:
        """Draw the pictures of synthetic pairs on ``device``: uint8, [B, 3, image_size, image_size]."""
        size = self.image_size
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8, device=device)
        together = max((PIXELS_ON_GPU if device.type == "cuda" else PIXELS_ON_CPU) // size**2, 1)
        shapes = self.numbers[:, COLUMNS.shape]
        for shape, distances in enumerate(SHAPES.values()):
            for places in (shapes == shape).nonzero()[:, 0].split(together):
                if len(places):  # torch.split of an empty tensor yields one empty part
                    numbers = self.numbers[places].to(device, non_blocking=True)
                    coverage = _coverage(distances(_Plane(numbers, size)))
                    images.index_copy_(0, places.to(device, non_blocking=True), _painted(numbers, coverage))
        return images


class _Plane:
    """The pixel grids of pictures, relative to the centres of their shapes, in which shapes are drawn as distances.

    Lengths are given in thousandths of the shape's radius. Distances are int32 [B, S, S], negative inside.
    """

    def __init__(self, numbers: Tensor, size: int) -> None:
        columns = numbers.long()[:, :, None, None]
        x, y, radius = (columns[:, at] * size * PIXEL // SIDE for at in (COLUMNS.x, COLUMNS.y, COLUMNS.radius))
        pixels = torch.arange(size, device=numbers.device) * PIXEL + PIXEL // 2
        self.x, self.y, self.radius = pixels - x, pixels[:, None] - y, radius
        self.degrees = columns[:, COLUMNS.degrees]

    def edge(self, degrees: int, length: int) -> Tensor:
        """Return each pixel's distance from a shape's edge, ``length`` from the centre in the direction ``degrees``."""
        cosines = _cosines(self.x.device)
        cos, sin = (cosines[(self.degrees + turned) % 360] for turned in (degrees, degrees + 270))
        return (cos * self.x // ONE).int() + (sin * self.y // ONE - self.radius * length // 1000).int()

    def disc(self, length: int) -> Tensor:
        """Return each pixel's distance from a drawn disc, exact to first order where it is small."""
        radius = (self.radius * length // 1000).clamp(min=1)
        return (self.x**2 // (2 * radius)).int() + ((self.y**2 - radius**2) // (2 * radius)).int()

    def polygon(self, *lengths: int) -> Tensor:
        """Return each pixel's distance from a drawn polygon of equal angles, with edges ``lengths`` from the centre."""
        edges = (self.edge(360 * k // len(lengths), length) for k, length in enumerate(lengths))
        return functools.reduce(torch.maximum, edges)

    def star(self, length: int) -> Tensor:
        """Return each pixel's distance from a drawn star: its pixels are inside of four of the five edges."""
        largest = self.edge(0, length)
        second = torch.full_like(largest, torch.iinfo(torch.int32).min)
        for k in range(1, 5):
            edge = self.edge(72 * k, length)
            second = torch.maximum(second, torch.minimum(largest, edge))
            largest = torch.maximum(largest, edge)
        return second


SHAPES: dict[str, Callable[[_Plane], Tensor]] = {
    "circle": lambda plane: plane.disc(900),
    "ring": lambda plane: torch.maximum(plane.disc(1000), -plane.disc(550)),
    "half circle": lambda plane: torch.maximum(plane.disc(1000), plane.edge(0, 0)),
    "triangle": lambda plane: plane.polygon(500, 500, 500),
    "square": lambda plane: plane.polygon(750, 750, 750, 750),
    "bar": lambda plane: plane.polygon(950, 300, 950, 300),
    "cross": lambda plane: torch.minimum(plane.polygon(950, 300, 950, 300), plane.polygon(300, 950, 300, 950)),
    "star": lambda plane: plane.star(309),
}


@functools.cache
def _cosines(device: torch.device) -> Tensor:
    """Return the cosine of every whole number of degrees, as integers in 4096ths, for drawings of synthetic pairs."""
    return torch.from_numpy(np.rint(np.cos(np.arange(360) * np.pi / 180) * ONE).astype(np.int64)).to(device)


def _coverage(distances: Tensor) -> Tensor:
    """Return how many 64ths of each pixel a drawn shape covers: int16 [B, 1, S, S]."""
    return distances.neg_().add_(PIXEL // 2).clamp_(0, PIXEL).to(torch.int16)[:, None]


def _painted(numbers: Tensor, coverage: Tensor) -> Tensor:
    """Blend the colours of drawn shapes and backgrounds by the coverage of each pixel: uint8 [B, 3, S, S]."""
    size = coverage.shape[-1]
    colour, background, frame = (
        numbers[:, columns, None, None].to(torch.int16)
        for columns in (COLUMNS.colour, COLUMNS.background, COLUMNS.frame)
    )
    images = background.repeat(1, 1, size, size)
    width = max(size // FRAMES_PER_SIDE, 1)
    for edge in (images[..., :width], images[..., -width:], images[..., :width, :], images[..., -width:, :]):
        edge.copy_(frame.expand_as(edge))
    change = (colour - images).mul_(coverage)
    return images.mul_(PIXEL).add_(change).add_(PIXEL // 2).bitwise_right_shift_(6).to(torch.uint8)
