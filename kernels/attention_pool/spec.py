"""The specification of attention pooling: sizes, inputs, cases, floor, and the calls that are compiled offline."""

import dataclasses
from contextlib import AbstractContextManager

import torch

from .. import reference
from ..attention.spec import draw_lengths
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
    lengths_of,
    on,
)
from .op import attention_pool


@dataclasses.dataclass(frozen=True)
class PoolShape(Shape):
    """Queries [batch, queries, width] on tokens [batch, tokens, width].

    If ``packed``, ``tokens`` is the largest length of ``batch`` sequences that lie behind one another.
    """

    batch: int
    queries: int
    tokens: int
    width: int
    lengths: bool = False
    packed: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of the pooling's weights, queries or tokens, whichever is the largest."""
        queries = self.batch * self.queries
        return max(queries * self.tokens, max(queries, self.num_tokens) * self.width)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all images."""
        return sum(lengths_of(self.batch, self.tokens)) if self.packed else self.batch * self.tokens


def make(shape: PoolShape, values: str, draw: Draw) -> Call:
    """Make random tokens and queries for a case of attention pooling.

    The norm of the queries is chosen so that the weights are neither all equal nor all zero or one, unless ``values``
    asks for other weights.
    """
    query = draw.normal(shape.batch, shape.queries, shape.width) / shape.width**0.5
    if shape.packed:
        tokens = draw.normal(shape.num_tokens + UNUSED, shape.width)
    else:
        tokens = draw.normal(shape.batch, shape.tokens, shape.width)
    if values == "one-hot":
        query *= 8
    elif values == "uniform":
        query *= 1e-4
    elif values == "duplicate rows":
        tokens = tokens[:, torch.arange(shape.tokens) // 2]
    inputs = {"query": query, "tokens": tokens}
    if shape.lengths:
        inputs["seqlens"] = draw_lengths(draw, shape.batch, shape.tokens, torch.int64)
    if shape.packed:
        inputs["cu_seqlens"] = cu_seqlens_of(lengths_of(shape.batch, shape.tokens), draw)
    grad = draw.normal(shape.batch, shape.queries, shape.width)
    return Call(inputs, (grad,), {"max_seqlen": shape.tokens} if shape.packed else {})


def floor(shape: PoolShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of attention pooling: two products forward. Backward recomputes one and needs four more.

    Forward reads queries and tokens, and writes a result as large as the queries. Backward reads queries, tokens and
    the upstream gradient, and writes the gradients of queries and tokens.
    """
    product = 2 * shape.queries * shape.num_tokens * shape.width
    query, key = (rows * shape.width * itemsize for rows in (shape.batch * shape.queries, shape.num_tokens))
    if backward:
        return Floor(5 * product, 3 * query + 2 * key)
    return Floor(2 * product, 2 * query + key)


