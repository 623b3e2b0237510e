"""The specification of the text embedding: sizes, inputs, cases, floor, and the calls that are compiled offline."""

import dataclasses
from contextlib import AbstractContextManager

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
    lengths_of,
    on,
)
from .op import text_embed


@dataclasses.dataclass(frozen=True)
class TextShape(Shape):
    """Ids [batch, tokens] of a table [vocab, width].

    If ``packed``, ``tokens`` is the largest length of ``batch`` texts that lie behind one another.
    """

    batch: int
    tokens: int
    vocab: int
    width: int
    packed: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of the result or of the table, whichever is larger."""
        return max(self.num_tokens, self.vocab) * self.width

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(lengths_of(self.batch, self.tokens)) if self.packed else self.batch * self.tokens


WORDS = 10  # the number of words in a padded text; its other ids are 0


def make(shape: TextShape, values: str, draw: Draw) -> Call:
    """Make random token ids, a table and positions; ``values`` says which ids occur."""
    size = (shape.num_tokens + UNUSED,) if shape.packed else (shape.batch, shape.tokens)
    text = draw.integers(0, shape.vocab, *size)
    if values == "one id":
        text.fill_(shape.vocab - 1)
    elif values == "padded":
        text[..., WORDS:] = 0
    elif values == "all different":
        text = draw.subsets(1, shape.vocab, text.numel()).view_as(text)
    inputs = {
        "text": text,
        "token_embedding": draw.normal(shape.vocab, shape.width),
        "positional_embedding": draw.normal(shape.tokens, shape.width),
    }
    if shape.packed:
        inputs["cu_seqlens"] = cu_seqlens_of(lengths_of(shape.batch, shape.tokens), draw)
    return Call(inputs, (draw.normal(*size, shape.width),))


def floor(shape: TextShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of the text embedding, as if each token read a different row of the table.

    Backward reads the gradient twice, since its two sums take it in different orders.
    """
    ids, elements = 8 * shape.num_tokens, shape.num_tokens * shape.width
    positions = shape.tokens * shape.width * itemsize
    if backward:
        table = shape.vocab * shape.width * itemsize
        return Floor(2 * elements, ids + 2 * elements * itemsize + positions + table)
    return Floor(elements, ids + 2 * elements * itemsize + positions)


def small_chunks(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Let the text embedding's gradient be summed in chunks of 4 rows and 16 columns, so few rows take several
    launches.
    """
    return override(config_key("text_embed_bwd", dtype), RowConfig(4, 16, num_warps=1, num_stages=2))


CASES = [
    Case(TextShape(4, 77, 49408, 512), "B's texts", on(CUDA)),
    Case(TextShape(3, 77, 49408, 1280), "bigG/14's texts", NOT_INTERPRETED),
    Case(TextShape(3, 77, 500, 512), "the length in use, a smaller table", quick=True),
    Case(TextShape(512, 77, 49408, 768), "L/14's texts, a batch", on(CUDA)),
    Case(TextShape(4096, 77, 49408, 512), "B's texts, a large batch: four launches", on(CUDA)),
    # edge cases
    Case(TextShape(1, 1, 1, 1), "one of everything", sanitize=True),
    Case(TextShape(67, 1, 7, 24), "one position; every id in many texts"),
    Case(TextShape(11, 7, 5, 40), "several chunks of the sums, the last one short", sanitize=True),
    Case(TextShape(3, 7, 1, 8), "one row for all"),
    Case(TextShape(13, 11, 5, 63), "more tokens than a chunk of the sums, few ids; an odd width", quick=True),
    Case(TextShape(3, 9, 50, 24), "more ids than tokens", sanitize=True),
    Case(TextShape(2, 77, 200, 40), "past a tile of positions"),
    Case(TextShape(3, 8, 50, 300), "exactly a tile of positions; the width is past a tile"),
    Case(TextShape(40, 3, 11, 12), "more texts than programs"),
    Case(TextShape(0, 9, 5, 16), "no texts: gradients are zero"),
    Case(TextShape(3, 0, 7, 12), "texts without tokens: gradients are zero"),
    # packed texts
    Case(TextShape(40, 77, 500, 512, packed=True), "the lengths in use", NOT_INTERPRETED, quick=True),
    Case(TextShape(1024, 77, 49408, 512, packed=True), "B's texts, packed, a batch", on(CUDA)),
    Case(
        TextShape(12, 9, 11, 40, packed=True),
        "several texts in a block; several chunks of both sums",
        quick=True,
        sanitize=True,
    ),
    Case(TextShape(5, 77, 30, 300, packed=True), "the width is past a tile"),
    Case(TextShape(0, 9, 5, 16, packed=True), "no texts: all tokens belong to none"),
    *Case.layouts(TextShape(6, 7, 11, 24, packed=True)),
    *Case.layouts(TextShape(3, 7, 11, 24), expanded=TextShape(3, 7, 11, 24)),
    Case.extreme(TextShape(40, 7, 11, 24), "one id", "one id everywhere", quick=True),
    Case.extreme(TextShape(9, 77, 1000, 24), "padded", "mostly padding", quick=True),
    Case.extreme(TextShape(9, 77, 693, 24), "all different", "every id once"),
    *Case.repeats(TextShape(64, 77, 1000, 96), TextShape(4096, 77, 49408, 512)),
]
TUNED = (
    Tunable("text_embed_bwd", "_segment_sums_kernel", RowConfig),
    Tunable("text_embed_fwd", "_text_embed_fwd_kernel", RowConfig),
)
PACKED = (Tunable("text_embed_packed", "_text_embed_packed_kernel", RowConfig),)

SPECS = (
    OpSpec(
        op=text_embed,
        reference=reference.text_embed,
        make=make,
        cases=CASES,
        small=(TextShape(5, 4, 7, 12, packed=True), TextShape(2, 5, 7, 12)),
        category="patch, text input",
        kernels=("_text_embed_fwd_kernel", "_text_embed_packed_kernel", "_segment_sums_kernel"),
        suite="text",
        floor=floor,
        bench={
            device: tuple(TextShape(batch, 77, 49408, width) for width in (512, 768, 1024))
            for device, batch in (("cpu", 32), ("cuda", 1024))
        },
        bench_values="padded",
        items=("batch", "texts"),
        # The tables of B, L and bigG in float32 under autocast, as in training. For 128 texts, the gradient takes all
        # three kinds of launches: the first, one between, and the last.
        shipped=(
            *(
                Shipped(f"fp32 table N{width}", TextShape(128, 77, 49408, width), autocast=True)
                for width in (512, 768, 1280)
            ),
            Shipped("N768", TextShape(128, 77, 49408, 768)),
            Shipped("packed fp32 table N768", TextShape(128, 77, 49408, 768, packed=True), autocast=True),
            Shipped("N512", TextShape(128, 77, 49408, 512), ("fp32",)),
        ),
        targets=(
            Target("text_embed", TextShape(1024, 77, 49408, 512), TUNED),
            Target("text_embed-packed", TextShape(1024, 77, 49408, 512, packed=True), PACKED),
        ),
        small_tiles=small_chunks,
    ),
)
