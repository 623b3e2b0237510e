"""GELU and QuickGELU of a linear layer's output plus the layer's bias, and the gradient of the bias, in one pass.

With u_mn = x_mn + b_n, Phi the distribution function of the normal distribution and phi its density:

    GELU        y = u Phi(u)                    y' = Phi(u) + u phi(u)              Phi(u) = (1 + erf(u / sqrt(2))) / 2
    QuickGELU   y = u sigmoid(1.702 u)          y' = sigmoid(z) (1 + z sigmoid(-z))              z = 1.702 u

    dx = dy y'(u)           db_n = sum over rows of dx_mn

Bytes for M rows: forward 2 M N items, backward 3 M N. If the linear layer before the activation leaves its bias to
this op, no other pass over dx is needed to sum up the gradient of the bias.
FLOPs: about 20 M N in each direction; they take far less time than the bytes.
Method: GELU by the error function (Hendrycks and Gimpel 2016), and their approximation, which OpenAI's CLIP was
trained with.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import reference
from ..backends import Op, planned_op, registered, uses_reference
from ..checks import check_float, check_parameter, check_tensor
from ..dtypes import accumulate_dtype
from ..fp8_rows import lay_beside
from ..launch import triton_runs_on
from . import cpu, launches


@planned_op("bias_act_fwd")
def _bias_act_fwd(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Tensor]:
    """Return the function that computes GELU or QuickGELU of x + bias for tensors with the layout of ``x``."""
    return (launches if triton_runs_on(x.device) else cpu).forward(x, bias, quick)


@_bias_act_fwd.register_fake
def _(x: Tensor, bias: Tensor, quick: bool) -> Tensor:
    return x.new_empty(x.shape)


def as_outputs(x: Tensor, dx: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of an activation's input and bias for a registered op, which must return a tensor: an empty
    one if ``sums``, the gradient of the bias, is None.
    """
    return dx, x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if sums is None else sums


def fake_gradients(x: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Return tensors without values in the shapes of the gradients of activation and bias."""
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if with_sums else 0, dtype=accumulate_dtype(x.dtype))


def _plan_bwd(grad: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes the gradients of GELU or QuickGELU for tensors with the arguments' layout."""
    return (launches if triton_runs_on(grad.device) else cpu).backward(grad, *args)


@registered("bias_act_bwd")
def _bias_act_bwd(grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of GELU or QuickGELU: of x, and of the bias in float32 (empty unless ``with_sums``)."""
    args = grad, x, bias, quick, with_sums
    return as_outputs(x, *_plan_bwd(*args)(*args))


_bias_act_bwd.planned_by(_plan_bwd)


@_bias_act_bwd.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    return fake_gradients(x, with_sums)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x and bias for the backward pass of GELU or QuickGELU."""
    x, bias, ctx.quick = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor, op: Op = _bias_act_bwd) -> tuple[Tensor | None, ...]:
    """Return the gradients of GELU or QuickGELU of x + bias, which ``op`` computes, to autograd."""
    x, bias = ctx.saved_tensors
    options = ctx.quick, ctx.needs_input_grad[1]
    tensors, args = (grad, x, bias), (grad, x, bias, *options)
    dx, sums, *rows = (op.find(options, tensors) or op.learn(options, tensors, args))(*args)
    if rows:
        lay_beside(dx, *rows[-2:])
    if not options[1]:
        return dx, None, None
    return dx, sums if sums.dtype is bias.dtype else sums.to(bias.dtype), None


_bias_act_fwd.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute GELU(x + bias), by the error function.

    Autocast changes nothing: the sum and the function are computed in float32, and the result has the dtype of ``x``.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU), such as ``F.linear(h, weight)``; any strides
            (rows that do not lie evenly apart are copied first).
        bias: [N], of any floating dtype.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [..., N] in the dtype of ``x``, contiguous.

    Raises:
        ValueError, TypeError: a shape, a device or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    return _bias_act("bias_gelu", x, bias, backend)


def bias_quick_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute QuickGELU(x + bias), u sigmoid(1.702 u), which OpenAI's weights were trained with.

    The arguments, the result and the errors are those of :func:`bias_gelu`.
    """
    return _bias_act("bias_quick_gelu", x, bias, backend)


def _bias_act(op: str, x: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Check the input of bias_gelu or bias_quick_gelu and compute it."""
    options, tensors, args = (op, backend), (x, bias), (x, bias, op == "bias_quick_gelu")
    compute = _bias_act_fwd.find(options, tensors)
    if compute is not None:
        return compute(*args)
    check_tensor(op, "x", x, None)
    check_parameter(op, "bias", bias, x)
    if uses_reference(op, backend, x):
        return reference.bias_quick_gelu(x, bias) if args[2] else reference.bias_gelu(x, bias)
    check_float(op, x=x, bias=bias)
    return _bias_act_fwd.learn(options, tensors, args)(*args)
