"""The choice of the implementation of an op (the registered op or the PyTorch reference), and its registration."""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix, ops
from .configs import on_change
from .launch import triton_runs_on

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "torch")
COMPUTED_ON = ("cuda", "cpu", "meta")
# The classes of ordinary tensors; fake tensors and distributed tensors have classes of their own.
PLAIN = (Tensor, torch.nn.Parameter)
# TensorGuards compares layouts of tensors in C++. It is private; ``Op.learn`` keeps no call if PyTorch lacks it.
TensorGuards: Any = getattr(guards, "TensorGuards", None)
MOST_ALIKE = 8  # the most memory layouts that an op remembers for calls with equal options and equal sizes
MOST_KNOWN = 512  # the most pairs of sizes and options that an op keeps; each takes 20 to 60 KB of host memory
# LEGACY_VMAP is the dispatch key that is active under ``torch.autograd.grad(is_grads_batched=True)``, which vectorises
# a backward pass without a transform of ``torch.func``.
LEGACY_VMAP = torch._C._dispatch_key_parse("VmapMode")
# Every eager call of an op calls these functions. Python finds a global name in half the time of ``torch._C.name``.
num_dispatch_modes = torch._C._len_torch_dispatch_stack
num_function_modes = torch._C._len_torch_function_stack
profiler_enabled = torch._C._autograd._profiler_enabled
is_dynamo_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
# The dispatcher skips autograd and autocast, whose keys these are, for the PyTorch ops that an implementation calls.
NOT_INSIDE = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)),
    ("AutogradOther", "AutogradNestedTensor", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"),
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality),
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
            "move it to a GPU, or start Python with TRITON_INTERPRET=1, which interprets the kernels on the CPU"
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


# torch.compile may take the result of _is_transformed as a constant, since it compiles again under another transform.
# The attribute is explained at ``_least_keys_of_sdpa`` in attention/op.py.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _KnownLayout(NamedTuple):
    """A layout of an op's tensors, and the functions that compute calls with it.

    Attributes:
        check: returns whether tensors have the layout.
        autocast: the device type and the dtype of autocast, if the layout is one under autocast.
        run: computes a call that needs no gradients.
        apply: computes a call that needs gradients; None if no tensor of the layout requires a gradient.
    """

    check: Callable[..., bool]
    autocast: tuple[str, torch.dtype] | None
    run: Callable[..., Any]
    apply: Callable[..., Any] | None


