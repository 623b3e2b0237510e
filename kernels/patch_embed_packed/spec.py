"""The specification of the patch embedding of packed images: sizes, inputs, cases, floor, and compiled calls."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import reference
from ..configs import RowConfig, config_key, override
from ..spec import (
    CUDA,
    NOT_INTERPRETED,
    UNUSED,
    Call,
    Case,
    Draw,
    Floor,
    OpSpec,
    Shape,
    Shipped,
    Target,
    Tunable,
    cu_seqlens_of,
    on,
)
from .op import patch_embed_packed

# The height and width of images, in units of the table's side; the images of a case take them in turn. Images are as
# large as the table, of another shape, smaller, long, or a single patch.
SIDES = ((1.0, 1.0), (0.75, 1.25), (0.5, 0.25), (0.0, 2.0), (0.0, 0.0), (1.5, 0.5), (0.625, 0.875))


@dataclasses.dataclass(frozen=True)
class PackedShape(Shape):
    """Images of about ``side`` x ``side`` patches, packed, as bytes or floats, and a table of positions [side, wide].

    A patch has patch_size x patch_size x 3 numbers.
    """

    batch: int
    side: int
    patch_size: int
    embed_dim: int
    prefix: int = 0
    wide: int = 0
    uint8: bool = True
    bicubic: bool = False
    keep_aspect: bool = False

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The rows and columns of patches of each image."""
        sides = (SIDES[image % len(SIDES)] for image in range(self.batch))
        return [(max(1, int(self.side * height)), max(1, int(self.side * width))) for height, width in sides]

    @property
    def table(self) -> tuple[int, int]:
        """The rows and columns of the table of positions."""
        return self.side, self.wide or self.side

    @property
    def patches(self) -> int:
        """The number of patches of all images."""
        return sum(height * width for height, width in self.grids)

    @property
    def tokens(self) -> int:
        """The number of tokens of all images."""
        return self.patches + self.batch * self.prefix

    @property
    def elements(self) -> int:
        """The number of elements of the pixels, or of the result, whichever is larger."""
        return (self.tokens + UNUSED) * max(3 * self.patch_size**2, self.embed_dim)


def make(shape: PackedShape, values: str, draw: Draw) -> Call:
    """Make random patches, parameters and the sizes of images; some patches at the end belong to no image."""
    size = shape.patches + UNUSED, 3 * shape.patch_size**2
    patches = draw.integers(0, 256, *size, dtype=torch.uint8) if shape.uint8 else draw.normal(*size)
    if values.startswith("all "):
        patches.fill_(int(values.removeprefix("all ")))
    elif values == "large":
        patches *= 100
    grids = torch.tensor(shape.grids, dtype=torch.int32, device=draw.device).view(-1, 2)
    inputs = {
        "patches": patches,
        "weight": draw.normal(shape.embed_dim, size[1]) / shape.patch_size,
        "positional_embedding": draw.normal(*shape.table, shape.embed_dim),
        "grids": grids,
        "cu_seqlens": cu_seqlens_of([height * width + shape.prefix for height, width in shape.grids], draw),
        "bias": draw.normal(shape.embed_dim),
    }
    if shape.prefix:
        inputs["prefix"] = draw.normal(shape.prefix, shape.embed_dim)
    options: dict[str, Any] = {"interpolation": "bicubic"} if shape.bicubic else {}
    if shape.keep_aspect:
        options["keep_aspect"] = True
    return Call(inputs, (draw.normal(shape.tokens + UNUSED, shape.embed_dim),), options)


