"""The specification of top_k: sizes, inputs, cases, floor, and the calls that are compiled offline."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import reference
from ..configs import GemmConfig
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, Shape, Shipped, Target, Tunable, on
from . import cpu, op
from .op import top_k


@dataclasses.dataclass(frozen=True)
class SearchShape(Shape):
    """Features of queries [queries, embed_dim] and of items [items, embed_dim], of which k are found."""

    queries: int
    items: int
    embed_dim: int
    k: int = 10

    @property
    def elements(self) -> int:
        """The number of scores in a case of the op ``top_k``."""
        return self.queries * self.items


def make(shape: SearchShape, values: str, draw: Draw) -> Call:
    """Make the features of queries and items for top_k.

    The features are small whole numbers, so scores are exact in any order of summation, and often tie. With the values
    "unit", features have unit length; "allowed" hides two thirds of the items; other kinds have extreme features.
    """
    sizes = (shape.queries, shape.embed_dim), (shape.items, shape.embed_dim)
    # For empty inputs too: ``unit`` leaves their memory untouched, where ``integers`` would fill a million rows.
    is_unit = values == "unit" or draw.empty
    query, items = (draw.unit(*size) if is_unit else draw.integers(-2, 3, *size).float() for size in sizes)
    inputs = {"query": query, "items": items}
    if values == "all-equal rows":
        inputs["items"] = items[:1].repeat(len(items), 1)
    elif values == "infinite":
        query[3, 1], items[7, 2], items[9] = float("inf"), float("-inf"), 0.0
    elif values == "nan":
        query[3, 1] = items[7, 2] = items[9] = float("nan")
    elif values == "allowed":
        inputs["allowed"] = draw.integers(0, 3, shape.items) == 0
    return Call(inputs, options={"k": shape.k})


def floor(shape: SearchShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of top_k: one product, reading the features, writing the results; there is no backward pass."""
    if backward:
        return Floor(0, 0)
    features = (shape.queries + shape.items) * shape.embed_dim * itemsize
    return Floor(2 * shape.queries * shape.items * shape.embed_dim, features + 12 * shape.queries * shape.k)


@contextmanager
def small_tiles(dtype: torch.dtype) -> Iterator[None]:
    """Shrink the tiles and blocks of top_k, so that a CPU takes several tiles and queries several blocks."""
    before = cpu.TILE, cpu.CONVERTED, op.MAXIMA
    cpu.TILE, cpu.CONVERTED, op.MAXIMA = 1 << 12, 1 << 12, 64
    try:
        yield
    finally:
        cpu.TILE, cpu.CONVERTED, op.MAXIMA = before


CASES = [
    Case(SearchShape(1, 1, 1, 1), "one item"),
    Case(SearchShape(1, 5, 16), "fewer items than are wanted", sanitize=True),
    Case(SearchShape(3, 97, 8, 97), "all items, in their order"),
    Case(SearchShape(2, 100, 8, 130), "more than all, and more than all groups hold"),
    Case(SearchShape(64, 64, 64), "exactly one fp32 tile"),
    Case(SearchShape(67, 201, 40), "prime, a width that no tile divides", quick=True),
    Case(SearchShape(5, 500, 24, 3), "more groups than are chosen", sanitize=True),
    Case(SearchShape(130, 1000, 6, 7), "several tiles, all of them cut off at an edge"),
    Case(SearchShape(5, 300, 24, 20), "items that may not be found", values="allowed", quick=True, sanitize=True),
    Case(SearchShape(3, 40, 0), "features of no dimensions: all scores are 0"),
    Case(SearchShape(0, 5, 8), "no queries"),
    Case(SearchShape(5, 0, 8), "no items"),
    Case(SearchShape(100, 20000, 512), "a folder of pictures", NOT_INTERPRETED),
    Case(SearchShape(100, 1_000_000, 512), "a million pictures", on(CUDA)),
    *Case.layouts(SearchShape(67, 201, 40)),
    Case.extreme(SearchShape(7, 213, 40, 5), "all-equal rows", "collapsed features: the first items come first"),
    Case(SearchShape(20, 50, 4, 50), "scores that are infinite, or NaN", values="infinite"),
    Case(SearchShape(20, 50, 4, 50), "features that are NaN", values="nan", quick=True),
    *Case.repeats(SearchShape(60, 4110, 24), SearchShape(1000, 250_000, 512), "unit"),
]
MAXIMA = (Tunable("top_k", "_group_maxima_kernel", GemmConfig),)

SPECS = (
    OpSpec(
        op=top_k,
        reference=reference.top_k,
        make=make,
        cases=CASES,
        small=(SearchShape(7, 110, 6, 3),),
        category="other",
        kernels=("_group_maxima_kernel", "_group_scores_kernel", "_results_kernel"),
        floor=floor,
        bench={
            "cpu": (SearchShape(1, 100_000, 512), SearchShape(100, 100_000, 512)),
            "cuda": (
                SearchShape(1, 1_000_000, 512),
                SearchShape(100, 1_000_000, 512),
                SearchShape(4096, 1_000_000, 512),
            ),
        },
        bench_values="unit",
        items=("queries", "queries"),
        follows_autocast=False,
        # The queries and items fill whole tiles in the first call, but not in the second.
        shipped=(
            Shipped("Q1024 N65536 D512", SearchShape(1024, 65536, 512), ("bf16", "fp32", "fp16")),
            Shipped("Q101 N10001 D512", SearchShape(101, 10001, 512)),
        ),
        targets=(Target("top_k", SearchShape(4096, 100_000, 512), MAXIMA),),
        small_tiles=small_tiles,
    ),
)
