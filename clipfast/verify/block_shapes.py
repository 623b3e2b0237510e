"""What a block's ops beside attention and products are verified at, and the ResNets' pool: every case says why it is
there.
"""

from typing import NamedTuple

from .cases import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, NOT_INTERPRETED, Case, on
from .loss_shapes import FEW


class NormShape(NamedTuple):
    """Rows [rows, width] that are normalised, after a residual is added or as they are."""

    rows: int
    width: int
    residual: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} N={self.width}{' residual' if self.residual else ''}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.rows * self.width


class PairShape(NamedTuple):
    """Rows [rows, width] that are normalised twice."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"M={self.rows} N={self.width}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.rows * self.width


class ActShape(NamedTuple):
    """Rows [rows, width] that a bias and an activation, GELU or QuickGELU, are applied to."""

    rows: int
    width: int
    quick: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} N={self.width}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.rows * self.width


class PoolShape(NamedTuple):
    """Queries [batch, queries, width] on tokens [batch, tokens, width]."""

    batch: int
    queries: int
    tokens: int
    width: int

    def __str__(self) -> str:
        return f"B={self.batch} H={self.queries} T={self.tokens} C={self.width}"

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""
        return self.batch * max(self.queries * self.tokens, max(self.queries, self.tokens) * self.width)


RowShape = NormShape | PairShape | ActShape


def _norms(shape: NormShape | PairShape) -> list[Case]:
    """Cases of a kind of norm, of which ``shape`` gives the kind."""

    def sized(rows: int, width: int) -> NormShape | PairShape:
        return shape._replace(rows=rows, width=width)

    return [
        Case(sized(37, 3), "three numbers a row", draws=FEW),
        Case(sized(67, 77), "odd rows and an odd width", quick=True),
        Case(sized(17, 768), "B/32's width"),
        Case(sized(9, 1000), "no power of two, and no multiple of a warp's columns"),
        Case(sized(7, 1024), "L/14's width: no column is masked"),
        Case(sized(5, 1025), "one past that"),
        Case(sized(5, 1664), "bigG/14's width"),
        Case(sized(3, 4096), "the widest that two norms take in one pass"),
        Case(sized(2, 8192), "the widest"),
        Case(sized(0, 64), "no rows"),
        Case(sized(1028, 1024), "L/14, four images", NOT_INTERPRETED),
        Case(sized(65792, 1024), "L/14, a batch", on(CUDA)),
        Case(sized(65792, 1664), "bigG/14, a batch", on(CUDA)),
        # layouts
        Case(sized(67, 40), "rows contiguous", layout="transposed"),
        Case(sized(67, 40), "every second column of a wider tensor", layout="sliced", quick=True),
        Case(sized(67, 40), "one element past an aligned address", layout="offset"),
        Case(sized(37, 72), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
        # extremes
        Case(sized(33, 64), "rows without variance: eps alone keeps the scale finite", check=EXTREME, values="constant rows", quick=True, draws=FEW),
        Case(sized(9, 768), "a mean of 3000: E[x^2] - E[x]^2 would have nothing left", check=EXTREME, values="large mean", quick=True),
        Case(sized(9, 768), "one channel of hundreds, as in trained towers", check=EXTREME, values="outlier", draws=FEW),
        Case(sized(33, 72), "values of thousands", check=EXTREME, values="large"),
        Case(sized(33, 72), "a variance far below eps", check=EXTREME, values="tiny"),
        # repeats
        Case(sized(517, 96), "several tiles, two threads", on(CPU), DETERMINISM, quick=True),
        Case(sized(65792, 1024), "more rows than the GPU holds at once", on(CUDA), DETERMINISM),
    ]  # fmt: skip


def _acts(*, quick: bool) -> list[Case]:
    """Cases of GELU or of QuickGELU."""

    def sized(rows: int, width: int) -> ActShape:
        return ActShape(rows, width, quick)

    return [
        Case(sized(37, 3), "three columns", draws=FEW),
        Case(sized(67, 77), "odd rows and an odd width", quick=True),
        Case(sized(50, 3072), "B/32's MLP, an image", NOT_INTERPRETED),
        Case(sized(3, 5120), "H/14's MLP"),
        Case(sized(2, 8200), "wider than bigG/14's MLP, and no multiple of a tile"),
        Case(sized(0, 64), "no rows"),
        Case(sized(257, 4096), "L/14's MLP, an image", NOT_INTERPRETED),
        Case(sized(65792, 4096), "L/14's MLP, a batch", on(CUDA)),
        # layouts
        Case(sized(67, 40), "rows contiguous", layout="transposed"),
        Case(sized(67, 40), "every second column of a wider tensor", layout="sliced", quick=True),
        Case(sized(67, 40), "one element past an aligned address", layout="offset"),
        Case(sized(37, 72), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
        # extremes
        Case(sized(67, 40), "from -60 to 60: both tails, and all between", check=EXTREME, values="range", quick=True),
        Case(sized(33, 72), "values of thousands: a product of two overflows in 16 bits", check=EXTREME, values="large"),
        Case(sized(33, 72), "next to zero, where the slope is a half", check=EXTREME, values="tiny"),
        # repeats
        Case(sized(517, 96), "several tiles, two threads", on(CPU), DETERMINISM, quick=True),
        Case(sized(65792, 4096), "more rows than the GPU holds at once", on(CUDA), DETERMINISM),
    ]  # fmt: skip


POOL = [
    Case(PoolShape(2, 32, 50, 2048), "RN50", NOT_INTERPRETED, quick=True),
    Case(PoolShape(1, 40, 82, 2560), "RN50x4", NOT_INTERPRETED),
    Case(PoolShape(1, 48, 145, 3072), "RN50x16", NOT_INTERPRETED),
    Case(PoolShape(1, 64, 197, 4096), "RN50x64", NOT_INTERPRETED),
    Case(PoolShape(256, 32, 50, 2048), "RN50, a batch", on(CUDA)),
    Case(PoolShape(1, 32, 50, 256), "RN50, an eighth of its width", on(INTERPRETER), quick=True),
    # nasty ones
    Case(PoolShape(3, 2, 5, 24), "less than any tile", quick=True),
    Case(PoolShape(1, 17, 33, 40), "one past a small tile in both directions"),
    Case(PoolShape(1, 64, 256, 72), "as many queries and tokens as one program takes"),
    Case(PoolShape(0, 32, 50, 64), "no images"),
    # layouts
    Case(PoolShape(2, 3, 17, 24), "batch contiguous", layout="transposed"),
    Case(PoolShape(2, 3, 17, 24), "every second channel of a wider tensor", layout="sliced", quick=True),
    Case(PoolShape(2, 3, 17, 24), "one element past an aligned address", layout="offset"),
    Case(PoolShape(2, 3, 17, 24), "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED),
    # extremes
    Case(PoolShape(1, 32, 50, 128), "queries times 8: each softmax is nearly one-hot", check=EXTREME, values="one-hot", quick=True),
    Case(PoolShape(1, 32, 50, 128), "queries times 1e-4: each softmax is flat", check=EXTREME, values="uniform"),
    Case(PoolShape(1, 32, 50, 128), "every token occurs twice: equal weights", check=EXTREME, values="duplicate rows"),
    # repeats
    Case(PoolShape(2, 8, 50, 96), "several images, two threads", on(CPU), DETERMINISM, quick=True),
    Case(PoolShape(512, 32, 50, 2048), "more images than the GPU holds at once", on(CUDA), DETERMINISM),
]  # fmt: skip

BLOCK_CASES = {
    "layer_norm": [*_norms(NormShape(0, 0)), *_norms(NormShape(0, 0, residual=True))],
    "layer_norm_pair": _norms(PairShape(0, 0)),
    "bias_gelu": _acts(quick=False),
    "bias_quick_gelu": _acts(quick=True),
    "attention_pool": POOL,
}
