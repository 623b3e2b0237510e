"""The classes of an op's specification: everything that tools must know about the op, in one place next to it.

``SPECS`` is a tuple with an ``OpSpec`` for each op. It stands at the end of the file of a small op, and in ``spec.py``
of the folder of a larger op. :func:`specs` finds them all. The verification, the benchmarks, the tuner, the offline
compiler and the tests iterate over its result, and keep no list of ops.
"""

import dataclasses
import functools
import importlib
import itertools
import pkgutil
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .configs import Config
from .dtypes import accumulate_dtype
from .hardware import has_fp8

# A case runs on one or more "legs": the PyTorch code for CPUs, the Triton kernels in Triton's interpreter on a CPU
# (small cases only, since others would take minutes), and the Triton kernels on a GPU (sizes of real use).
CPU, INTERPRETER, CUDA = "cpu", "interpreter", "cuda"
LEGS = (CPU, INTERPRETER, CUDA)
EVERYWHERE, NOT_INTERPRETED = frozenset(LEGS), frozenset((CPU, CUDA))
# The check of a case. ACCURACY holds errors to the rule in clipfast/verify/rule.py, EXTREME demands finite results as
# well, and DETERMINISM demands the same bits from repeated calls.
ACCURACY, EXTREME, DETERMINISM = "accuracy", "extreme", "determinism"
# The memory layout of a case whose upstream gradient has a stride of 0. The upstream gradient of a loss is a scalar, so
# the first input of a loss has that stride instead.
EXPANDED = "expanded"


def on(*legs: str) -> frozenset[str]:
    """Return the set of legs (CPU, interpreter, GPU) on which a case of an op runs."""
    return frozenset(legs)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of an op's inputs. Each op has a subclass with a field for each size."""

    @property
    def elements(self) -> int:
        """Return the number of elements of the largest tensor that the reference makes."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return the sizes of an op's shape by name, without those that equal their default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def changed(self, **sizes: Any) -> Self:
        """Return a copy of an op's shape in which ``sizes`` are replaced."""
        return dataclasses.replace(self, **sizes)

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in self.to_dict().items()
        )


@dataclasses.dataclass(frozen=True)
class RowShape(Shape):
    """The sizes of a matrix [rows, width], for ops that work row by row."""

    rows: int
    width: int

    @property
    def elements(self) -> int:
        """Return the number of elements of all rows of an op's input."""
        return self.rows * self.width


