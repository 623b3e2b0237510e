"""The specification of an op: all that tools must know about it, in one place beside the op.

An op of one file has its ``SPECS`` at the end, an op's folder has them in ``spec.py``: a tuple of ``OpSpec``, one for
each op. :func:`specs` finds them all. The verification, the benchmarks, the tuner, the offline compiler and the tests
iterate over what it returns, and keep no list of ops.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .configs import Config
from .dtypes import accumulate_dtype

# The legs that a case can run on: the PyTorch paths of a CPU, the Triton kernels interpreted on a CPU (small cases, or
# it would take minutes), and the Triton kernels on a GPU (sizes of real use).
CPU, INTERPRETER, CUDA = "cpu", "interpreter", "cuda"
LEGS = (CPU, INTERPRETER, CUDA)
EVERYWHERE, NOT_INTERPRETED = frozenset(LEGS), frozenset((CPU, CUDA))
# The checks: errors are held to the rule; results must be finite as well; repeats must give the same bits.
ACCURACY, EXTREME, DETERMINISM = "accuracy", "extreme", "determinism"
# The memory layout of a case whose gradient (of a loss: whose first input) has a stride of 0.
EXPANDED = "expanded"


def on(*legs: str) -> frozenset[str]:
    """Return the set of these legs."""
    return frozenset(legs)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of an op's inputs. Each op derives its own; fields that are not given have the usual value."""

    @property
    def elements(self) -> int:
        """The number of elements of the largest tensor that the reference makes."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return the sizes by name, without those that have their usual value."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def changed(self, **sizes: Any) -> Self:
        """Return the shape with other values of some sizes."""
        return dataclasses.replace(self, **sizes)

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in self.to_dict().items()
        )


@dataclasses.dataclass(frozen=True)
class RowShape(Shape):
    """Rows [rows, width]."""

    rows: int
    width: int

    @property
    def elements(self) -> int:
        """The number of elements of all rows."""
        return self.rows * self.width


class Draw:
    """Random inputs from one seed, the same on every machine; or memory without values, for a call that only records.

    Args:
        seed: of the generator.
        device: where the tensors are made. Numbers that are drawn on a GPU are others than those of a CPU.
        empty: make tensors of the right shape and dtype whose values nobody reads.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu", *, empty: bool = False) -> None:
        self.device, self.empty = torch.device(device), empty
        self._generator = None if empty else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """Draw from the standard normal distribution, float32."""
        if self.empty:
            return torch.empty(size, device=self.device)
        return torch.randn(size, generator=self._generator, device=self.device)

    def unit(self, *size: int) -> Tensor:
        """Draw rows of unit length, float32."""
        x = self.normal(*size)
        return x if self.empty else F.normalize(x, dim=-1)

    def integers(self, low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Draw integers of at least ``low`` and less than ``high``."""
        if self.empty:
            return torch.full(size, low, dtype=dtype, device=self.device)
        return torch.randint(low, high, size, generator=self._generator, device=self.device, dtype=dtype)

    def subsets(self, rows: int, count: int, size: int) -> Tensor:
        """Draw for each of ``rows`` rows ``size`` different numbers of ``range(count)``, in any order."""
        if self.empty:
            return torch.arange(size, device=self.device).expand(rows, size)
        return torch.rand(rows, count, generator=self._generator, device=self.device).argsort(1)[:, :size]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of an op.

    Attributes:
        inputs: tensors by the name of their argument; floating ones in float32.
        grads: a gradient for each result, float32; none for an op without gradients. That of a scalar is a scalar.
        options: arguments that are no tensors.
    """

    inputs: dict[str, Tensor]
    grads: tuple[Tensor, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least work of a pass: floating-point operations (a multiply-add is two) and bytes of device memory.

    Each input is read once and each output is written once. Scratch memory is not counted, since a better kernel needs
    less of it. No version runs faster than the larger of operations over the rate of the matrix units and bytes over
    the rate of the memory, so a measured time beyond that is what is left to gain.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the shortest time on a machine of these rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape in one memory layout with one kind of values, and the reason why it is checked.

    Attributes:
        shape: sizes of the inputs.
        why: the reason.
        legs: where it runs.
        check: ``ACCURACY``, ``EXTREME`` or ``DETERMINISM``.
        layout: memory layout of the inputs, or contiguous.
        values: a kind of values that the op's ``make`` knows, or the usual ones.
        draws: how many independent draws are judged as one.
        quick: whether it is part of the quick run.
        slow: names of dtypes that a CPU computes too slowly at this size.
        cancels: whether exact gradients are zero because terms cancel. Fused attention, PyTorch's too, takes the sum of
            dO * O for that of P * dP. It is the same number with another rounding error, and so it cancels less well
            than the eager one: there PyTorch's error is the larger one of its eager and its fused attention.
        sanitize: whether the sanitizer (bounds, races, bfloat16) runs it too. It must be small: ttsem checks every
            access for races only up to 4 million of them.
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
        """Return a case whose results must be finite as well."""
        return cls(shape, why, check=EXTREME, values=values, **options)

    @classmethod
    def in_use(cls, shape: Shape, small: Shape, why: str, **options: Any) -> list["Case"]:
        """Return the case of a size of real use, and that of a smaller size for the interpreter."""
        return [cls(shape, why, NOT_INTERPRETED, **options), cls(small, f"{why}, smaller", on(INTERPRETER), **options)]

    @classmethod
    def layouts(cls, shape: Shape, *, expanded: Shape | None = None, quick: bool = True) -> list["Case"]:
        """Return a shape in the memory layouts that every op takes, and ``expanded`` with a gradient of stride 0."""
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
        """Return the cases that must give the same bits in every run."""
        return [
            cls(on_cpu, "several tiles, two threads", on(CPU), DETERMINISM, values=values, quick=True),
            cls(on_cuda, "more programs than the GPU holds at once", on(CUDA), DETERMINISM, values=values),
        ]

    @property
    def name(self) -> str:
        """Shape, layout and values in one line."""
        return ", ".join(part for part in (str(self.shape), self.layout, self.values) if part)


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A call at the sizes of a published model: the offline compiler compiles what it launches.

    Attributes:
        label: sizes as they stand in the name of the compiled case.
        shape: sizes of the inputs.
        dtypes: names of the dtypes that it is compiled for.
        autocast: inputs are float32, and the op runs under autocast in the dtype.
        casts: inputs that have another dtype, by name.
        small_tiles: no tile has the 64 rows that the matrix units of sm_90 and sm_100 want.
        tf32_by_triton_36: Triton 3.6 takes bytes that are widened to float32 for a type that TF32 holds, and on sm_100
            it then multiplies float32 in TF32 although full precision is asked for.
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
    """A kernel that has configurations in the tables.

    Attributes:
        kernel: its name in the tables.
        function: name of the Triton function.
        kind: class of its configurations.
        axes: values to search for some fields, in place of the tuner's usual ones.
        per_width: whether it has entries by the width of its rows.
        small_tiles: whether its tiles have too few rows for the largest matrix units.
    """

    kernel: str
    function: str
    kind: type[Config]
    axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    per_width: bool = False
    small_tiles: bool = False

    @classmethod
    def named(cls, kind: type[Config], *kernels: str, **options: Any) -> tuple["Tunable", ...]:
        """Return kernels whose Triton functions have their names in the tables, as ``_<kernel>_kernel``."""
        return tuple(cls(kernel, f"_{kernel}_kernel", kind, **options) for kernel in kernels)


@dataclasses.dataclass(frozen=True)
class Target:
    """Kernels that are tuned together at the shape that stands for their use, in the order of their worth."""

    name: str
    shape: Shape
    kernels: tuple[Tunable, ...]


def no_overrides(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Leave the committed configurations as they are."""
    return nullcontext()


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """All that tools must know about an op.

    Attributes:
        op: the public function. Its tensor arguments are called by name.
        reference: the same function in plain PyTorch.
        make: makes the arguments for a shape, a kind of values and a source of random numbers.
        cases: what is checked, and why.
        small: one small shape for each way in which the op can be called: for the checks of registration, compilation,
            autocast and gradients.
        category: what the op's time counts as in a breakdown, of :mod:`clipfast.bench.categories`.
        suite: the name of its benchmarks, by default that of the op.
        torch_op: what the names of its registered PyTorch ops start with, by default the name of the op.
        kernels: names of its Triton functions.
        floor: the least work of the forward (False) or of the backward pass (True) at a shape, for operands of so many
            bytes.
        bench: shapes to measure on a "cpu" and on a "cuda" device, the most telling first, since a run may be stopped.
        bench_values: the kind of values to measure with.
        items: the size that says how many things one call handles, and what they are called, for a throughput.
        gate: sizes to replace, by type of device, where the reference does not fit at the shapes that are measured.
        frozen: inputs whose gradient no benchmark takes.
        float32: inputs that stay float32 when the others have 16 bits, as parameters do under autocast.
        follows_autocast: whether autocast decides the dtype of the result.
        shipped: calls that the offline compiler compiles.
        targets: what the tuner tunes.
        small_tiles: overrides configurations so that a small case has several tiles or blocks.
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
    small_tiles: Callable[[torch.dtype], AbstractContextManager[object]] = no_overrides
    fused: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name of the public function."""
        return self.op.__name__

    @property
    def suite_name(self) -> str:
        """The name of its benchmarks."""
        return self.suite or self.name

    def call(self, shape: Shape, values: str, draw: Draw, dtype: torch.dtype) -> Call:
        """Make the arguments at a shape, with floating tensors in ``dtype`` where they do not stay float32."""
        made = self.make(shape, values, draw)
        wide = accumulate_dtype(dtype)
        inputs = {
            name: x.to(wide if name in self.float32 else dtype) if x.is_floating_point() else x
            for name, x in made.inputs.items()
        }
        grads = tuple(grad.to(dtype if grad.ndim else wide) for grad in made.grads)
        return dataclasses.replace(made, inputs=inputs, grads=grads)


@functools.cache
def specs() -> dict[str, OpSpec]:
    """Find the specification of every op, by the name of the op."""
    package = importlib.import_module(__package__ or "clipfast.kernels")
    found: list[OpSpec] = []
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not info.ispkg:
            found += getattr(importlib.import_module(info.name), "SPECS", ())
    return {spec.name: spec for spec in found}
