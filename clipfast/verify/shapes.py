"""What the ops are verified at: every case says why it is there. The losses have theirs in ``loss_shapes``, and
parts of a block in ``block_shapes``."""

from typing import Any, NamedTuple

from .block_shapes import BLOCK_CASES
from .cases import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, NOT_INTERPRETED, Case, on
from .loss_shapes import FEW, LOSS_CASES


class AttentionShape(NamedTuple):
    """A packed projection [batch, tokens, 3 heads head_dim]."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    causal: bool = False

    def __str__(self) -> str:
        return f"B={self.batch} T={self.tokens} H={self.heads} D={self.head_dim}{' causal' if self.causal else ''}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return max(self.batch * self.heads * self.tokens**2, 3 * self.batch * self.tokens * self.heads * self.head_dim)


class PatchShape(NamedTuple):
    """Images [batch, 3, height, width] as bytes or floats, and a projection [embed_dim, 3, patch, patch]; with ``keep``,
    so many patches of each image become tokens.
    """

    batch: int
    height: int
    width: int
    patch: int
    embed_dim: int
    uint8: bool = True
    keep: int | None = None

    def __str__(self) -> str:
        kind = ("bytes" if self.uint8 else "floats") + ("" if self.keep is None else f" keep={self.keep}")
        return f"B={self.batch} {self.height}x{self.width} P={self.patch} E={self.embed_dim} {kind}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        tokens = 1 + self.height * self.width // self.patch**2
        return self.batch * max(3 * self.height * self.width, tokens * self.embed_dim)


class TextShape(NamedTuple):
    """Ids [batch, length] of a table [vocab, width]."""

    batch: int
    length: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"B={self.batch} L={self.length} V={self.vocab} W={self.width}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return max(self.batch * self.length, self.vocab) * self.width


ATTENTION = [
    Case(AttentionShape(2, 50, 12, 64), "B/32's images", NOT_INTERPRETED, quick=True),
    Case(AttentionShape(2, 77, 8, 64, True), "B's texts: crosses a tile under the causal mask", NOT_INTERPRETED, quick=True),
    Case(AttentionShape(1, 77, 20, 64, True), "bigG/14's texts", NOT_INTERPRETED),
    Case(AttentionShape(1, 197, 12, 64), "B/16's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 64), "L/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 80), "H/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 88), "g/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 104), "bigG/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 577, 4, 64), "L/14's images at 336 pixels, four heads", on(CPU)),
    Case(AttentionShape(64, 50, 12, 64), "B/32's images, a batch", on(CUDA)),
    Case(AttentionShape(64, 77, 8, 64, True), "B's texts, a batch", on(CUDA)),
    Case(AttentionShape(16, 577, 16, 64), "L/14's images at 336 pixels", on(CUDA)),
    Case(AttentionShape(16, 257, 16, 104), "bigG/14's images, a batch", on(CUDA)),
    Case(AttentionShape(1, 50, 2, 64), "B/32's images, two heads", on(INTERPRETER), quick=True),
    Case(AttentionShape(1, 77, 2, 64, True), "the texts, two heads", on(INTERPRETER), quick=True),
    Case(AttentionShape(1, 197, 1, 64), "B/16's images, one head", on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 80), "H/14's images, one head", on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 88), "g/14's images, one head", on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 104), "bigG/14's images, one head", on(INTERPRETER)),
    Case(AttentionShape(1, 577, 1, 64), "L/14's images at 336 pixels, one head", on(INTERPRETER)),
    # nasty ones
    Case(AttentionShape(1, 1, 1, 64), "one token: softmax of one (PyTorch: eager or fused)", quick=True, draws=FEW, cancels=True),
    Case(AttentionShape(2, 2, 1, 64, True), "two tokens under the mask"),
    Case(AttentionShape(3, 7, 1, 8, True), "less than any tile in both directions"),
    Case(AttentionShape(1, 31, 2, 32), "one token less than a small tile"),
    Case(AttentionShape(1, 63, 2, 64), "one token less than a tile"),
    Case(AttentionShape(1, 64, 2, 32, True), "exactly one tile; the small model's head_dim"),
    Case(AttentionShape(1, 65, 1, 80), "one token past a tile; H/14's head_dim, padded to 128"),
    Case(AttentionShape(1, 33, 1, 104, True), "one token past a small tile; bigG/14's head_dim", quick=True),
    Case(AttentionShape(1, 67, 3, 128), "prime tokens; the largest head_dim"),
    Case(AttentionShape(0, 50, 2, 16), "no images"),
    # layouts
    Case(AttentionShape(2, 70, 2, 32, True), "batch contiguous", layout="transposed"),
    Case(AttentionShape(2, 70, 2, 32), "every second channel of a wider tensor", layout="sliced", quick=True),
    Case(AttentionShape(2, 70, 2, 32), "one element past an aligned address", layout="offset"),
    Case(AttentionShape(2, 50, 2, 16), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
    # extremes
    Case(AttentionShape(1, 77, 1, 64, True), "queries and keys times 8: each softmax is one-hot", check=EXTREME, values="one-hot", quick=True),
    Case(AttentionShape(1, 77, 1, 64), "times 1e-4: each softmax is flat", check=EXTREME, values="uniform"),
    Case(AttentionShape(1, 70, 2, 32), "every token occurs twice: equal weights", check=EXTREME, values="duplicate rows"),
    Case(AttentionShape(1, 70, 2, 32), "all tokens equal: the output is the value (PyTorch: eager or fused)", check=EXTREME, values="all-equal rows", draws=FEW, cancels=True),
    Case(AttentionShape(1, 50, 1, 64), "all scores near -800: padded keys must not win with 0 (PyTorch: eager or fused)", check=EXTREME, values="large negative", cancels=True),
    Case(AttentionShape(1, 50, 1, 64), "queries, keys and values of 30: scores of thousands", check=EXTREME, values="large", draws=24, quick=True),
]  # fmt: skip


def _patch(shape: PatchShape, why: str, **options: Any) -> list[Case]:
    """The case from bytes and from floats."""
    return [Case(shape._replace(uint8=uint8), why, **options) for uint8 in (True, False)]


PATCH = [
    Case(PatchShape(2, 224, 224, 32, 768), "B/32", NOT_INTERPRETED, quick=True),
    Case(PatchShape(2, 224, 224, 32, 768, False), "B/32", NOT_INTERPRETED),
    *_patch(PatchShape(1, 224, 224, 16, 768), "B/16", legs=NOT_INTERPRETED),
    *_patch(PatchShape(1, 224, 224, 14, 1024), "L/14: 588 pixels a patch, which no tile divides", legs=NOT_INTERPRETED),
    *_patch(PatchShape(1, 336, 336, 14, 1024), "L/14 at 336 pixels", legs=on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1280), "H/14", legs=on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1408), "g/14", legs=on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1664), "bigG/14", legs=NOT_INTERPRETED),
    *_patch(PatchShape(64, 224, 224, 16, 768), "B/16, a batch: the weight gradient is split", legs=on(CUDA)),
    # nasty ones
    *_patch(PatchShape(1, 8, 8, 8, 16), "one patch, one image"),
    *_patch(PatchShape(2, 28, 28, 14, 40), "patch 14, and a width that no tile divides", quick=True),
    *_patch(PatchShape(3, 32, 48, 16, 72), "not square; the width is past a tile"),
    *_patch(PatchShape(5, 64, 32, 32, 24), "patch 32; a prime number of images"),
    *_patch(PatchShape(7, 24, 24, 8, 63), "as many rows as a tile less one; the width one less than a tile"),
    *_patch(PatchShape(5, 40, 40, 8, 65), "130 rows: past a tile; the width one past a tile"),
    *_patch(PatchShape(0, 28, 28, 14, 40), "no images"),
    # dropped patches
    *_patch(PatchShape(2, 224, 224, 16, 768, keep=98), "B/16, half of the patches dropped", legs=NOT_INTERPRETED),
    *_patch(PatchShape(64, 224, 224, 16, 768, keep=49), "B/16, a batch, three quarters of the patches dropped", legs=on(CUDA)),
    *_patch(PatchShape(35, 21, 35, 7, 40, keep=7), "patch 7, an odd grid, some patches dropped; past a tile of images", quick=True),
    *_patch(PatchShape(3, 28, 28, 14, 40, keep=0), "every patch dropped: the class token alone"),
    *_patch(PatchShape(2, 28, 42, 14, 40, keep=3), "dropped patches of pixels as a decoder leaves them", layout="hwc"),
    # layouts
    *_patch(PatchShape(2, 28, 42, 14, 40), "pixels as a decoder leaves them", layout="hwc", quick=True),
    *_patch(PatchShape(2, 28, 42, 14, 40), "last axis first", layout="transposed"),
    *_patch(PatchShape(2, 28, 42, 14, 40), "every second element of a wider tensor", layout="sliced"),
    *_patch(PatchShape(2, 28, 42, 14, 40), "one element past an aligned address", layout="offset"),
    *_patch(PatchShape(2, 28, 28, 14, 40), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
    # extremes
    Case(PatchShape(2, 28, 28, 14, 40), "black: the low end of the range", check=EXTREME, values="all 0"),
    Case(PatchShape(2, 28, 28, 14, 40), "the byte that becomes 0 inside", check=EXTREME, values="all 128"),
    Case(PatchShape(2, 28, 28, 14, 40), "white: the high end of the range", check=EXTREME, values="all 255", quick=True),
    Case(PatchShape(2, 28, 28, 14, 40, False), "pixels of 100: far outside what a model sees", check=EXTREME, values="large", quick=True),
    Case(PatchShape(2, 28, 28, 14, 40), "each row of the weight reads one pixel", check=EXTREME, values="one-hot"),
    Case(PatchShape(4, 28, 28, 14, 40), "the same image again and again", check=EXTREME, values="duplicate rows"),
    Case(PatchShape(2, 28, 28, 14, 40), "weights of 1e-4: folding the normalisation must not flush them", check=EXTREME, values="tiny weight"),
]  # fmt: skip

TEXT = [
    Case(TextShape(4, 77, 49408, 512), "B's texts", on(CUDA)),
    Case(TextShape(3, 77, 49408, 1280), "bigG/14's texts", NOT_INTERPRETED),
    Case(TextShape(3, 77, 500, 512), "the length in use, a smaller table", on(CPU, INTERPRETER), quick=True),
    Case(TextShape(512, 77, 49408, 768), "L/14's texts, a batch", on(CUDA)),
    Case(TextShape(4096, 77, 49408, 512), "B's texts, a large batch: four launches", on(CUDA)),
    # nasty ones
    Case(TextShape(1, 1, 1, 1), "one of everything"),
    Case(TextShape(67, 1, 7, 24), "one position; every id in many texts"),
    Case(TextShape(13, 11, 5, 63), "more tokens than a chunk of the sums, few ids; an odd width", quick=True),
    Case(TextShape(3, 8, 50, 300), "the width is past a tile"),
    Case(TextShape(0, 9, 5, 16), "no texts: gradients are zero"),
    # layouts
    Case(TextShape(3, 7, 11, 24), "last axis first", layout="transposed"),
    Case(TextShape(3, 7, 11, 24), "every second element of a wider tensor", layout="sliced", quick=True),
    Case(TextShape(3, 7, 11, 24), "one element past an aligned address", layout="offset"),
    Case(TextShape(3, 7, 11, 24), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
    # extremes
    Case(TextShape(40, 7, 11, 24), "one id everywhere", check=EXTREME, values="one id", quick=True),
    Case(TextShape(9, 77, 1000, 24), "mostly padding", check=EXTREME, values="padded", quick=True),
    Case(TextShape(9, 77, 693, 24), "every id once", check=EXTREME, values="all different"),
]  # fmt: skip

REPEATED = {
    "attention": [
        Case(AttentionShape(2, 77, 2, 64, True), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(AttentionShape(64, 257, 16, 64), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
    ],
    "patch_embed": [
        Case(PatchShape(3, 32, 48, 16, 72, False), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(PatchShape(8, 112, 112, 16, 256), "sums over hundreds of patches", on(CPU), DETERMINISM),
        Case(PatchShape(64, 224, 224, 16, 768), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
        Case(PatchShape(70, 32, 48, 16, 72, keep=3), "dropped patches, several tiles of images", on(CPU), DETERMINISM),
        Case(PatchShape(256, 224, 224, 16, 768, keep=98), "dropped patches, of a batch", on(CUDA), DETERMINISM),
    ],
    "text_embed": [
        Case(TextShape(64, 77, 1000, 96), "ids in many texts, two threads", on(CPU), DETERMINISM, quick=True),
        Case(TextShape(4096, 77, 49408, 512), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
    ],
}

CASES = {
    **LOSS_CASES,
    "attention": ATTENTION + REPEATED["attention"],
    "patch_embed": PATCH + REPEATED["patch_embed"],
    "text_embed": TEXT + REPEATED["text_embed"],
    **BLOCK_CASES,
}