class Draw:
    """A source of random inputs: one seed gives the same numbers on every machine.

    Args:
        seed: the seed of the generator.
        device: the device on which tensors are made. A GPU draws other numbers from a seed than a CPU does.
        empty: make tensors of the right shape and dtype without drawing values. They are for calls whose launches are
            recorded, not run.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu", *, empty: bool = False) -> None:
        self.device, self.empty = torch.device(device), empty
        self._generator = None if empty else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """Draw an op's input from the standard normal distribution, float32."""
        if self.empty:
            return torch.empty(size, device=self.device)
        return torch.randn(size, generator=self._generator, device=self.device)

    def unit(self, *size: int) -> Tensor:
        """Draw rows of unit length for an op's input, float32."""
        x = self.normal(*size)
        return x if self.empty else F.normalize(x, dim=-1)

    def integers(self, low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Draw integers of at least ``low`` and less than ``high`` for an op's input."""
        if self.empty:
            return torch.full(size, low, dtype=dtype, device=self.device)
        return torch.randint(low, high, size, generator=self._generator, device=self.device, dtype=dtype)

    def subsets(self, rows: int, count: int, size: int) -> Tensor:
        """Draw indices for an op: ``size`` different numbers of ``range(count)``, in random order, for each row."""
        if self.empty:
            return torch.arange(size, device=self.device).expand(rows, size)
        return torch.rand(rows, count, generator=self._generator, device=self.device).argsort(1)[:, :size]


MEAN_LENGTH = 18  # tokens that a caption of a web image has on average
UNUSED = 5  # tokens after the last of packed sequences, which belong to no sequence


def lengths_of(batch: int, most: int) -> list[int]:
    """Return the lengths of ``batch`` packed sequences: ``most``, 1, 0, then geometrically distributed ones."""
    draw = random.Random(most)
    others = (3 + int(draw.expovariate(1 / (MEAN_LENGTH - 3))) for _ in range(batch))
    return [most, 1, 0, *(min(length, most) for length in others)][:batch]


def cu_seqlens_of(lengths: Sequence[int], draw: Draw) -> Tensor:
    """Return the cumulative lengths of sequences, int32 [B + 1], on the device of the other inputs of a case."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=draw.device)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of an op.

    Attributes:
        inputs: tensors by the name of their argument; floating ones in float32.
        grads: the upstream gradient of each result, float32 (a scalar for a scalar result); empty for an op without
            gradients.
        options: the arguments that are not tensors.
    """

    inputs: dict[str, Tensor]
    grads: tuple[Tensor, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least work of a pass: floating-point operations (a multiply-add is two) and bytes of device memory.

    Each input is read once and each output is written once. Scratch memory is not counted, since a better kernel needs
    less of it. No implementation can take less time than :meth:`seconds` returns. The excess of a measured time over it
    is the most that a faster implementation can save.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the shortest possible time of an op: the longer of operations and bytes at these rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape in one memory layout with one kind of values, and the reason why it is checked.

    Attributes:
        shape: sizes of the inputs.
        why: the reason why it is checked.
        legs: the legs that it runs on.
        check: ``ACCURACY``, ``EXTREME`` or ``DETERMINISM``.
        layout: the memory layout of the inputs; empty if they are contiguous.
        values: the kind of values to draw, by a name that the op's ``make`` knows; empty for the usual kind.
        draws: how many independent draws of the inputs are judged together.
        quick: whether it is part of the quick run.
        slow: names of dtypes that a CPU computes too slowly at this size, so that the CPU leg leaves them out.
        cancels: whether exact gradients are zero because their terms cancel. Fused attention, PyTorch's included,
            computes the sum of P * dP as that of dO * O. The two are equal, but their rounding errors differ, and the
            second cancels less well. The yardstick is then the larger error of PyTorch's eager and fused attention.
            Other people's functions have no fused yardstick: where the truth is zero, a few units in the last place of
            what the gradient is for a random upstream gradient are allowed.
        sanitize: whether the sanitizer ttsem (bounds, races, bfloat16) runs it too. Such a case must be small, since
            ttsem checks every access for races only if there are at most 4 million.
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
    sanitize: bool = False

    @classmethod
    def extreme(cls, shape: Shape, values: str, why: str, **options: Any) -> "Case":
        """Return an ``EXTREME`` case: its results must be finite, besides being accurate."""
        return cls(shape, why, check=EXTREME, values=values, **options)

    @classmethod
    def in_use(cls, shape: Shape, small: Shape, why: str, **options: Any) -> list["Case"]:
        """Return a case at a size of real use for CPUs and GPUs, and one at a smaller size for the interpreter."""
        return [cls(shape, why, NOT_INTERPRETED, **options), cls(small, f"{why}, smaller", on(INTERPRETER), **options)]

    @classmethod
    def layouts(cls, shape: Shape, *, expanded: Shape | None = None, quick: bool = True) -> list["Case"]:
        """Return a case for each memory layout that ops take, and one at ``expanded`` with a gradient of stride 0."""
        cases = [
            cls(shape, "first axis contiguous", layout="transposed"),
            cls(shape, "every second element of a wider tensor", layout="sliced", quick=quick),
            cls(shape, "one element past an aligned address", layout="offset"),
        ]
        if expanded is not None:
            cases.append(cls(expanded, "a gradient of stride 0, as loss.sum() sends", layout=EXPANDED))
        return cases

    @classmethod
    def repeats(cls, on_cpu: Shape, on_cuda: Shape, values: str = "") -> list["Case"]:
        """Return ``DETERMINISM`` cases: their results must have the same bits in every run."""
        return [
            cls(on_cpu, "several tiles, two threads", on(CPU), DETERMINISM, values=values, quick=True),
            cls(on_cuda, "more programs than the GPU holds at once", on(CUDA), DETERMINISM, values=values),
        ]

    @property
    def name(self) -> str:
        """Return the name of an op's case: shape, layout and values in one line."""
        return ", ".join(part for part in (str(self.shape), self.layout, self.values) if part)


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A call at the sizes of a published model. The offline compiler compiles the kernels that it launches.

    Attributes:
        label: the sizes, as the name of the compiled case spells them.
        shape: sizes of the inputs.
        dtypes: names of the dtypes that it is compiled for.
        autocast: whether the inputs are float32 and the op runs under autocast to the dtype.
        casts: the names of dtypes, by input, of the inputs that do not have the dtype of the call.
        small_tiles: whether no tile has the 64 rows that the matrix units of sm_90 and sm_100 need.
        tf32_by_triton_36: whether Triton 3.6 multiplies float32 in TF32 on sm_100, although the kernel asks for full
            precision. It does so for bytes that were widened to float32, because TF32 holds them exactly.
    """

    label: str
    shape: Shape
    dtypes: tuple[str, ...] = ("bf16",)
    autocast: bool = False
    casts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    small_tiles: bool = False
    tf32_by_triton_36: bool = False


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A kernel whose launch configurations stand in the tables (``tuned/*.json``).

    Attributes:
        kernel: its name in the tables.
        function: name of the Triton function; empty if all launches of the op depend on the configuration.
        kind: class of its configurations.
        axes: the values to search for some fields, if they are not the tuner's usual ones.
        per_width: whether the tables have separate entries for separate widths of rows.
        any_length: whether its entries in the tables serve sequences of any number of keys.
        small_tiles: whether its tiles have too few rows for the largest matrix units.
    """

    kernel: str
    function: str
    kind: type[Config]
    axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    per_width: bool = False
    any_length: bool = False
    small_tiles: bool = False

    @classmethod
    def named(cls, kind: type[Config], *kernels: str, **options: Any) -> tuple["Tunable", ...]:
        """Return kernels whose Triton functions are called ``_<kernel>_kernel``, by their names in the tables."""
        return tuple(cls(kernel, f"_{kernel}_kernel", kind, **options) for kernel in kernels)


@dataclasses.dataclass(frozen=True)
class Target:
    """Kernels that are tuned at one representative shape, one after another, the most important first."""

    name: str
    shape: Shape
    kernels: tuple[Tunable, ...]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """All that tools must know about an op.

    Attributes:
        op: the public function. Its tensor arguments are passed by name.
        reference: the same function in plain PyTorch.
        make: makes the arguments for a shape, a kind of values and a source of random numbers.
        cases: the cases that are checked, each with its reason.
        small: one small shape for each way in which the op can be called. Registration, compilation, autocast and
            gradients are checked at these.
        category: the one of :mod:`clipfast.bench.categories` that the op's time counts towards in a breakdown.
        suite: the name of its benchmarks, by default that of the op.
        torch_op: the prefix of the names of its registered PyTorch ops, by default the name of the op.
        kernels: names of its Triton functions.
        floor: ``floor(shape, itemsize, backward)`` returns the least work of the forward or the backward pass, for
            operands of ``itemsize`` bytes per element.
        bench: shapes to measure on a "cpu" and on a "cuda" device, the most telling first, since a run may be stopped.
        bench_values: the kind of values to measure with.
        items: the unit of a throughput: the name of a size, and the noun for it, as in ("batch", "texts").
        gate: smaller sizes, by type of device, at which a benchmark compares the op with the reference if the reference
            does not fit into memory at the shapes that are measured.
        frozen: inputs for which benchmarks compute no gradient.
        float32: inputs that stay float32 when the others have 16 bits, as parameters do under autocast.
        follows_autocast: whether autocast decides the dtype of the result.
        shipped: calls that the offline compiler compiles.
        targets: the kernels and shapes that the tuner tunes.
        small_tiles: overrides configurations so that a small case has several tiles or blocks.
        timed: the op alone, for benchmarks and predictions, if ``op`` also converts its results for comparisons.
        needs_fp8: whether its kernels need a GPU that has numbers of 8 bits (``hardware.has_fp8``).
        fused: PyTorch's fused implementation, which is a second yardstick for cases that cancel.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[Any, str, Draw], Call]
    cases: Sequence[Case]
    small: tuple[Shape, ...]
    category: str
    kernels: tuple[str, ...]
    floor: Callable[[Any, int, bool], Floor]
    bench: Mapping[str, tuple[Shape, ...]]
    items: tuple[str, str]
    suite: str = ""
    torch_op: str = ""
    bench_values: str = ""
    gate: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    follows_autocast: bool = True
    shipped: tuple[Shipped, ...] = ()
    targets: tuple[Target, ...] = ()
    small_tiles: Callable[[torch.dtype], AbstractContextManager[object]] = lambda _: nullcontext()
    fused: Callable[..., Any] | None = None
    timed: Callable[..., Any] | None = None
    needs_fp8: bool = False

    @property
    def name(self) -> str:
        """Return the name of the op's public function."""
        return self.op.__name__

    @property
    def measured(self) -> Callable[..., Any]:
        """Return the op as benchmarks and predictions call it."""
        return self.timed or self.op

    def compiles_for(self, arch: int) -> bool:
        """Return whether the op's kernels compile for an architecture."""
        return has_fp8(arch) or not self.needs_fp8

    @property
    def suite_name(self) -> str:
        """Return the name of the op's benchmarks."""
        return self.suite or self.name

    def call(self, shape: Shape, values: str, draw: Draw, dtype: torch.dtype) -> Call:
        """Make the op's arguments at a shape, with floating tensors in ``dtype`` except those that stay float32."""
        made = self.make(shape, values, draw)
        wide = accumulate_dtype(dtype)

        def cast(x: Tensor, wanted: torch.dtype) -> Tensor:
            """Return a tensor for the op in the wanted dtype. Memory without values is not copied: it may be large."""
            return torch.empty_like(x, dtype=wanted) if draw.empty and x.dtype != wanted else x.to(wanted)

        inputs = {
            name: cast(x, wide if name in self.float32 else dtype) if x.is_floating_point() else x
            for name, x in made.inputs.items()
        }
        grads = tuple(cast(grad, dtype if grad.ndim else wide) for grad in made.grads)
        return dataclasses.replace(made, inputs=inputs, grads=grads)


@functools.cache
def specs() -> dict[str, OpSpec]:
    """Return the specification of every op, by the name of the op."""
    package = importlib.import_module(__package__ or "clipfast.kernels")
    found: list[OpSpec] = []
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.ispkg:
            found += getattr(importlib.import_module(info.name), "SPECS", ())
    return {spec.name: spec for spec in found}
