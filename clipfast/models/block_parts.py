"""What the functions of a transformer block (:mod:`.whole_block`) are made of: its settings, its parameters and their
casts, activations that PyTorch computes, and gradients.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.backends import NOT_INSIDE
from . import fp8_layers

QUICK = "quick"


class Options(NamedTuple):
    """The settings of a transformer block.

    Attributes:
        heads, causal, scale: of the attention.
        eps_1, eps_2: of the norms.
        gelu: "none" or "tanh", the approximation of GELU, or "quick" for QuickGELU.
        adds_bias: whether the activation's kernel adds b_fc; otherwise the linear layer before it does.
        dtype: the dtype of products, to which autocast casts their operands.
        dtypes: those of the block's :class:`Parameters`.
        hidden: the width of the MLP.
        fp8: the recipe of ``fp8_linear`` if the linear layers multiply in 8 bits, else None.
        recomputes_inputs: whether the block keeps no inputs of linear layers, since its backward pass computes them
            again; true for the recipe ``switchback``.
    """

    heads: int
    causal: bool
    scale: float
    eps_1: float
    eps_2: float
    gelu: str
    adds_bias: bool
    dtype: torch.dtype
    dtypes: "Parameters"
    hidden: int
    fp8: str | None
    recomputes_inputs: bool


class Parameters(NamedTuple):
    """The weights and biases of a block. Autocast casts those of linear layers, but not b_fc if a kernel adds it."""

    norm_1: Tensor
    norm_1_bias: Tensor
    norm_2: Tensor
    norm_2_bias: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    w_proj: Tensor
    b_proj: Tensor
    w_fc: Tensor
    b_fc: Tensor


def cast_blocks(
    blocks: Collection[tuple[Parameters, Options]], memory: dict[int, Sequence[Tensor]] | None = None
) -> list[Parameters]:
    """Return the parameters of several transformer blocks as autocast would cast them, in one launch.

    Of blocks in 8 bits, the weights are quantised, and biases stay as they are.

    Args:
        blocks: the parameters and the options of each block.
        memory: the tensors that an earlier block was cast to, by the id of its options. A block with the same options
            is cast to the same tensors, since nothing but a backward pass reads the casts of a block again. None for
            new tensors.
    """
    found: list[Parameters] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
        for parameters, options in blocks:
            end = 11 if options.adds_bias else 12
            linear: Any = parameters[4:end]
            if options.fp8 is not None:
                values: list[Any] = list(parameters)
                values[4::2] = fp8_layers.quantized(parameters[4::2])
                parameters = Parameters(*values)
            elif {*options.dtypes[4:end]} != {options.dtype}:
                cast = None if memory is None else memory.get(id(options))
                if cast is None:
                    cast = _new_like(linear, options.dtype)
                    if memory is not None:
                        memory[id(options)] = cast
                targets += cast
                sources += linear
                parameters = Parameters(*parameters[:4], *cast, *parameters[end:])
            found.append(parameters)
        if targets:
            torch._foreach_copy_(targets, sources)
    return found


def _new_like(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return uninitialised tensors for a transformer block's parameters in ``dtype``, in one piece of memory."""
    memory = torch.empty(sum([x.numel() for x in tensors]), dtype=dtype, device=tensors[0].device)
    new: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(memory, list(tensors))
    return new


def linear_grads(
    ctx: Any, name: str, grad: Tensor, x: Any, weight: Any, weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of input, weight and bias of a block's linear layer on rows.

    The gradients of weight and bias have the dtypes given, where the product can be rounded to them at once; they are
    None for a dtype that is None, and that of the weight for an ``x`` of None. In 8 bits, ``weight`` is the columns of
    the weight, and ``name`` is the key under which the layer's plans are kept.
    """
    fp8 = ctx.options.fp8
    if fp8 == fp8_layers.FULL:
        wanted = weight_dtype is not None, bias_dtype is not None
        return fp8_layers.full_grads(ctx.plans, name, grad, x, weight, *wanted)
    dx = grad.mm(weight) if fp8 is None else fp8_layers.input_grad(ctx.plans, name, grad, weight)
    dw = None if x is None else weight_grad(grad, x, weight_dtype)
    return dx, dw, grad.sum(0, dtype=bias_dtype) if bias_dtype else None


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Return the gradient of the weight of a block's linear layer with the input ``x``, as :func:`linear_grads`."""
    if dtype is None:
        return None
    is_widened = dtype == torch.float32 and grad.is_cuda and grad.dtype != dtype
    return torch.mm(grad.t(), x, out_dtype=dtype) if is_widened else grad.t().mm(x)


def gelu_of(h: Tensor, gelu: str) -> Tensor:
    """Return the activation of a transformer block, for a GELU that PyTorch computes."""
    return h * torch.sigmoid(1.702 * h) if gelu == QUICK else F.gelu(h, approximate=gelu)


def gelu_grad(grad: Tensor, h: Tensor, gelu: str) -> Tensor:
    """Return the gradient of the input of a transformer block's activation, for a GELU that PyTorch computes."""
    if gelu != QUICK:
        return torch.ops.aten.gelu_backward(grad, h, approximate=gelu)
    p = torch.sigmoid(1.702 * h)
    return grad * p + 1.702 * torch.ops.aten.sigmoid_backward(grad * h, p)


def in_dtypes(grads: Sequence[Tensor | None], wanted: Sequence[Any]) -> list[Tensor | None]:
    """Return gradients of a transformer block in the dtypes that are wanted, by one launch; None for the others."""
    results = list(grads)
    targets, sources = [], []
    for k, (grad, dtype) in enumerate(zip(grads, wanted, strict=True)):
        if dtype is None or grad is None:
            results[k] = None
        elif grad.dtype != dtype:
            results[k] = target = torch.empty_like(grad, dtype=dtype)
            targets.append(target)
            sources.append(grad)
    if targets:
        torch._foreach_copy_(targets, sources)
    return results
