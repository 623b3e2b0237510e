"""What the ops are verified at: every case says why it is there.

A case runs on the legs that it names: ``CPU`` (the PyTorch paths), ``INTERPRETER`` (the Triton kernels, interpreted:
small, or it would take minutes) and ``CUDA`` (the Triton kernels, natively: as large as in use).
"""

import dataclasses
from typing import Any, NamedTuple

CPU, INTERPRETER, CUDA = "cpu", "interpreter", "cuda"
LEGS = (CPU, INTERPRETER, CUDA)
EVERYWHERE, NOT_INTERPRETED = frozenset(LEGS), frozenset((CPU, CUDA))
ACCURACY, EXTREME, DETERMINISM = "accuracy", "extreme", "determinism"
EXPANDED = "expanded"


class LossShape(NamedTuple):
    """Features [pairs, dim]; ``matched`` is how alike the pairs are: 0 at the start of training, more at its end."""

    pairs: int
    dim: int
    scale: float = 14.3
    matched: float = 0.0

    def __str__(self) -> str:
        return f"N={self.pairs} D={self.dim} scale={self.scale:g} matched={self.matched:g}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs**2


class ViewShape(LossShape):
    """Two views [pairs, dim] of as many images; each view is among all of both."""

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return (2 * self.pairs) ** 2


class SigmoidShape(NamedTuple):
    """Features [pairs, dim], and a bias of the logits; ``matched`` as of :class:`LossShape`."""

    pairs: int
    dim: int
    scale: float = 10.0
    bias: float = -10.0
    matched: float = 0.0

    def __str__(self) -> str:
        return f"N={self.pairs} D={self.dim} scale={self.scale:g} bias={self.bias:g} matched={self.matched:g}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs**2


class QueueShape(NamedTuple):
    """Features [pairs, dim] and a queue [queue, dim] of negatives, beside the other keys if they are ``in_batch``."""

    pairs: int
    queue: int
    dim: int
    scale: float = 14.3
    matched: float = 0.0
    in_batch: bool = False

    def __str__(self) -> str:
        keys = " in batch" if self.in_batch else ""
        return f"N={self.pairs} K={self.queue} D={self.dim} scale={self.scale:g} matched={self.matched:g}{keys}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.pairs * (self.queue + (self.pairs if self.in_batch else 1))


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


