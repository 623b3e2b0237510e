"""Predicted times, corrected by the error of the model of a GPU on published kernels of the same kind.

The predicted time of a kernel is divided by the median ratio of predicted to published time for its kind of kernel. For
the ends of the range, it is divided by the ratios between which four in five published times lie. The errors of the
kernels of an op or a step are taken to be one error, so the ends of their ranges are added. PyTorch's own ops take
rates that were published, and only its products in 8 bits are corrected.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from clipfast.io.units import SECONDS, scaled

from .validation import errors

# The kinds of published kernels whose errors are taken for the forward and the backward kernels of an op, by category.
KINDS = {
    "attention": ("attention forward", "attention backward"), "loss": ("loss", "loss"),
    "patch, text input": ("patch", "patch"), "norm, activation": ("norm forward", "norm backward"),
}  # fmt: skip
OTHERS = ("memory", "memory")
FP8_PRODUCT = "product in 8 bits"  # the kind of PyTorch's 8-bit matrix products
# Kernels of a loss that only multiply matrices, or only read and write memory, have these kinds instead.
KINDS_OF_KERNELS = {"_products_kernel": "product", "_strip_products_kernel": "product"} | dict.fromkeys(
    ("_normalize_kernel", "_totals_kernel", "_finish_kernel", "_scaled_kernel", "_through_norm_kernel"), "memory"
)


class Corrected(NamedTuple):
    """A predicted time after its correction, and the ends of its range, in seconds."""

    seconds: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = scaled(self.low, SECONDS), scaled(self.high, SECONDS)
        return f"{scaled(self.seconds, SECONDS)} ({low} to {high})"


def kind_of(kernel: str, category: str) -> str:
    """Return the kind of published kernels that comes closest to a kernel of an op of this category."""
    forward, backward = KINDS.get(category, OTHERS)
    return KINDS_OF_KERNELS.get(kernel, backward if "bwd" in kernel else forward)


def corrected(kernels: Iterable[tuple[str, float]], others: float) -> Corrected:
    """Correct the predicted seconds of kernels, each with its kind, and add those of PyTorch's ops."""
    seconds, low, high = others, others, others
    for kind, predicted in kernels:
        band = errors()[kind]
        seconds += predicted * math.exp(-band.middle)
        low += predicted * math.exp(-band.high)
        high += predicted * math.exp(-band.low)
    return Corrected(seconds, low, high)
