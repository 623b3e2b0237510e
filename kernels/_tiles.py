"""Tile arithmetic shared by the kernels: pure functions of values, with no loads and no stores."""

import triton
import triton.language as tl


@triton.jit
def online_softmax_step(
    scores,  # [M, N]
    row_max,  # [M]
    row_sum,  # [M]
    scale,
):  # fmt: skip
    """Fold one tile into a running softmax of 2^(scale s):  m' = max(m, max_j s_j);  l' = l 2^(scale (m - m')) + sum_j
    2^(scale (s_j - m')).

    Returns ``(p, decay, m', l')`` with ``p = 2^(scale (s - m'))`` and ``decay = 2^(scale (m - m'))``, the factor for
    anything accumulated so far (Milakov and Gimelshein 2018). ``scale`` is positive. The difference is taken before it
    is scaled: it is exact where it matters.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a finite pivot: while all scores of a row are -inf, its maximum minus itself would be NaN
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2((row_max - pivot) * scale)
    p = tl.exp2((scores - pivot[:, None]) * scale)  # [M, N]
    return p, decay, new_max, row_sum * decay + tl.sum(p, 1)


@triton.jit
def exp2_minus_1(x):
    """2^x - 1 for x <= 0, with full relative precision near 0, where the difference would cancel."""
    y = x * 0.6931471805599453
    series = y * (1.0 + y * (1.0 / 2 + y * (1.0 / 6 + y * (1.0 / 24 + y * (1.0 / 120)))))
    return tl.where(y > -0.125, series, tl.exp2(x) - 1.0)


@triton.jit
def grouped_tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile of program ``pid`` when tiles are walked in groups of ``GROUP_M`` rows, so that operands stay in L2."""
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return first_m + within % rows, within // rows
