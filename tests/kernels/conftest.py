"""Helpers of the kernel tests: the legs that each test runs on, calls of every op, odd layouts, and the sanitizer.

A test requests one of these fixtures, which decides the legs that it runs on. So no test does the same work on two
legs:

    device          on every leg: on a CPU, on a GPU, and interpreted
    native          on a CPU and on a GPU
    triton_device   interpreted and on a GPU, where Triton kernels run
    interpreted     interpreted only
    gpu             on a GPU only
    none of these   on a CPU only; the test launches no kernel
"""

import dataclasses
import functools
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

from clipfast.kernels import configs
from clipfast.kernels.contrastive import small_batch
from clipfast.kernels.launch import execute_on_cpu
from clipfast.kernels.spec import Draw, OpSpec, Shape, specs
from clipfast.verify.context import speed_up_interpreter
from clipfast.verify.rule import in_double, value_and_grads
from clipfast.verify.sanitizer import lacks, sanitizer_session

from ..conftest import LEG, ON_GPU

LEGS = {
    "interpreted": ("interpreter",),
    "gpu": ("gpu",),
    "triton_device": ("interpreter", "gpu"),
    "native": ("cpu", "gpu"),
    "device": ("cpu", "gpu", "interpreter"),
}
speed_up_interpreter()
MAP_NORESERVE = 0x4000  # a flag of mmap(2) on Linux, which Python's module mmap has only since 3.13
needs_sanitizer = pytest.mark.skipif(bool(lacks()), reason=lacks())
# By name: the specification and a small shape for each way in which an op can be called.
CALLS: dict[str, tuple[OpSpec, Shape]] = {
    f"{name} {shape}": (spec, shape) for name, spec in specs().items() for shape in spec.small
}
DIFFERENTIABLE = [name for name, (spec, shape) in CALLS.items() if spec.make(shape, "", Draw(empty=True)).grads]
each_call = pytest.mark.parametrize("name", CALLS)
each_gradient = pytest.mark.parametrize("name", DIFFERENTIABLE)


def runs_here(item: pytest.Item) -> bool:
    """Return whether a test of the kernels runs on the leg of this process: CPU, interpreter or GPU."""
    if not item.path.is_relative_to(Path(__file__).parent):
        return True
    asked = next((legs for name, legs in LEGS.items() if name in item.fixturenames), ("cpu",))
    return LEG in asked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the kernels that run on other legs (CPU, interpreter, GPU) than this process."""
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = filter(runs_here, items)


interpreted, gpu, triton_device, native = (
    pytest.fixture(name=name)(lambda: torch.device("cuda" if ON_GPU else "cpu"))
    for name in ("interpreted", "gpu", "triton_device", "native")
)


class OpCall(NamedTuple):
    """A call of an op: the op and its reference as functions of named tensors, the tensors, and upstream gradients."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, Tensor]
    grads: tuple[Tensor, ...]

    def results(self, **changed: Tensor) -> dict[str, Tensor]:
        """Return results and gradients of the op, with the ``changed`` inputs in place of its own."""
        return value_and_grads(self.op, self.inputs | changed, self.grads)

    def truth(self) -> dict[str, Tensor]:
        """Return results and gradients of the reference in float64."""
        return value_and_grads(self.reference, in_double(self.inputs), self.grads)

    def backward(self, results: Any, **options: Any) -> None:
        """Run the backward pass from the op's results with the upstream gradients, if the op has gradients."""
        if self.grads:
            values = tuple_of(results)
            grads = [grad.to(value) for grad, value in zip(self.grads, values, strict=True)]
            torch.autograd.backward(values, grads, **options)


def call_at(
    op: str, shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> OpCall:
    """Return a call of an op at any shape; ``options`` are arguments in addition to those of the shape."""
    spec = specs()[op]
    call = spec.call(shape, "", Draw(), dtype)
    functions = (functools.partial(function, **call.options, **options) for function in (spec.op, spec.reference))
    inputs = {name: x.to(device) for name, x in call.inputs.items()}
    return OpCall(*functions, inputs, tuple(grad.to(device) for grad in call.grads))


def call_of(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, scale: int = 1
) -> OpCall:
    """Return a call of an op at its small shape, with its first size (the batch) multiplied by ``scale``."""
    spec, shape = CALLS[name]
    first = dataclasses.fields(shape)[0].name
    return call_at(spec.name, shape.changed(**{first: scale * getattr(shape, first)}), device, dtype)


def leaves_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an op's inputs as leaves of a graph; the floating ones require gradients."""
    return {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    """Return an op's results as a tuple, even if there is only one."""
    return results if isinstance(results, tuple) else (results,)


class Recorded(TorchDispatchMode):
    """A dispatch mode that records all calls of PyTorch's ops and ours as (op, arguments, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, result))
        return result


@pytest.fixture(autouse=True)
def own_plans() -> Iterator[None]:
    """Forget planned launches before and after each test, since a test may plan them for another architecture."""
    configs.forget_plans()
    yield
    configs.forget_plans()


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU path of the contrastive loss compute small batches in blocks, as it computes large ones.

    ``TestWhole`` in test_contrastive.py checks the path that computes all logits of a small batch at once.
    """
    monkeypatch.setattr(small_batch, "MOST_LOGITS", 0)


@pytest.fixture
def moved(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which Triton's interpreter appends the number of bytes of each load and store."""
    sizes: list[int] = []

    def counting(name: str, mask_at: int) -> None:
        """Let the interpreter's function ``name`` count the bytes it moves; argument ``mask_at`` is its mask."""
        original = getattr(InterpreterBuilder, name)

        def run(self: Any, ptrs: Any, *args: Any) -> Any:
            """Record the bytes of a load or a store of an interpreted kernel, and carry it out."""
            sizes.append(int(args[mask_at].data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8)
            return original(self, ptrs, *args)

        monkeypatch.setattr(InterpreterBuilder, name, run)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    return sizes


def far_apart(x: Tensor, axis: int) -> Tensor:
    """Return a copy of an op's input whose elements along ``axis`` lie so far apart that offsets exceed 2^31.

    The stride fits into 32 bits if possible. The memory between the values is zero, and only touched pages exist. If a
    kernel's offset wraps at 32 bits, it reads one of these zeros.
    """
    stride = 2**31 // max(1, x.shape[axis] - 1) + 16
    rest = iter(torch.empty(x.shape[:axis] + x.shape[axis + 1 :], device="meta").stride())
    strides = [stride if i == axis else next(rest) for i in range(x.ndim)]
    # With this flag, the system reserves no memory for pages that are never touched.
    zeros = mmap.mmap(-1, (2**33 + 2**20) * x.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(zeros, dtype=x.dtype).as_strided(x.shape, strides, 2**32).copy_(x)


@pytest.fixture
def sanitizer() -> Iterator[Any]:
    """Let the sanitizer ttsem execute and check every launch of a kernel in the test; a fault raises an error."""
    with sanitizer_session() as session, execute_on_cpu():
        yield session
        assert session.launches > 0, "nothing was launched"
        assert session.races_unchecked == 0, "a launch was too large for the race check: shrink the case"
