"""The specification of the ranks: sizes, inputs, cases, floor, and the calls that are compiled offline."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import reference
from ..configs import GemmConfig
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, Shape, Shipped, Target, Tunable, on
from . import cpu, launches
from .op import retrieval_ranks


@dataclasses.dataclass(frozen=True)
class RankShape(Shape):
    """Features of images [images, embed_dim] and of texts [texts, embed_dim]."""

    images: int
    texts: int
    embed_dim: int

    @property
    def elements(self) -> int:
        """The number of scores in a case of the op ``retrieval_ranks``."""
        return self.images * self.texts


def make(shape: RankShape, values: str, draw: Draw) -> Call:
    """Make the features of images and texts, and the image (or none) that each text belongs to.

    The features are small whole numbers, so scores are exact in any order of summation, and often tie. With the values
    "unit", features have unit length, and texts belong to images in turn.
    """
    sizes = (shape.images, shape.embed_dim), (shape.texts, shape.embed_dim)
    if values == "unit":
        image, text = (draw.unit(*size) for size in sizes)
        owner = torch.arange(shape.texts, device=draw.device) % shape.images
    else:
        image, text = (draw.integers(-2, 3, *size).float() for size in sizes)
        owner = draw.integers(-1, shape.images, shape.texts)
    if values == "all-equal rows":
        image, text = (x[:1].repeat(len(x), 1) for x in (image, text))
    elif values == "infinite":
        image[3, 1], text[7, 2], text[9] = float("inf"), float("-inf"), 0.0
    elif values == "nan":
        image[3, 1] = text[7, 2] = text[9] = float("nan")
    return Call({"image": image, "text": text, "text_image": owner})


def floor(shape: RankShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of the ranks: one product, reading the features, writing the ranks; there is no backward pass."""
    if backward:
        return Floor(0, 0)
    rows = shape.images + shape.texts
    return Floor(2 * shape.images * shape.texts * shape.embed_dim, rows * (shape.embed_dim * itemsize + 8))


@contextmanager
def small_tiles(dtype: torch.dtype) -> Iterator[None]:
    """Shrink the tiles of ``retrieval_ranks``: two programs then add to the same images, CPUs take several tiles."""
    before = launches.SPAN, cpu.TILE
    launches.SPAN, cpu.TILE = 128, cpu.TILE_UNIT
    try:
        yield
    finally:
        launches.SPAN, cpu.TILE = before


CASES = [
    Case(RankShape(1, 1, 1), "a pair: nothing else can be ahead"),
    Case(RankShape(1, 1, 16), "a pair of usual features", sanitize=True),
    Case(RankShape(1, 37, 8), "one image: the rank of a text can only be 0"),
    Case(RankShape(5, 2, 3), "images without texts"),
    Case(RankShape(64, 64, 64), "exactly one fp32 tile"),
    Case(RankShape(67, 201, 40), "prime, three texts for each image, a width that no tile divides", quick=True),
    Case(RankShape(130, 129, 72), "one and two past the 16-bit tile"),
    Case(RankShape(67, 150, 24), "two programs that add to the same images", sanitize=True),
    Case(RankShape(600, 411, 6), "several tiles, all of them cut off at an edge"),
    Case(RankShape(3, 4, 0), "features of no dimensions: all scores are 0"),
    Case(RankShape(0, 5, 8), "no images"),
    Case(RankShape(5, 0, 8), "no texts"),
    Case(RankShape(0, 0, 8), "nothing"),
    Case(RankShape(1000, 5000, 512), "Flickr30k's test set", NOT_INTERPRETED),
    Case(RankShape(5000, 25000, 512), "COCO's test set", on(CUDA)),
    *Case.layouts(RankShape(67, 201, 40)),
    Case.extreme(RankShape(71, 213, 40), "all-equal rows", "collapsed features: all tie", quick=True),
    Case.extreme(RankShape(20, 50, 4), "infinite", "scores that are infinite, or NaN"),
    Case.extreme(RankShape(20, 50, 4), "nan", "features that are NaN", quick=True),
    *Case.repeats(RankShape(600, 411, 24), RankShape(5000, 25000, 512), "unit"),
]
COUNTING = (Tunable("retrieval_ranks", "_count_ahead_kernel", GemmConfig),)

SPECS = (
    OpSpec(
        op=retrieval_ranks,
        reference=reference.retrieval_ranks,
        make=make,
        cases=CASES,
        small=(RankShape(7, 11, 6),),
        category="other",
        suite="retrieval",
        kernels=("_own_score_kernel", "_count_ahead_kernel"),
        floor=floor,
        # These are the test sets of Flickr30k and COCO, which have five captions for each image.
        bench={"cpu": (RankShape(1000, 5000, 512),), "cuda": (RankShape(1000, 5000, 512), RankShape(5000, 25000, 512))},
        bench_values="unit",
        items=("texts", "texts"),
        follows_autocast=False,
        # The images and texts fill whole tiles in the first call, but not in the second.
        shipped=(
            Shipped("M1024 N5120 D512", RankShape(1024, 5120, 512), ("bf16", "fp32", "fp16")),
            Shipped("M1001 N5005 D512", RankShape(1001, 5005, 512)),
        ),
        targets=(Target("retrieval_ranks", RankShape(5120, 25600, 512), COUNTING),),
        small_tiles=small_tiles,
    ),
)
