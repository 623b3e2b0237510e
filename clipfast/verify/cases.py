"""What a case of the verification is: a shape with a reason, and the legs that it runs on.

A case runs on the legs that it names: ``CPU`` (the PyTorch paths), ``INTERPRETER`` (the Triton kernels, interpreted:
small, or it would take minutes) and ``CUDA`` (the Triton kernels, natively: as large as in use).
"""

import dataclasses
from typing import Protocol

CPU, INTERPRETER, CUDA = "cpu", "interpreter", "cuda"
LEGS = (CPU, INTERPRETER, CUDA)
EVERYWHERE, NOT_INTERPRETED = frozenset(LEGS), frozenset((CPU, CUDA))
ACCURACY, EXTREME, DETERMINISM = "accuracy", "extreme", "determinism"
EXPANDED = "expanded"


class Shape(Protocol):
    """Sizes of an op's inputs; its text is part of the case's name."""

    @property
    def elements(self) -> int:
        """Size of the reference's largest tensor."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape in one memory layout with one kind of values.

    ``draws`` independent draws are judged as one. ``slow`` are dtypes that a CPU computes too slowly at this size.
    ``cancels`` says that exact gradients are zero because terms cancel. Fused attention, PyTorch's too, takes the sum
    of dO * O for that of P * dP, which is the same number with another rounding error, and so cancels less well than
    the eager one: there PyTorch's error is the larger of its eager and its fused attention.
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


def on(*legs: str) -> frozenset[str]:
    """These legs and no others."""
    return frozenset(legs)