def few_columns(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Let the pooling kernels take 16 columns at a time, so that their loops have several steps in a narrow case."""
    return override(config_key("attention_pool", dtype), RowConfig(16, 16, num_warps=4, num_stages=1))


CASES = [
    *Case.in_use(PoolShape(2, 32, 50, 2048), PoolShape(1, 32, 50, 256), "RN50", quick=True),
    Case(PoolShape(1, 40, 82, 2560), "RN50x4", NOT_INTERPRETED),
    Case(PoolShape(1, 48, 145, 3072), "RN50x16", NOT_INTERPRETED),
    Case(PoolShape(1, 64, 197, 4096), "RN50x64", NOT_INTERPRETED),
    Case(PoolShape(256, 32, 50, 2048), "RN50, a batch", on(CUDA)),
    # edge cases
    Case(PoolShape(1, 1, 1, 8), "one of everything: the weight is 1, and the query's gradient 0", sanitize=True),
    Case(PoolShape(3, 2, 5, 24), "less than any tile", quick=True, sanitize=True),
    Case(PoolShape(1, 17, 33, 40), "one past a small tile in both directions", sanitize=True),
    Case(PoolShape(2, 3, 50, 72), "few queries; the width is past a tile of columns"),
    Case(PoolShape(1, 40, 82, 40), "RN50x4's queries and tokens, narrow"),
    Case(PoolShape(1, 64, 256, 72), "64 queries, the most that one program takes"),
    Case(PoolShape(1, 3, 577, 24), "L/14's tokens at 336 pixels: the largest tile of tokens"),
    Case(PoolShape(0, 32, 50, 64), "no images"),
    # tokens at positions of seqlens and above are masked
    Case(PoolShape(5, 3, 17, 24, lengths=True), "texts that end early, or have no token", quick=True, sanitize=True),
    Case(PoolShape(4, 8, 77, 512, lengths=True), "the last block of B's texts", NOT_INTERPRETED),
    # sequences of several lengths
    Case(PoolShape(40, 8, 77, 512, packed=True), "the last block of B's texts, packed", NOT_INTERPRETED, quick=True),
    Case(PoolShape(1024, 8, 77, 512, packed=True), "the last block of B's texts, packed, a batch", on(CUDA)),
    Case(PoolShape(6, 3, 9, 24, packed=True), "short sequences, one without tokens", quick=True, sanitize=True),
    Case(PoolShape(5, 17, 70, 40, packed=True), "one past a small tile of queries, a long sequence, and short ones"),
    Case(PoolShape(0, 3, 9, 24, packed=True), "no sequences: all tokens belong to none"),
    *Case.layouts(PoolShape(6, 3, 17, 24, packed=True), quick=False),
    *Case.layouts(PoolShape(2, 3, 17, 24), expanded=PoolShape(2, 3, 17, 24)),
    Case.extreme(PoolShape(1, 32, 50, 128), "one-hot", "queries times 8: each softmax is nearly one-hot", quick=True),
    Case.extreme(PoolShape(1, 32, 50, 128), "uniform", "queries times 1e-4: each softmax is flat"),
    Case.extreme(PoolShape(1, 32, 50, 128), "duplicate rows", "every token occurs twice: equal weights"),
    *Case.repeats(PoolShape(2, 8, 50, 96), PoolShape(512, 32, 50, 2048)),
    *Case.repeats(PoolShape(30, 8, 50, 96, packed=True), PoolShape(4096, 8, 77, 512, packed=True)),
]  # fmt: skip
COLUMNS = {"block_m": (16,), "block_n": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
RN50 = PoolShape(256, 32, 50, 2048)
TEXTS = PoolShape(1024, 8, 77, 512, packed=True)  # the last block of B's texts
TUNED = (Tunable("attention_pool", "_pool_bwd_kernel", RowConfig, COLUMNS, small_tiles=True),)

SPECS = (
    OpSpec(
        op=attention_pool,
        reference=reference.attention_pool,
        make=make,
        cases=CASES,
        small=(
            PoolShape(2, 3, 7, 10),
            PoolShape(2, 3, 7, 10, lengths=True),
            PoolShape(5, 3, 7, 10, packed=True),
        ),
        category="attention",
        kernels=("_pool_fwd_kernel", "_pool_bwd_kernel"),
        floor=floor,
        bench={"cpu": (RN50.changed(batch=8), TEXTS.changed(batch=64)), "cuda": (RN50, TEXTS)},
        items=("batch", "images"),
        shipped=(
            Shipped("H32 N50 C2048", PoolShape(2, 32, 50, 2048), ("bf16", "fp32"), small_tiles=True),
            # These are the last blocks of B's text tower, of bigG/14, and of L/14 at 336 pixels.
            Shipped("H8 N77 C512 lengths", PoolShape(2, 8, 77, 512, lengths=True), small_tiles=True),
            Shipped("H8 N77 C512 packed", PoolShape(64, 8, 77, 512, packed=True), ("bf16", "fp32"), small_tiles=True),
            Shipped("H16 N257 C1664", PoolShape(2, 16, 257, 1664), small_tiles=True),
            Shipped("H16 N577 C1024", PoolShape(2, 16, 577, 1024), small_tiles=True),
        ),
        targets=(Target("attention_pool", RN50, TUNED),),
        small_tiles=few_columns,
    ),
)