class Op:
    """An op that is registered with PyTorch as ``clipfast::<name>``, on CPUs and GPUs, with a shortcut for eager calls.

    PyTorch's dispatcher takes the host longer to reach an op that is written in Python than a small kernel runs. So an
    eager call goes through an ``autograd.Function``, or straight to the implementation if no gradient is needed. The
    registered op is called where PyTorch has to see it: under a compiler, a transform, a mode, a profiler or a tracer,
    and for a tensor of another class than PyTorch's own, or one whose memory does not hold its values. Both ways run
    the same implementation, without autocast and below autograd.

    An op may have a planner, which decides from the layout of its arguments how to compute a call. Then calls are kept
    by their layout (:meth:`learn`), and a call like an earlier one (:meth:`find`) needs no checks and no decisions.

    An op has no derivative until one is registered, and a backward pass through it raises an error. The backward ops
    register none, so a second derivative raises this error, if autograd finds a way from what the backward op reads to
    the op's inputs. So an op saves inputs, or outputs that are results: those lead to its inputs.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run, self._name = run, name
        self.planner: Callable[..., Any] | None = None
        self._known: dict[Any, tuple[_KnownLayout, ...]] = {}
        on_change(self._known.clear)

        @functools.wraps(run)
        def implementation(*args: Any) -> Any:
            """Run the op's implementation for a call that came through PyTorch's dispatcher."""
            if self.planner is not None:
                _check_devices(args)
            return self._run_below(*args)

        devices = ("cuda", "cpu")
        full_name = add_op_namespace_prefix(name)
        self._op = torch.library.custom_op(full_name, implementation, mutates_args=(), device_types=devices)
        self.register_fake = self._op.register_fake
        # In PyTorch 2.15, profilers do not see calls of an op's overload, but those of its packet.
        self._registered: Any = getattr(ops, name)
        self.schema = self._registered.default._schema

        def no_derivative(ctx: object, *grads: Tensor) -> None:
            """Refuse a second derivative of a registered op."""
            raise NotImplementedError(
                f"{full_name} has no derivative: compute second derivatives with backend='torch', the reference"
            )

        self.register_autograd(no_derivative, setup_context=lambda *_: None, results=lambda *_: sys.maxsize)
        self._has_derivative = False

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
            setup_context: gets the context, the inputs and all outputs. It saves the tensors that the backward pass
                reads, outputs among them.
            results: returns, for the inputs, how many of the outputs are results. The others are not differentiable,
                and an eager call may not return them.
        """

        def function_of(run: Callable[..., Any], count: int) -> Callable[..., Any]:
            """Return the op as a function of autograd that calls ``run``, and returns its first ``count`` outputs."""

            def forward(ctx: Any, *args: Any) -> Any:
                """Run the op's implementation, and save the tensors that its backward pass reads."""
                outputs = run(*args)
                setup_context(ctx, args, outputs)
                return outputs[:count] if outputs.__class__ is tuple else outputs

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            return apply_of(type(f"clipfast_{self._name}", (torch.autograd.Function,), methods))

        def setup_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """Save the tensors that the registered op's backward pass needs; outputs that only it reads get no
            gradient.
            """
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[results(*inputs) :])
            setup_context(ctx, inputs, output)

        self._op.register_autograd(backward, setup_context=setup_op)
        self._results, self._function_of = results, function_of
        self._functions: dict[int, Callable[..., Any]] = {}
        self._has_derivative = True

    def __call__(self, *args: Any) -> Any:
        """Call the op; keyword arguments are not taken."""
        if is_watched():
            return self._registered(*args)
        _check_devices(args)
        needs_grad = False
        for x in args:
            if isinstance(x, Tensor):
                if not _holds_its_values(x):
                    return self._registered(*args)
                needs_grad = needs_grad or x.requires_grad
        if needs_grad and torch.is_grad_enabled():
            count = self._results(*args)
            if count not in self._functions:
                self._functions[count] = self._function_of(self._run_below, count)
            return self._functions[count](*args)
        return self._run_below(*args)

    def _run_below(self, *args: Any) -> Any:
        """Run the implementation without autocast and below autograd."""
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return self.run(*args)

    def planned_by(self, planner: Callable[..., Any]) -> None:
        """Keep an op's calls by their layout, and let ``planner`` decide how calls of a layout are computed.

        The planner gets the arguments of a call, and returns a function that computes it and all calls of its layout.
        That function may return None in place of an output that is empty.
        """
        self.planner = planner

    def find(
        self, options: tuple[Any, ...], tensors: tuple[Tensor, ...], free: tuple[int, ...] = ()
    ) -> Callable[..., Any] | None:
        """Return the function that computes a call like one that :meth:`learn` has kept, or None.

        A call is like another one if its options are equal, and its tensors agree in everything that PyTorch's
        dispatcher knows of them: class, dtype, device, sizes, strides, and transforms, modes and autocast around them.
        One call to C++ compares all of this. ``free`` says for each tensor how many of its first dimensions may differ
        in size and stride, because no decision of the planner depends on them.
        """
        if is_dynamo_compiling() or not self._known or tensors[0].__class__ not in PLAIN:
            return None
        try:
            if free:
                sizes = tuple([x.shape[k:] for x, k in zip(tensors, free, strict=True)])
            else:
                sizes = tuple([x.shape for x in tensors])
            found = self._known.get((sizes, options), ())
        except (TypeError, AttributeError):  # an option without a hash, or a list in place of a tensor
            return None
        for check, autocast, run, apply in found:
            if check(*tensors):
                if num_dispatch_modes() or num_function_modes() or profiler_enabled() or forward_ad._current_level >= 0:
                    # PyTorch must see the registered op. A call of is_watched takes twice the time of these checks.
                    break
                if autocast is not None and torch.get_autocast_dtype(autocast[0]) is not autocast[1]:
                    continue
                return apply if apply is not None and is_grad_enabled() else run
        return None

    def learn(
        self, options: tuple[Any, ...], tensors: tuple[Tensor, ...], args: tuple[Any, ...], free: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Return the function that computes a call of the op with checked arguments, and keep it for similar calls.

        Args:
            options, tensors, free: as :meth:`find` gets them. All that was checked follows from the options and from
                the layouts of the tensors.
            args: the arguments of the op.
        """
        if is_watched() or TensorGuards is None:
            return self
        known = self.find(options, tensors, free)
        if known is not None:
            return known
        _check_devices(tensors)
        try:
            hash(options)
        except TypeError:  # an option is a list, which has no hash
            return self
        # TensorGuards matches no call in which the same tensor occurs twice.
        if len({*map(id, tensors)}) < len(tensors) or not all(map(_holds_its_values, tensors)):
            return self
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            run = self.planner(*args)  # type: ignore[misc]
        autocast, device_type = None, tensors[0].device.type
        if torch.is_autocast_enabled(device_type):
            run, autocast = below_autograd(run), (device_type, torch.get_autocast_dtype(device_type))
        apply = None
        if any(x.requires_grad for x in tensors):
            # An op without a derivative is called through the dispatcher, so that its backward pass raises the error.
            apply = self._function_of(run, self._results(*args)) if self._has_derivative else self
        free = free or (0,) * len(tensors)
        layouts: Any = {
            "dynamic_dims_sizes": [[None] * k + [*x.shape[k:]] for x, k in zip(tensors, free, strict=True)],
            "dynamic_dims_strides": [[None] * k + [*x.stride()[k:]] for x, k in zip(tensors, free, strict=True)],
        }
        layout = TensorGuards(*tensors, **layouts)
        if len(self._known) >= MOST_KNOWN:
            self._known.pop(next(iter(self._known), None), None)
        key = tuple([x.shape[k:] for x, k in zip(tensors, free, strict=True)]), options
        known_layout = _KnownLayout(layout.check, autocast, run, apply)
        self._known[key] = (known_layout, *self._known.get(key, ()))[:MOST_ALIKE]
        return self.find(options, tensors, free) or self


def apply_of(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` of an ``autograd.Function``, for calls outside the transforms of ``torch.func``.

    The method that is returned is that of the C++ base class. ``torch.autograd.Function.apply`` would first check
    whether a transform is active.
    """
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return found


def registered(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make a function the implementation of the PyTorch op ``clipfast::<name>``."""
    return functools.partial(Op, name)


def planned_op(name: str) -> Callable[[Callable[..., Callable[..., Any]]], Op]:
    """Make a function the planner of the PyTorch op ``clipfast::<name>`` (:meth:`Op.planned_by`).

    The planner's signature is that of the op, and the function that it is annotated to return has the op's results.
    """

    def op_of(planner: Callable[..., Callable[..., Any]]) -> Op:
        """Register the op that plans and computes each call."""

        @functools.wraps(planner)
        def run(*args: Any) -> Any:
            """Plan a call of the op, and compute it."""
            return op.planner(*args)(*args)  # type: ignore[misc]

        signature = inspect.signature(planner)
        _, results = get_args(signature.return_annotation)
        run.__signature__ = signature.replace(return_annotation=results)  # type: ignore[attr-defined]
        op = Op(name, run)
        op.planned_by(planner)
        return op

    return op_of


def is_watched() -> bool:
    """Return whether a compiler, transform, tracer, mode or profiler of this thread has to see the registered op.

    The dispatch keys of a tensor do not show whether one of them is active.
    """
    return bool(is_traced() or num_dispatch_modes() or num_function_modes() or profiler_enabled())


def is_traced() -> bool:
    """Return whether a compiler, a transform or a tracer sees the calls of this thread instead of values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(LEGACY_VMAP)
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _holds_its_values(x: Tensor) -> bool:
    """Return whether the memory of ``x`` holds its values, unlike that of a fake, sparse, negated or zero tensor.

    PyTorch's dispatcher handles such tensors before it calls a registered op.
    """
    is_plain = x.__class__ in PLAIN and x.layout is torch.strided and not x.is_meta
    return is_plain and not x.is_neg() and not x._is_zerotensor()


def _check_devices(args: Sequence[Any]) -> None:
    """Refuse tensors on several devices, which a hook of autograd may return: a kernel gets only their addresses, and
    an address does not show its device.
    """
    devices = {x.device for x in args if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the tensors of an op must be on one device, got {', '.join(sorted(map(str, devices)))}")


def below_autograd(fn: Callable[P, R]) -> Callable[P, R]:
    """Let an op's function run without autograd and autocast; ``torch.compile`` cannot trace it."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op's function without autograd and autocast."""
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return fn(*args, **kwargs)

    return wrapper


def outside_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Let an op's function run without autocast on its first tensor's device: it converts its operands itself."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op's function without autocast on the device of its first tensor."""
        device_type = next(filter(torch.is_tensor, args)).device.type
        if not torch.is_autocast_enabled(device_type):
            return fn(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapper
