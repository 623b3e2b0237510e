"""Checks of other people's kernels: ``clipfast verify MODULE:CHECK``.

A :class:`KernelCheck` holds a function, its reference in plain PyTorch, and a function that makes its inputs. It
becomes an :class:`~clipfast.kernels.spec.OpSpec`, so that the function is held to the same rule as clipfast's ops.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ..io.text import meant
from ..kernels.dtypes import DTYPES, dtype_name
from ..kernels.spec import CUDA, DETERMINISM, EVERYWHERE, EXPANDED, Call, Case, Draw, Floor, OpSpec, Shape
from .ops import verify_case
from .report import FAIL, PASS, CheckResult
from .rule import in_double
from .stand_in import record_others, stand_in_gpu

# The names of the extremes, and the factor by which each multiplies the scaled inputs. Exponentials of values that are
# 32 times as large as usual overflow, and so does the sum of a row of their squares in float16. The squares of tiny
# values are far below any epsilon.
EXTREMES = {"large": 32.0, "tiny": 1e-4, "zeros": 0.0}
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Sizes(Shape):
    """The sizes of the inputs of a user's kernel, by names that its author chose."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def elements(self) -> int:
        """Return the product of all sizes, which no tensor of the reference is likely to exceed."""
        return math.prod(value for _, value in self.sizes)

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return the sizes of the kernel's inputs by name."""
        return dict(self.sizes)


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """A kernel of another project, with the reference, inputs and sizes by which ``clipfast verify`` checks it.

    Attributes:
        function: the function that launches the kernel. It takes tensors by name, and returns one or a tuple of them.
        reference: the same function in plain PyTorch. It computes in the dtype of its inputs, float64 included.
        inputs: ``inputs(draw, **sizes)`` returns the tensors by name; floating ones in float32, which are cast to each
            dtype. ``draw`` is a :class:`~clipfast.kernels.spec.Draw`, with methods ``normal``, ``unit`` and
            ``integers``.
        shapes: the sizes to check, such as ``{"rows": 5, "cols": 100}``; at the first, inputs also have odd layouts
            and extreme values. Sizes should be small, since a kernel may be interpreted.
        real: the sizes of real use, at which the kernel is compiled and its time is predicted; by default the last of
            ``shapes``. On a GPU, errors are checked at them too. On a CPU, PyTorch's ops between the kernels run at
            them. If no kernel is launched at these sizes, the last of ``shapes`` that launches one takes their place.
        dtypes: the dtypes that the kernel takes, or their names.
        extremes: the names of the extreme values that the kernel should take, of :data:`EXTREMES`.
        scaled: the inputs that have the extreme values; by default the first floating one.
        float32: the inputs that stay float32.
        gradients: whether gradients are checked; None checks them if the function's results require gradients.
        op: the registered PyTorch op, which ``torch.library.opcheck`` checks.
        floor: ``floor(itemsize, **sizes)`` returns the least work of a call, and of its backward if it has one.
        name: the name in the report.

    Raises:
        TypeError, ValueError: an attribute is not as described.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Mapping[str, Tensor]]
    shapes: Sequence[Mapping[str, int]]
    real: Mapping[str, int] | None = None
    dtypes: Sequence[Any] = tuple(DTYPES)
    extremes: Sequence[str] = tuple(EXTREMES)
    scaled: Sequence[str] = ()
    float32: Sequence[str] = ()
    gradients: bool | None = None
    op: Any = None
    floor: Callable[..., Floor] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("function", "reference", "inputs"):
            if not callable(getattr(self, name)):
                raise TypeError(f"KernelCheck: {name} must be a function, got {getattr(self, name)!r}")
        if not self.shapes:
            raise ValueError("KernelCheck: shapes is empty: give at least one, such as {'rows': 5, 'cols': 100}")
        for shape in (*self.shapes, *([self.real] if self.real is not None else [])):
            if not isinstance(shape, Mapping) or not all(isinstance(size, int) for size in shape.values()):
                raise TypeError(f"KernelCheck: a shape must be a dict of integers by name, got {shape!r}")
        for name in ("dtypes", "extremes", "scaled", "float32"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"KernelCheck: {name} must be a tuple of names, got {getattr(self, name)!r}")
        # Dtypes may be given as PyTorch's dtypes or by their long names; they are stored by clipfast's short names.
        short = {word: name for name, dtype in DTYPES.items() for word in (dtype, dtype_name(dtype))}
        object.__setattr__(self, "dtypes", tuple(short.get(word, word) for word in self.dtypes))
        for name, given, known in ("dtypes", self.dtypes, DTYPES), ("extremes", self.extremes, EXTREMES):
            for word in given:
                if word not in known:
                    near = meant(str(word), known)
                    raise ValueError(f"KernelCheck: {name} has {word!r}{near}; known: {', '.join(known)}")
        if not self.dtypes:
            raise ValueError(f"KernelCheck: dtypes is empty; known: {', '.join(DTYPES)}")

    def spec(self) -> OpSpec:
        """Return the specification of the kernel for the verification, as clipfast's own ops have one.

        Raises:
            TypeError, ValueError: the inputs or the reference are not as described.
        """
        for shape in self.shapes:
            self._check_reference(shape)
        self._floor_at(self.shapes[0], 4)
        with_gradients = self.has_gradients

        def make(shape: Any, values: str, draw: Draw) -> Call:
            """Make the inputs of the kernel and its upstream gradients, for the verification."""
            inputs = self.made(shape.to_dict(), draw)
            floating = [name for name, x in inputs.items() if x.is_floating_point()]
            for name in (self.scaled or floating[:1]) if values else ():
                inputs[name] = EXTREMES[values] * inputs[name]
            if not with_gradients:
                return Call(inputs)
            # Only the shapes of the results are needed, so the reference runs on the device "meta".
            results = _tuple(self.reference(**{name: x.to("meta") for name, x in inputs.items()}))
            return Call(inputs, tuple(draw.normal(*result.shape) for result in results))

        return OpSpec(
            named(self.function, self.name), named(self.reference, self.name), make, self._cases(with_gradients),
            small=(_sizes(self.shapes[0]),), category="", kernels=(), bench={}, items=("", ""),
            floor=lambda shape, itemsize, _: self._floor_at(shape.to_dict(), itemsize),
            float32=tuple(self.float32),
        )  # fmt: skip

    def _cases(self, with_gradients: bool) -> list[Case]:
        """Return the cases of the kernel that are checked."""
        first, *others = map(_sizes, self.shapes)
        cases = [Case(shape, "a size that was given", draws=DRAWS, quick=True) for shape in (first, *others)]
        if self.real is not None:
            cases.append(Case(_sizes(self.real), "the size of real use", frozenset({"cuda"})))
        # The gradient of sum() may be zero in exact arithmetic, as it is after a softmax.
        layouts = Case.layouts(first, expanded=first if with_gradients else None)
        cases += [dataclasses.replace(case, cancels=case.layout == EXPANDED) for case in layouts]
        cases.append(Case(first, "rows of a wider tensor", layout="padded"))
        for name in self.extremes:
            why = f"{EXTREMES[name]:g} times the usual values"
            cases.append(Case(first, why, values=name) if name == "zeros" else Case.extreme(first, name, why))
        return [*cases, Case(first, "the same call again", EVERYWHERE, DETERMINISM)]

    def made(self, sizes: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
        """Return the kernel's inputs at these sizes.

        Raises:
            TypeError, ValueError: ``inputs`` fails, or returns no tensors by name.
        """
        torch.manual_seed(0)  # for inputs that are drawn without ``draw``
        try:
            found = self.inputs(draw, **sizes)
        except Exception as error:
            raise ValueError(f"{self.name}: inputs(draw, {_words(sizes)}) raised {_text(error)}") from error
        if not isinstance(found, Mapping) or not found:
            raise TypeError(f"{self.name}: inputs must return a dict of tensors by name, got {type(found).__name__}")
        for name, x in found.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{self.name}: inputs returned {type(x).__name__} for {name!r}, which must be a tensor")
        for field in ("scaled", "float32"):
            for name in getattr(self, field):
                if name not in found:
                    raise ValueError(f"{self.name}: {field} names {name!r}; the inputs are {', '.join(found)}")
        return dict(found)

    def _floor_at(self, sizes: Mapping[str, Any], itemsize: int) -> Floor:
        """Return the least work of the kernel at these sizes; no work if its author gave none.

        Raises:
            TypeError, ValueError: ``floor`` fails, or returns no ``Floor``.
        """
        if self.floor is None:
            return Floor(0, 0)
        try:
            found = self.floor(itemsize, **sizes)
        except Exception as error:
            raise ValueError(f"{self.name}: floor(itemsize, {_words(sizes)}) raised {_text(error)}") from error
        if not isinstance(found, Floor):
            raise TypeError(f"{self.name}: floor must return a clipfast.kernels.spec.Floor, got {type(found).__name__}")
        return found

    def _check_reference(self, sizes: Mapping[str, Any]) -> None:
        """Call the kernel's reference in float64.

        Raises:
            TypeError, ValueError: it fails, or returns no tensors, or results in another dtype than its inputs.
        """
        inputs = in_double(self.made(sizes, Draw()))
        try:
            results = _tuple(self.reference(**inputs))
        except Exception as error:
            raise ValueError(f"{self.name}: the reference raised at {_words(sizes)}: {_text(error)}") from error
        for result in results:
            if not isinstance(result, Tensor):
                raise TypeError(f"{self.name}: the reference must return tensors, got {type(result).__name__}")
            if result.is_floating_point() and result.dtype != torch.float64:
                raise ValueError(
                    f"{self.name}: the reference returned {result.dtype} for inputs in torch.float64: it must compute "
                    "in the dtype of its inputs, since its result in float64 counts as exact"
                )

    @functools.cached_property
    def has_gradients(self) -> bool:
        """Return whether gradients of the kernel are checked: ``gradients``, or else whether its results require them.

        Raises:
            ValueError: the function fails.
        """
        if self.gradients is not None:
            return self.gradients
        inputs = self.call_inputs(DTYPES[self.dtypes[0]], "cpu")
        try:
            with stand_in_gpu(), record_others():
                results = _tuple(named(self.function, self.name)(**inputs))
        except Exception as error:
            place = f"{self.name}: the function raised at {_words(self.shapes[0])}"
            raise ValueError(f"{place}: {_text(error)}") from error
        return any(x.requires_grad for x in results)

    @property
    def registered(self) -> Any:
        """Return the registered PyTorch op of the kernel, or None."""
        kinds = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._library.custom_ops.CustomOpDef)
        return self.op if self.op is not None else self.function if isinstance(self.function, kinds) else None

    def call_inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Return inputs of the kernel at its first sizes that require gradients, unless the kernel has none."""
        needs_grad = self.gradients is not False
        return {
            name: x.to(device, torch.float32 if name in self.float32 else dtype).requires_grad_(needs_grad)
            if x.is_floating_point()
            else x.to(device)
            for name, x in self.made(self.shapes[0], Draw()).items()
        }


def _tuple(results: Any) -> tuple[Any, ...]:
    """Return the results of a user's function as a tuple."""
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def _sizes(shape: Mapping[str, int]) -> Sizes:
    """Return the sizes of a user's kernel as the shape of a case."""
    return Sizes(tuple(shape.items()))


def _words(sizes: Mapping[str, Any]) -> str:
    """Return the sizes of a user's kernel as text."""
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def _text(error: BaseException) -> str:
    """Return the type and the first line of an error in a user's code."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a user's function under the name that it has in the report; it returns a tensor or a tuple of them."""

    def call(**inputs: Any) -> Any:
        """Call a user's function, and refuse results that are no tensors."""
        results = _tuple(function(**inputs))
        for result in results:
            if not isinstance(result, Tensor):
                raise TypeError(f"the function must return a tensor or tensors in a tuple, got {type(result).__name__}")
        return results[0] if len(results) == 1 else results

    call.__name__ = name
    return call


REFUSALS = (AssertionError, NotImplementedError, TypeError, ValueError)


def verify_other(spec: OpSpec, leg: str, case: Case, dtype: str, *, quick: bool) -> list[CheckResult]:
    """Check one case of a user's kernel on a leg, and return a result for each output.

    A kernel may refuse inputs in an odd memory layout, and the interpreter lacks functions that some kernels call. Both
    are reported, and are no failure.
    """
    try:
        return verify_case(spec, leg, case, dtype, quick=quick)
    except InterpreterError as error:
        why = f"Triton's interpreter cannot run it: {_text(error)}"
        return [CheckResult(spec.name, leg, "leg", "interpreted kernels", dtype, reason=why)]
    except REFUSALS as error:
        if not case.layout:
            raise
        why = f"refused: {_text(error)}"
        return [CheckResult(spec.name, leg, case.check, case.name, dtype, reason=why, why=case.why)]