AnyLoss = LossShape | SigmoidShape | QueueShape
Shape = AnyLoss | AttentionShape | PatchShape


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape in one memory layout with one kind of values.

    ``draws`` independent draws are judged as one. ``slow`` are dtypes that a CPU computes too slowly at this size.
    ``cancels`` says that exact gradients are zero because terms cancel. Fused attention, PyTorch's too, takes the sum of
    dO * O for that of P * dP, which is the same number with another rounding error, and so cancels less well than the
    eager one: there PyTorch's error is the larger of its eager and its fused attention.
    """

    shape: Shape
    why: str
    legs: frozenset[str] = EVERYWHERE
    check: str = ACCURACY
    layout: str = ""
    values: str = ""
    draws: int = 1
    quick: bool = False
    slow: tuple[str, ...] = ()
    cancels: bool = False

    @property
    def name(self) -> str:
        """Shape, layout and values in one line."""
        return ", ".join(part for part in (str(self.shape), self.layout, self.values) if part)


def _on(*legs: str) -> frozenset[str]:
    return frozenset(legs)


def _loss(pairs: int, dim: int, why: str, **options: Any) -> list[Case]:
    """The case at the start, in the middle and at the end of training."""
    moments = ((14.3, 0.0), (50.0, 0.2), (100.0, 0.3))
    return [Case(LossShape(pairs, dim, *moment), why, **options) for moment in moments]


FEW = 6  # the loss and the gradient of its scale are single numbers
LOSS = [
    *_loss(1, 16, "one pair: both softmaxes are 1, every gradient is 0", draws=FEW),
    *_loss(2, 8, "less than any tile in both directions", draws=FEW),
    Case(LossShape(63, 64), "one less than a float32 tile", draws=FEW),
    Case(LossShape(64, 64), "exactly one float32 tile: no mask is ever false", draws=FEW),
    Case(LossShape(65, 64), "one past a float32 tile", draws=FEW),
    *_loss(67, 40, "prime, and a dimension that no tile divides", quick=True, draws=FEW),
    Case(LossShape(127, 72), "one less than a half-precision tile", draws=FEW),
    *_loss(129, 72, "one past a half-precision tile", draws=FEW),
    Case(LossShape(0, 16), "no pairs: the mean of nothing is NaN"),
    Case(LossShape(131, 512), "B/32's dimension", _on(INTERPRETER)),
    *_loss(1021, 512, "B/32's dimension; a prime of the size of one GPU's share", legs=_on(CPU), slow=("float16",)),
    Case(LossShape(1024, 640), "RN50x4's dimension", NOT_INTERPRETED, slow=("float16",)),
    Case(LossShape(1024, 768), "L/14's dimension", NOT_INTERPRETED, slow=("float16",), quick=True),
    Case(LossShape(1024, 1024), "H/14's dimension", NOT_INTERPRETED, slow=("float16",)),
    Case(LossShape(4099, 512), "a prime batch in the thousands: many chunks, the last one short", _on(CPU), slow=("float16",)),
    *_loss(4099, 512, "a prime batch in the thousands: many strips, the last one short", legs=_on(CUDA)),
    *_loss(8192, 768, "L/14's dimension at a large batch", legs=_on(CUDA)),
    Case(LossShape(16384, 512), "B/32 at a large batch", _on(CUDA)),
    Case(LossShape(16384, 1024, 100.0, 0.3), "H/14 at a large batch, late in training", _on(CUDA)),
    Case(LossShape(32768, 512), "CLIP's published batch", _on(CUDA)),
    # layouts
    Case(LossShape(67, 40, 20.0, 0.5), "columns contiguous", layout="transposed", draws=FEW),
    Case(LossShape(67, 40, 20.0, 0.5), "every second column of a wider tensor", layout="sliced", quick=True, draws=FEW),
    Case(LossShape(67, 40, 20.0, 0.5), "one element past an aligned address", layout="offset", draws=FEW),
    Case(LossShape(37, 24, 10.0), "every image is the same memory: stride 0", layout=EXPANDED, draws=FEW),
    # extremes
    Case(LossShape(129, 72, 100.0, 1.0), "largest scale in training, every pair exactly alike", check=EXTREME, draws=FEW),
    Case(LossShape(67, 40, 100.0, 0.3), "every feature occurs twice: two positives", check=EXTREME, values="duplicate rows", quick=True, draws=FEW),
    Case(LossShape(50, 16, 100.0), "all features equal: the loss is log N", check=EXTREME, values="all-equal rows", draws=FEW),
    Case(LossShape(45, 24, 1.0), "lengths of 100 and 1: logits of hundreds, of both signs", check=EXTREME, values="large", quick=True, draws=FEW),
    Case(LossShape(48, 48, 100.0), "orthogonal pairs: logits are 0 or 100", check=EXTREME, values="one-hot", draws=FEW),
    Case(LossShape(37, 24, 0.0, 0.3), "scale 0: every logit is 0", check=EXTREME, draws=FEW),
    Case(LossShape(37, 24, -30.0, 0.3), "negative scale: the best pair is the worst", check=EXTREME, draws=FEW),
]  # fmt: skip

SIGMOID = [
    Case(SigmoidShape(1, 16), "one pair: no negatives at all", draws=FEW),
    Case(SigmoidShape(2, 8, 100.0, -16.0, 0.3), "less than any tile in both directions", draws=FEW),
    Case(SigmoidShape(3, 520), "a dimension of many steps, the last one short", draws=FEW),
    Case(SigmoidShape(17, 24), "prime, the start of training", quick=True, draws=FEW),
    Case(SigmoidShape(17, 24, 100.0, -16.0, 0.3), "prime, the end of training", quick=True, draws=FEW),
    Case(SigmoidShape(127, 72), "one less than a half-precision tile", draws=FEW),
    Case(SigmoidShape(129, 72), "one past a half-precision tile, the start of training", draws=FEW),
    Case(SigmoidShape(129, 72, 100.0, -16.0, 0.3), "one past a half-precision tile, the end of training", draws=FEW),
    Case(SigmoidShape(0, 16), "no images: the mean of nothing is NaN"),
    Case(SigmoidShape(1021, 512), "a prime of the size of one GPU's share", NOT_INTERPRETED, slow=("float16",)),
    Case(SigmoidShape(8192, 768, 100.0, -16.0, 0.3), "a large batch, late in training", _on(CUDA)),
    Case(SigmoidShape(67, 40), "columns contiguous", layout="transposed", draws=FEW),
    Case(SigmoidShape(67, 40), "every second column of a wider tensor", layout="sliced", draws=FEW),
    Case(SigmoidShape(37, 24), "every image is the same memory: stride 0", layout=EXPANDED, draws=FEW),
    Case(SigmoidShape(67, 40, 100.0, -16.0, 0.3), "every feature occurs twice", check=EXTREME, values="duplicate rows", draws=FEW),
    Case(SigmoidShape(50, 16, 14.3), "all features equal: pairs are as the others", check=EXTREME, values="all-equal rows", draws=FEW),
    Case(SigmoidShape(45, 24, 100.0), "features of zeros: their logits are the bias", check=EXTREME, values="zero rows", draws=FEW),
    Case(SigmoidShape(129, 72, 100.0, -80.0, 1.0), "a bias that rules out all but the pairs", check=EXTREME, draws=FEW),
]  # fmt: skip

INFO_NCE = [
    Case(QueueShape(1, 1, 16), "one query and one negative", draws=FEW),
    Case(QueueShape(2, 3, 8, 100.0, 0.3, True), "less than any tile in both directions", draws=FEW),
    Case(QueueShape(3, 70, 520), "a dimension of many steps, the last one short", draws=FEW),
    Case(QueueShape(17, 37, 24), "primes, the start of training", quick=True, draws=FEW),
    Case(QueueShape(17, 37, 24, 100.0, 0.3, True), "primes, the end of training", quick=True, draws=FEW),
    Case(QueueShape(127, 65, 72), "one less and one past a tile", draws=FEW),
    Case(QueueShape(129, 257, 72, 100.0, 0.3), "one past a half-precision tile, the end of training", draws=FEW),
    Case(QueueShape(129, 63, 72, in_batch=True), "one past a half-precision tile; two blocks of columns", draws=FEW),
    Case(QueueShape(0, 16, 16), "no queries: the mean of nothing is NaN"),
    Case(QueueShape(256, 4099, 128), "a long queue, a prime", NOT_INTERPRETED, slow=("float16",)),
    Case(QueueShape(256, 65536, 128, 14.3, 0.3), "MoCo's queue", _on(CUDA)),
    Case(QueueShape(67, 70, 40), "columns contiguous", layout="transposed", draws=FEW),
    Case(QueueShape(67, 70, 40, in_batch=True), "every second column of a wider tensor", layout="sliced", draws=FEW),
    Case(QueueShape(37, 20, 24), "every query is the same memory: stride 0", layout=EXPANDED, draws=FEW),
    Case(QueueShape(67, 70, 40, 100.0, 0.3, True), "every key occurs twice: two positives", check=EXTREME, values="duplicate rows", draws=FEW),
    Case(QueueShape(50, 37, 16, 100.0), "all features equal: the loss is log(K + 1)", check=EXTREME, values="all-equal rows", draws=FEW),
    Case(QueueShape(45, 20, 24, 100.0), "features of zeros: their logits are 0", check=EXTREME, values="zero rows", draws=FEW),
    Case(QueueShape(129, 72, 72, 100.0, 1.0), "every pair exactly alike: losses of nearly nothing", check=EXTREME, draws=FEW),
]  # fmt: skip

NT_XENT = [
    Case(ViewShape(1, 16), "one image: no negatives at all", draws=FEW),
    Case(ViewShape(2, 8, 100.0, 0.3), "less than any tile in both directions", draws=FEW),
    Case(ViewShape(3, 520), "a dimension of many steps, the last one short", draws=FEW),
    Case(ViewShape(17, 24), "prime, the start of training", quick=True, draws=FEW),
    Case(ViewShape(17, 24, 100.0, 0.3), "prime, the end of training", quick=True, draws=FEW),
    Case(ViewShape(127, 72), "one less than a half-precision tile", draws=FEW),
    Case(ViewShape(129, 72, 100.0, 0.3), "one past a half-precision tile, the end of training", draws=FEW),
    Case(ViewShape(0, 16), "no views: the mean of nothing is NaN"),
    Case(ViewShape(509, 128), "SimCLR's dimension, a prime batch", NOT_INTERPRETED, slow=("float16",)),
    Case(ViewShape(4096, 128), "SimCLR's batch", _on(CUDA)),
    Case(ViewShape(67, 40), "columns contiguous", layout="transposed", draws=FEW),
    Case(ViewShape(67, 40), "every second column of a wider tensor", layout="sliced", draws=FEW),
    Case(ViewShape(37, 24), "every first view is the same memory: stride 0", layout=EXPANDED, draws=FEW),
    Case(ViewShape(37, 24, 100.0, 0.3), "every view occurs twice: two positives", check=EXTREME, values="duplicate rows", draws=FEW),
    Case(ViewShape(50, 16, 100.0), "all views equal: the loss is log(2N - 1)", check=EXTREME, values="all-equal rows", draws=FEW),
    Case(ViewShape(45, 24, 100.0), "features of zeros: their logits are 0", check=EXTREME, values="zero rows", draws=FEW),
    Case(ViewShape(67, 40, 100.0, 1.0), "both views exactly alike: losses of nearly nothing", check=EXTREME, draws=FEW),
]  # fmt: skip

ATTENTION = [
    Case(AttentionShape(2, 50, 12, 64), "B/32's images", NOT_INTERPRETED, quick=True),
    Case(AttentionShape(2, 77, 8, 64, True), "B's texts: crosses a tile under the causal mask", NOT_INTERPRETED, quick=True),
    Case(AttentionShape(1, 77, 20, 64, True), "bigG/14's texts", NOT_INTERPRETED),
    Case(AttentionShape(1, 197, 12, 64), "B/16's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 64), "L/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 80), "H/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 88), "g/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 257, 16, 104), "bigG/14's images", NOT_INTERPRETED),
    Case(AttentionShape(1, 577, 4, 64), "L/14's images at 336 pixels, four heads", _on(CPU)),
    Case(AttentionShape(64, 50, 12, 64), "B/32's images, a batch", _on(CUDA)),
    Case(AttentionShape(64, 77, 8, 64, True), "B's texts, a batch", _on(CUDA)),
    Case(AttentionShape(16, 577, 16, 64), "L/14's images at 336 pixels", _on(CUDA)),
    Case(AttentionShape(16, 257, 16, 104), "bigG/14's images, a batch", _on(CUDA)),
    Case(AttentionShape(1, 50, 2, 64), "B/32's images, two heads", _on(INTERPRETER), quick=True),
    Case(AttentionShape(1, 77, 2, 64, True), "the texts, two heads", _on(INTERPRETER), quick=True),
    Case(AttentionShape(1, 197, 1, 64), "B/16's images, one head", _on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 80), "H/14's images, one head", _on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 88), "g/14's images, one head", _on(INTERPRETER)),
    Case(AttentionShape(1, 257, 1, 104), "bigG/14's images, one head", _on(INTERPRETER)),
    Case(AttentionShape(1, 577, 1, 64), "L/14's images at 336 pixels, one head", _on(INTERPRETER)),
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
    *_patch(PatchShape(1, 336, 336, 14, 1024), "L/14 at 336 pixels", legs=_on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1280), "H/14", legs=_on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1408), "g/14", legs=_on(CUDA)),
    *_patch(PatchShape(1, 224, 224, 14, 1664), "bigG/14", legs=NOT_INTERPRETED),
    *_patch(PatchShape(64, 224, 224, 16, 768), "B/16, a batch: the weight gradient is split", legs=_on(CUDA)),
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
    *_patch(PatchShape(64, 224, 224, 16, 768, keep=49), "B/16, a batch, three quarters of the patches dropped", legs=_on(CUDA)),
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

REPEATED = {
    "contrastive_loss": [
        Case(LossShape(129, 72, 50.0, 0.5), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(LossShape(2053, 256, 50.0, 0.5), "several chunks, two threads", _on(CPU), DETERMINISM, slow=("float16",)),
        Case(LossShape(4099, 512, 50.0, 0.5), "more programs than the GPU holds at once", _on(CUDA), DETERMINISM),
    ],
    "sigmoid_loss": [
        Case(SigmoidShape(129, 72, 100.0, -16.0, 0.3), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(SigmoidShape(4099, 512), "more programs than the GPU holds at once", _on(CUDA), DETERMINISM),
    ],
    "info_nce_loss": [
        Case(QueueShape(129, 150, 72, 100.0, 0.3, True), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(
            QueueShape(1021, 16384, 256, in_batch=True),
            "more programs than the GPU holds at once",
            _on(CUDA),
            DETERMINISM,
        ),
    ],
    "nt_xent_loss": [
        Case(ViewShape(129, 72, 100.0, 0.3), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(ViewShape(4099, 256), "more programs than the GPU holds at once", _on(CUDA), DETERMINISM),
    ],
    "attention": [
        Case(AttentionShape(2, 77, 2, 64, True), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(AttentionShape(64, 257, 16, 64), "more programs than the GPU holds at once", _on(CUDA), DETERMINISM),
    ],
    "patch_embed": [
        Case(PatchShape(3, 32, 48, 16, 72, False), "several tiles", _on(CPU), DETERMINISM, quick=True),
        Case(PatchShape(8, 112, 112, 16, 256), "sums over hundreds of patches", _on(CPU), DETERMINISM),
        Case(PatchShape(64, 224, 224, 16, 768), "more programs than the GPU holds at once", _on(CUDA), DETERMINISM),
        Case(PatchShape(70, 32, 48, 16, 72, keep=3), "dropped patches, several tiles of images", _on(CPU), DETERMINISM),
        Case(PatchShape(256, 224, 224, 16, 768, keep=98), "dropped patches, of a batch", _on(CUDA), DETERMINISM),
    ],
}

CASES = {
    "contrastive_loss": LOSS + REPEATED["contrastive_loss"],
    "sigmoid_loss": SIGMOID + REPEATED["sigmoid_loss"],
    "info_nce_loss": INFO_NCE + REPEATED["info_nce_loss"],
    "nt_xent_loss": NT_XENT + REPEATED["nt_xent_loss"],
    "attention": ATTENTION + REPEATED["attention"],
    "patch_embed": PATCH + REPEATED["patch_embed"],
}
