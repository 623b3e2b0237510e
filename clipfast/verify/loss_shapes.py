"""What the losses are verified at: every case says why it is there."""

from typing import Any, NamedTuple

from .cases import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, NOT_INTERPRETED, Case, on


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


AnyLoss = LossShape | SigmoidShape | QueueShape


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
    Case(LossShape(131, 512), "B/32's dimension", on(INTERPRETER)),
    *_loss(1021, 512, "B/32's dimension; a prime of the size of one GPU's share", legs=on(CPU), slow=("float16",)),
    Case(LossShape(1024, 640), "RN50x4's dimension", NOT_INTERPRETED, slow=("float16",)),
    Case(LossShape(1024, 768), "L/14's dimension", NOT_INTERPRETED, slow=("float16",), quick=True),
    Case(LossShape(1024, 1024), "H/14's dimension", NOT_INTERPRETED, slow=("float16",)),
    Case(LossShape(4099, 512), "a prime batch in the thousands: many chunks, the last one short", on(CPU), slow=("float16",)),
    *_loss(4099, 512, "a prime batch in the thousands: many strips, the last one short", legs=on(CUDA)),
    *_loss(8192, 768, "L/14's dimension at a large batch", legs=on(CUDA)),
    Case(LossShape(16384, 512), "B/32 at a large batch", on(CUDA)),
    Case(LossShape(16384, 1024, 100.0, 0.3), "H/14 at a large batch, late in training", on(CUDA)),
    Case(LossShape(32768, 512), "CLIP's published batch", on(CUDA)),
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
    Case(SigmoidShape(8192, 768, 100.0, -16.0, 0.3), "a large batch, late in training", on(CUDA)),
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
    Case(QueueShape(256, 65536, 128, 14.3, 0.3), "MoCo's queue", on(CUDA)),
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
    Case(ViewShape(4096, 128), "SimCLR's batch", on(CUDA)),
    Case(ViewShape(67, 40), "columns contiguous", layout="transposed", draws=FEW),
    Case(ViewShape(67, 40), "every second column of a wider tensor", layout="sliced", draws=FEW),
    Case(ViewShape(37, 24), "every first view is the same memory: stride 0", layout=EXPANDED, draws=FEW),
    Case(ViewShape(37, 24, 100.0, 0.3), "every view occurs twice: two positives", check=EXTREME, values="duplicate rows", draws=FEW),
    Case(ViewShape(50, 16, 100.0), "all views equal: the loss is log(2N - 1)", check=EXTREME, values="all-equal rows", draws=FEW),
    Case(ViewShape(45, 24, 100.0), "features of zeros: their logits are 0", check=EXTREME, values="zero rows", draws=FEW),
    Case(ViewShape(67, 40, 100.0, 1.0), "both views exactly alike: losses of nearly nothing", check=EXTREME, draws=FEW),
]  # fmt: skip

REPEATED = {
    "contrastive_loss": [
        Case(LossShape(129, 72, 50.0, 0.5), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(LossShape(2053, 256, 50.0, 0.5), "several chunks, two threads", on(CPU), DETERMINISM, slow=("float16",)),
        Case(LossShape(4099, 512, 50.0, 0.5), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
    ],
    "sigmoid_loss": [
        Case(SigmoidShape(129, 72, 100.0, -16.0, 0.3), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(SigmoidShape(4099, 512), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
    ],
    "info_nce_loss": [
        Case(QueueShape(129, 150, 72, 100.0, 0.3, True), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(
            QueueShape(1021, 16384, 256, in_batch=True),
            "more programs than the GPU holds at once",
            on(CUDA),
            DETERMINISM,
        ),
    ],
    "nt_xent_loss": [
        Case(ViewShape(129, 72, 100.0, 0.3), "several tiles", on(CPU), DETERMINISM, quick=True),
        Case(ViewShape(4099, 256), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
    ],
}

LOSS_CASES = {
    "contrastive_loss": LOSS + REPEATED["contrastive_loss"],
    "sigmoid_loss": SIGMOID + REPEATED["sigmoid_loss"],
    "info_nce_loss": INFO_NCE + REPEATED["info_nce_loss"],
    "nt_xent_loss": NT_XENT + REPEATED["nt_xent_loss"],
}