def floor(shape: PackedShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of the patch embedding of packed images.

    Each direction has one product of pixels and the projection, and one more for floating pixels backward. A token
    reads the four positions around it.
    """
    pixels_of_patch, row = 3 * shape.patch_size**2, shape.embed_dim * itemsize
    product = 2 * shape.patches * pixels_of_patch * shape.embed_dim
    pixels = shape.patches * pixels_of_patch * (1 if shape.uint8 else itemsize)
    parameters = (pixels_of_patch + shape.table[0] * shape.table[1] + 1 + shape.prefix) * row
    once = Floor(product + 8 * shape.patches * shape.embed_dim, pixels + parameters + shape.tokens * row)
    if not backward or shape.uint8:
        return once
    return once + Floor(product, pixels_of_patch * row + pixels)


def small_tiles(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Take tiles of 4 tokens and 16 columns, so that a few patches make several tiles."""
    return override(config_key("patch_embed_packed", dtype), RowConfig(4, 16, num_warps=1, num_stages=1))


TINY = PackedShape(3, 5, 2, 10, uint8=False)
SMALL = PackedShape(5, 4, 6, 24, prefix=2, wide=5)
B16 = PackedShape(7, 16, 16, 768)

CASES = [
    Case(B16, "SigLIP 2's B/16", NOT_INTERPRETED, quick=True),
    Case(B16.changed(prefix=4, bicubic=True), "timm's NaFlexViT-B/16: registers, bicubic", NOT_INTERPRETED),
    Case(PackedShape(256, 16, 16, 768), "B/16, a batch", on(CUDA)),
    Case(PackedShape(64, 16, 16, 1152), "SO400M/16, a batch", on(CUDA)),
    Case(PackedShape(14, 7, 32, 768, prefix=4, bicubic=True), "B/32", NOT_INTERPRETED),
    Case(PackedShape(7, 16, 14, 1024, prefix=1), "588 pixels a patch, which no tile divides; a class token", NOT_INTERPRETED),
    # edge cases
    Case(PackedShape(1, 1, 1, 1), "one of everything", sanitize=True),
    Case(SMALL, "prefix tokens; a table that is not square", quick=True, sanitize=True),
    Case(SMALL.changed(uint8=False, bicubic=True), "floats; bicubic", quick=True, sanitize=True),
    Case(SMALL.changed(prefix=0, bicubic=True), "bytes; bicubic"),
    Case(SMALL.changed(keep_aspect=True), "positions of a square, cut off", sanitize=True),
    Case(SMALL.changed(keep_aspect=True, bicubic=True, prefix=0, uint8=False), "positions of a square, cut off; bicubic"),
    Case(PackedShape(9, 7, 3, 33, prefix=1, wide=3), "odd sizes everywhere"),
    Case(PackedShape(14, 3, 2, 8), "many small images in a tile"),
    Case(PackedShape(2, 37, 1, 8), "a table larger than a tile of its sides"),
    Case(PackedShape(0, 4, 4, 16, prefix=2), "no images: all patches belong to none"),
    *Case.layouts(SMALL),
    *Case.layouts(SMALL.changed(uint8=False), expanded=SMALL, quick=False),
    Case.extreme(SMALL, "all 0", "black: the low end of the range"),
    Case.extreme(SMALL, "all 255", "white: the high end of the range", quick=True),
    Case.extreme(SMALL.changed(uint8=False), "large", "pixels of 100: far outside what a model sees"),
    *Case.repeats(PackedShape(14, 8, 8, 96, prefix=1), PackedShape(256, 16, 16, 768)),
]  # fmt: skip

SPECS = (
    OpSpec(
        op=patch_embed_packed,
        reference=reference.patch_embed_packed,
        make=make,
        cases=CASES,
        small=(TINY, TINY.changed(uint8=True, prefix=2)),
        category="patch, text input",
        kernels=("_patch_embed_packed_kernel",),
        suite="patch_packed",
        floor=floor,
        bench={
            device: tuple(PackedShape(batch, 16, 16, width) for width in (768, 1152))
            for device, batch in (("cpu", 14), ("cuda", 256))
        },
        items=("batch", "images"),
        shipped=(
            Shipped("P16 bytes", B16, ("bf16", "fp32", "fp16")),
            Shipped("P16 floats", B16.changed(uint8=False), ("bf16", "fp32")),
            Shipped("P14 bytes bicubic R1", PackedShape(7, 16, 14, 1024, prefix=1, bicubic=True)),
        ),
        targets=(
            Target(
                "patch_embed_packed",
                PackedShape(256, 16, 16, 768),
                (Tunable("patch_embed_packed", "_patch_embed_packed_kernel", RowConfig),),
            ),
        ),
        small_tiles=small_tiles,
    ),
)