def check_op(check: KernelCheck, leg: str) -> list[CheckResult]:
    """Check the registration of a user's op by ``torch.library.opcheck``; return a result for each test."""
    dtype = check.dtypes[0]
    inputs = check.call_inputs(DTYPES[dtype], "cuda" if leg == CUDA else "cpu")
    template = CheckResult(check.name, leg, "opcheck", _words(check.shapes[0]), dtype_name(DTYPES[dtype]))
    found = torch.library.opcheck(check.registered, (), inputs, raise_exception=False)
    return [
        dataclasses.replace(
            template, output=test, verdict=PASS if result == "SUCCESS" else FAIL,
            reason=str(result).strip().partition("\n")[0],
        )
        for test, result in found.items()
    ]  # fmt: skip


def load(text: str) -> KernelCheck | OpSpec:
    """Return the check that ``MODULE:NAME`` names; MODULE is a module, or the path of a file that ends in .py.

    Raises:
        ValueError: there is no such module or name, or the module fails when it is imported.
        TypeError: the name is neither a :class:`KernelCheck` nor an OpSpec.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"{text!r}: give MODULE:NAME, such as my_kernels.checks:SOFTMAX or checks.py:SOFTMAX")
    module = _module(place)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if isinstance(value, KernelCheck | OpSpec)]
        raise ValueError(f"{place} has no {name!r}{meant(name, known)}; its checks: {', '.join(known) or 'none'}")
    found = getattr(module, name)
    if isinstance(found, KernelCheck):
        return dataclasses.replace(found, name=found.name or name)
    if isinstance(found, OpSpec):
        return found
    raise TypeError(f"{text} is {type(found).__name__}: it must be a clipfast.verify.KernelCheck or an OpSpec")


def _module(place: str) -> Any:
    """Import the module that holds a user's check, by its name or by the path of its file."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"there is no file {place}")
        return _of_file(path)
    except ValueError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise ValueError(f"there is no module {place!r}, neither installed nor in {folder}") from None
        raise ValueError(f"{place} cannot be imported: {_text(error)}") from error
    except BaseException as error:
        raise ValueError(f"{place} cannot be imported: {_text(error)}") from error


@functools.cache
def _of_file(path: Path) -> Any:
    """Import the file that holds a user's check, once."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
