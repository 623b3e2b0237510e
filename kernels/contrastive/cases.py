"""The shapes of the contrastive losses, and the cases that are checked, each with its reason."""

import dataclasses
import functools
from collections.abc import Callable

from ..spec import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, NOT_INTERPRETED, Case, Shape, on


@dataclasses.dataclass(frozen=True)
class PairShape(Shape):
    """The sizes of the features [pairs, embed_dim] of both sides of the pairs, such as images and texts."""

    pairs: int
    embed_dim: int

    @property
    def elements(self) -> int:
        """The number of logits."""
        return self.pairs**2


@dataclasses.dataclass(frozen=True)
class LossShape(PairShape):
    """Image and text features [pairs, embed_dim] and the scale of the logits, by default that of an untrained CLIP.

    ``matched`` says how alike the two features of a pair are: 0 at the start of training, about 0.3 at its end.
    """

    scale: float = 1 / 0.07
    matched: float = 0.0
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class ViewShape(LossShape):
    """Two views [pairs, embed_dim] of as many images, and the scale of the logits, by default SimCLR's."""

    scale: float = 10.0
    normalize: bool = True

    @property
    def elements(self) -> int:
        """The number of logits: every view is compared with every view."""
        return (2 * self.pairs) ** 2


@dataclasses.dataclass(frozen=True)
class SigmoidShape(PairShape):
    """Features [pairs, embed_dim], and scale and bias of the logits, by default those of an untrained SigLIP.

    With an ``offset`` of ``pairs`` no row has a partner, as between the images and the texts of two processes.
    """

    scale: float = 10.0
    bias: float = -10.0
    matched: float = 0.0
    offset: int = 0
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class QueueShape(Shape):
    """Queries and keys [pairs, embed_dim] and a queue [queue, embed_dim] of negatives; if ``queue`` is 0, there is
    none.

    With ``in_batch``, the keys of the other queries are negatives as well.
    """

    pairs: int
    queue: int
    embed_dim: int
    scale: float = 1 / 0.07
    matched: float = 0.0
    in_batch: bool = False
    normalize: bool = False

    @property
    def columns(self) -> int:
        """The number of keys that each query is compared with."""
        return self.queue + (self.pairs if self.in_batch else 1)

    @property
    def elements(self) -> int:
        """The number of logits."""
        return self.pairs * self.columns


FEW = 6  # random draws that are judged together, since the loss and the gradient of its scale are single numbers
MANY = 32  # random draws of cases in which PyTorch sometimes has no error at all
HALF = ("float16",)  # large cases are too slow in this dtype on a CPU
# Scale of the logits and similarity of the pairs at the start, in the middle and at the end of training.
EARLY, END = (1 / 0.07, 0.0), (100.0, 0.3)
STAGES = (EARLY, (50.0, 0.2), END)
# Scales for which sums with one shift for all rows are exact, and for which each row needs its own maximum.
SHIFTS = (50.0, 1e4)
# Scales that no training has, each with its effect on the logits.
SCALES = (
    (0.0, "scale 0: every logit is 0"),
    (-30.0, "negative scale: the best pair is the worst"),
    (1e4, "a scale far beyond training: one-hot softmaxes"),
)
LENGTHS = "rows of many lengths, which are divided by them"
NO_WIDTH = "features without dimensions: every product is 0"
ONCE = (3, 127)  # numbers of pairs that are checked at the start of training only
few = functools.partial(Case, draws=FEW)
extreme = functools.partial(Case, check=EXTREME, draws=FEW)


def edges(shape: Callable[..., PairShape], *stages: tuple[float, ...]) -> list[Case]:
    """Return cases of a loss with few pairs, and with about as many pairs as a tile has rows, at each of the stages."""
    return [
        few(shape(pairs, embed_dim, *at), why, quick=pairs == 67)
        for pairs, embed_dim, why in (
            (1, 16, "one pair: no negatives at all"),
            (2, 8, "less than any tile in both directions"),
            (3, 520, "a dimension of many steps, the last one short"),
            (17, 24, "prime"),
            (64, 64, "exactly one float32 tile: no mask is ever false"),
            (67, 40, "prime, and a dimension that no tile divides"),
            (127, 72, "one less than a half-precision tile"),
            (129, 72, "one past a half-precision tile"),
        )
        for at in (stages[:1] if pairs in ONCE else stages)
    ]


def laid_out(shape: Shape) -> list[Case]:
    """Return a case of a contrastive loss for each memory layout of the features."""
    expanded = Case(shape, "every row of the first features is the same memory: stride 0", layout=EXPANDED)
    return [dataclasses.replace(case, draws=FEW) for case in (*Case.layouts(shape), expanded)]


CONTRASTIVE = [
    *edges(LossShape, *STAGES),
    few(LossShape(63, 64), "one less than a float32 tile; several small tiles in one block", sanitize=True),
    few(LossShape(65, 64), "one past a float32 tile"),
    Case(LossShape(0, 16), "no pairs: the mean of nothing is NaN"),
    Case(LossShape(600, 16, 20.0, 0.3), "more tiles of rows than a group of programs", on(INTERPRETER, CUDA)),
    Case(LossShape(131, 512), "B/32's dimension", on(INTERPRETER)),
    *(Case(LossShape(1021, 512, *at), "B/32's dimension; a prime of the size of one GPU's share", on(CPU), slow=HALF) for at in STAGES),
    Case(LossShape(1024, 640), "RN50x4's dimension", NOT_INTERPRETED, slow=HALF),
    Case(LossShape(1024, 768), "L/14's dimension", NOT_INTERPRETED, slow=HALF, quick=True),
    Case(LossShape(1024, 1024), "H/14's dimension", NOT_INTERPRETED, slow=HALF),
    Case(LossShape(4099, 512), "a prime batch in the thousands: many chunks, the last one short", on(CPU), slow=HALF),
    *(Case(LossShape(4099, 512, *at), "a prime batch in the thousands: many strips, the last one short", on(CUDA)) for at in STAGES),
    *(Case(LossShape(8192, 768, *at), "L/14's dimension at a large batch", on(CUDA)) for at in STAGES),
    Case(LossShape(16384, 512), "B/32 at a large batch", on(CUDA)),
    Case(LossShape(16384, 1024, 100.0, 0.3), "H/14 at a large batch, late in training", on(CUDA)),
    Case(LossShape(32768, 512), "CLIP's published batch", on(CUDA)),
    # cases of several tiles and blocks, and the kernels that normalise
    *(
        few(LossShape(pairs, embed_dim, scale, 0.3, normalize=True), why, sanitize=True)
        for pairs, embed_dim, why in ((1, 16, "one pair, normalised"), (67, 40, "normalised; several small blocks"))
        for scale in SHIFTS
    ),
    few(LossShape(45, 24, 20.0, 0.3, normalize=True), LENGTHS, values="lengths", sanitize=True),
    few(LossShape(70, 0), NO_WIDTH),
    *laid_out(LossShape(67, 40, 20.0, 0.5)),
    # cases of extreme values
    extreme(LossShape(129, 72, 100.0, 1.0), "largest scale in training, pairs exactly alike"),
    extreme(LossShape(67, 40, 100.0, 0.3), "every feature occurs twice: two positives", values="duplicate rows", quick=True),
    extreme(LossShape(50, 16, 100.0), "all features equal: the loss is log N", values="all-equal rows"),
    extreme(LossShape(45, 24, 1.0), "lengths of 100 and 1: logits of hundreds, of both signs", values="large", quick=True),
    extreme(LossShape(48, 48, 100.0), "orthogonal pairs: logits are 0 or 100", values="one-hot"),
    *(extreme(LossShape(37, 24, scale, 0.3), why) for scale, why in SCALES),
    # cases whose results have the same bits in every run
    Case(LossShape(129, 72, 50.0, 0.5), "several tiles", on(CPU), DETERMINISM, quick=True),
    Case(LossShape(2053, 256, 50.0, 0.5), "several chunks, two threads", on(CPU), DETERMINISM, slow=HALF),
    Case(LossShape(4099, 512, 50.0, 0.5), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
]  # fmt: skip

# Scale and bias of the logits and similarity of the pairs at the start and at the end of SigLIP's training.
NEW, LATE = (10.0, -10.0, 0.0), (100.0, -16.0, 0.3)
SIGMOID = [
    *edges(SigmoidShape, NEW, LATE),
    Case(SigmoidShape(1, 16, 30.0, -16.0, 1.0), "one pair that is learned: its force is small", draws=MANY),
    Case(SigmoidShape(0, 16), "no images: the mean of nothing is NaN"),
    Case(SigmoidShape(1021, 512), "a prime of the size of one GPU's share", NOT_INTERPRETED, slow=HALF),
    Case(SigmoidShape(8192, 768, *LATE), "a large batch, late in training", on(CUDA)),
    # cases of several tiles and blocks, with and without pairs
    *(
        few(SigmoidShape(pairs, embed_dim, 20.0, matched=0.3, offset=offset), why, sanitize=True)
        for pairs, embed_dim in ((1, 16), (67, 40))
        for offset, why in ((0, "several tiles and small blocks"), (67, "no pairs, as with another process"))
    ),
    few(SigmoidShape(45, 24, matched=0.3, normalize=True), LENGTHS, values="lengths", sanitize=True),
    few(SigmoidShape(70, 0), NO_WIDTH),
    *laid_out(SigmoidShape(67, 40)),
    # cases of extreme values
    extreme(SigmoidShape(67, 40, *LATE), "every feature occurs twice", values="duplicate rows"),
    extreme(SigmoidShape(50, 16, 14.3), "all features equal: pairs are as the others", values="all-equal rows"),
    extreme(SigmoidShape(45, 24, 100.0), "features of zeros: their logits are the bias", values="zero rows"),
    extreme(SigmoidShape(129, 72, 100.0, -80.0, 1.0), "a bias that excludes all but the pairs"),
    extreme(SigmoidShape(37, 24, 0.0, 0.0, 0.3), "every logit is 0"),
    extreme(SigmoidShape(37, 24, 1e4, -10.0, 0.3), "a scale far beyond training"),
    extreme(SigmoidShape(37, 24, -30.0, 2.0, 0.3), "negative scale: the best pair is the worst"),
    extreme(SigmoidShape(37, 24, 10.0, -60.0, 0.3), "a bias that excludes even the pairs"),
    extreme(SigmoidShape(37, 24, 10.0, 1e4, 0.3), "a bias for which everything is a pair"),
    # cases whose results have the same bits in every run
    Case(SigmoidShape(129, 72, *LATE), "several tiles", on(CPU), DETERMINISM, quick=True),
    Case(SigmoidShape(4099, 512), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
]  # fmt: skip

INFO_NCE = [
    few(QueueShape(1, 1, 16), "one query and one negative"),
    few(QueueShape(2, 3, 8, 100.0, 0.3, True), "less than any tile in both directions"),
    few(QueueShape(3, 70, 520), "a dimension of many steps, the last one short"),
    few(QueueShape(17, 37, 24), "primes, the start of training", quick=True),
    few(QueueShape(17, 37, 24, 100.0, 0.3, True), "primes, the end of training", quick=True),
    *(few(QueueShape(64, 64, 64, *at, in_batch), "exactly one float32 tile") for at in (EARLY, END) for in_batch in (True, False)),
    few(QueueShape(127, 65, 72), "one less and one past a tile"),
    few(QueueShape(129, 257, 72, 100.0, 0.3), "one past a half-precision tile, the end of training"),
    few(QueueShape(129, 63, 72, in_batch=True), "one past a half-precision tile; two blocks of columns"),
    Case(QueueShape(0, 16, 16), "no queries: the mean of nothing is NaN"),
    Case(QueueShape(256, 4099, 128), "a long queue, a prime", NOT_INTERPRETED, slow=HALF),
    Case(QueueShape(256, 65536, 128, 14.3, 0.3), "MoCo's queue", on(CUDA)),
    # cases of several tiles and blocks
    *(
        few(QueueShape(67, 70, 40, scale, 0.3, in_batch), "several tiles and small blocks", sanitize=True)
        for in_batch in (True, False)
        for scale in SHIFTS
    ),
    *(few(QueueShape(45, 50, 24, 20.0, 0.3, in_batch, normalize=True), LENGTHS, values="lengths") for in_batch in (True, False)),
    few(QueueShape(70, 3, 0, in_batch=True), NO_WIDTH),
    Case(QueueShape(11, 0, 8, 20.0, 0.3, True), "no queue at all", draws=MANY),
    few(QueueShape(67, 0, 40, 20.0, 0.3, True), "no queue at all; several tiles and small blocks", sanitize=True),
    *(few(QueueShape(40, 50, 24, 20.0, 0.3, True), "one block of columns suits the shared shift, the other does not", values=values) for values in ("long keys", "long negatives")),
    *laid_out(QueueShape(67, 70, 40, in_batch=True)),
    # cases of extreme values
    extreme(QueueShape(67, 70, 40, 100.0, 0.3, True), "every key occurs twice: two positives", values="duplicate rows"),
    extreme(QueueShape(50, 37, 16, 100.0), "all features equal: the loss is log(K + 1)", values="all-equal rows"),
    extreme(QueueShape(45, 20, 24, 100.0), "features of zeros: their logits are 0", values="zero rows"),
    extreme(QueueShape(129, 72, 72, 100.0, 1.0), "each pair exactly alike: losses of nearly nothing"),
    *(extreme(QueueShape(37, 50, 24, scale, 0.3, in_batch), why) for in_batch in (True, False) for scale, why in SCALES),
    # cases whose results have the same bits in every run
    Case(QueueShape(129, 150, 72, 100.0, 0.3, True), "several tiles", on(CPU), DETERMINISM, quick=True),
    Case(QueueShape(1021, 16384, 256, in_batch=True), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
]  # fmt: skip

NT_XENT = [
    *edges(ViewShape, EARLY, END),
    Case(ViewShape(0, 16, *EARLY), "no views: the mean of nothing is NaN"),
    Case(ViewShape(509, 128, *EARLY), "SimCLR's dimension, a prime batch", NOT_INTERPRETED, slow=HALF),
    Case(ViewShape(4096, 128, *EARLY), "SimCLR's batch", on(CUDA)),
    # cases of several tiles and blocks
    *(few(ViewShape(67, 40, scale, 0.3), "several tiles and small blocks", sanitize=True) for scale in SHIFTS),
    few(ViewShape(45, 24, 20.0, 0.3), LENGTHS, values="lengths"),
    few(ViewShape(70, 0), NO_WIDTH),
    *laid_out(ViewShape(67, 40, *EARLY)),
    # cases of extreme values
    extreme(ViewShape(37, 24, *END), "every view occurs twice: two positives", values="duplicate rows"),
    Case(ViewShape(50, 16, 100.0), "all views equal: the loss is log(2N - 1)", check=EXTREME, values="all-equal rows", draws=MANY),
    # These features are not normalised: the gradient of a row of zeros would be 10^12 times as large as those of other rows.
    extreme(ViewShape(45, 24, 100.0, normalize=False), "features of zeros: their logits are 0", values="zero rows"),
    extreme(ViewShape(67, 40, 100.0, 1.0), "both views exactly alike: losses of nearly nothing"),
    *(extreme(ViewShape(37, 24, scale, 0.3), why) for scale, why in SCALES),
    # cases whose results have the same bits in every run
    Case(ViewShape(129, 72, *END), "several tiles", on(CPU), DETERMINISM, quick=True),
    Case(ViewShape(4099, 256, *EARLY), "more programs than the GPU holds at once", on(CUDA), DETERMINISM),
]  # fmt: skip
