"""The choice of the implementation of an op (the registered op or the PyTorch reference), and its registration."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .launch import triton_runs_on

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "torch")
COMPUTED_ON = ("cuda", "cpu", "meta")
# The classes of tensors that hide nothing: fake tensors and distributed tensors have others.
PLAIN = (Tensor, torch.nn.Parameter)
# The key of ``is_grads_batched``, which vectorises a backward pass without a transform of ``torch.func``.
LEGACY_VMAP = torch._C._dispatch_key_parse("VmapMode")
# PyTorch's ops within an implementation skip these steps of its dispatcher.
NOT_INSIDE = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)),
    (
        "AutogradFunctionality",
        "AutogradOther",
        "AutogradNestedTensor",
        "ADInplaceOrView",
        "AutocastCPU",
        "AutocastCUDA",
    ),
    torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
)


def uses_reference(op: str, backend: str, tensor: Tensor) -> bool:
    """Decide what ``backend`` means for ``tensor``: True for the PyTorch reference, False for the registered op.

    A registered op has a first derivative in reverse mode, and no rule for the transforms of ``torch.func``. PyTorch
    would silently take its forward-mode derivative to be zero. Therefore, under a transform, "auto" means the
    reference, and a warning says so.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``backend="triton"`` where Triton cannot run, or under a transform.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not triton_runs_on(tensor.device):
        raise RuntimeError(
            f"{op}: backend='triton' cannot run on a {tensor.device.type} tensor: "
            "move it to a GPU, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
    if backend == "torch" or tensor.device.type not in COMPUTED_ON:
        return True
    if not _is_transformed():
        return False
    if backend == "triton":
        raise RuntimeError(f"{op}: backend='triton' has no forward-mode derivative and no torch.func transform")
    if not torch.compiler.is_compiling():  # torch.compile cannot trace a warning
        warnings.warn(
            f"{op}: torch.func and forward-mode derivatives take the PyTorch reference, which needs more memory",
            stacklevel=3,
        )
    return True


def _is_transformed() -> bool:
    """Return True within a transform of ``torch.func``, and where forward-mode derivatives are computed."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile may take the result as a constant, since it compiles again under another transform. The attribute is
# explained at ``_least_keys_of_sdpa`` in attention/op.py.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Op:
    """An op of PyTorch, ``clipfast::<name>``, on CPUs and GPUs, with a short way for eager calls.

    PyTorch's way to a registered op written in Python takes the host longer than a small kernel runs. So an eager call
    goes through an ``autograd.Function``, or straight to the implementation if no gradient is needed. The registered op
    is called wherever something watches: a compiler, a transform, a mode, a profiler, a tracer, or a tensor of another
    class than PyTorch's own, or one whose memory does not hold its values. Both ways run the same implementation,
    without autocast and below autograd.

    A call of an op's derivative raises an error until it registers one. The backward ops register none, so a second
    derivative raises this error.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run, self._name = run, name

        @functools.wraps(run)
        def implementation(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
                return self.run(*args, **kwargs)

        devices = ("cuda", "cpu")
        self._op = torch.library.custom_op(f"clipfast::{name}", implementation, mutates_args=(), device_types=devices)
        self.register_fake = self._op.register_fake
        self._overload: Any = getattr(torch.ops.clipfast, name).default
        self.schema = self._overload._schema

        def no_derivative(ctx: object, *grads: Tensor) -> None:
            raise NotImplementedError(
                f"clipfast::{name} has no derivative: compute second derivatives with backend='torch', the reference"
            )

        self.register_autograd(no_derivative, setup_context=lambda *_: None, results=lambda *_: sys.maxsize)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        *,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        results: Callable[..., int] = lambda *_: 1,
    ) -> None:
        """Make ``backward`` the derivative of the op, as :meth:`torch.library.CustomOpDef.register_autograd` does.

        Args:
            backward: gets the context and the gradients of the results.
            setup_context: gets the context, the inputs and all outputs. An op that has several saves those that only
                its backward pass reads.
            results: returns, for the inputs, how many of the outputs are results. The others are not differentiable,
                and an eager call may not return them.
        """

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
                outputs = self.run(*args)
            setup_context(ctx, args, outputs)
            return outputs[: results(*args)] if outputs.__class__ is tuple else outputs

        def setup_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[results(*inputs) :])
            setup_context(ctx, inputs, output)

        self._op.register_autograd(backward, setup_context=setup_op)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._apply = apply_of(type(f"clipfast_{self._name}", (torch.autograd.Function,), methods))

    def __call__(self, *args: Any) -> Any:
        """Call the op; keyword arguments are not taken."""
        if is_watched():
            return self._overload(*args)
        needs_grad = False
        for x in args:
            if isinstance(x, Tensor):
                # The memory of a sparse, negated or zero tensor does not hold its values; PyTorch resolves it first.
                is_plain = x.__class__ in PLAIN and x.layout is torch.strided and not x.is_meta
                if not is_plain or x.is_neg() or x._is_zerotensor():
                    return self._overload(*args)
                needs_grad = needs_grad or x.requires_grad
        if needs_grad and torch.is_grad_enabled():
            return self._apply(*args)
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return self.run(*args)


def apply_of(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` of an ``autograd.Function``, for calls outside the transforms of ``torch.func``.

    This is the method of the C++ class. That of the Python class first asks whether a transform is active.
    """
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return found


def registered(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make a function the implementation of the PyTorch op ``clipfast::<name>``."""
    return functools.partial(Op, name)


def is_watched() -> bool:
    """Return whether something in this thread has to see the registered op instead of its implementation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(LEGACY_VMAP)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def below_autograd(fn: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autograd and autocast; ``torch.compile`` cannot trace it."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return fn(*args, **kwargs)

    return wrapper


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autocast on the device of its first tensor: it converted its operands."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(filter(torch.is_tensor, args)).device.type
        if not torch.is_autocast_enabled(device_type):
            return fn(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapper
