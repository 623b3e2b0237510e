"""A pre-norm transformer block as one autograd function: one call for each block and direction.

With the stream x, and the branch u that the block before it has not added yet (there is none before the first block):

    s = x + u         a = attention(norm_1(s) W_in + b_in) W_out + b_out
    t = s + a         m = gelu(norm_2(t) W_fc + b_fc) W_proj + b_proj

The results are t and m, which are the stream and the branch of the next block. The ops are those that the modules of a
block call, and the same tensors are kept for the backward pass, except in 8 bits. Three things take less time than in
the modules:

    autocast casts the parameters of all linear layers in one launch, and their gradients in another
    the backward kernels of the norms add up the gradients of the stream
    the host decides once for a block, and not in each module, how to compute it

In 8 bits by the recipe ``switchback``, no input of a linear layer is kept. For the weights' gradients, the backward
kernels of the norms and of the activation write their results once more, in 16 bits, from what they read anyway. So the
gradient of a weight is computed after that of the op before its layer.

:mod:`.transformer` decides which blocks are computed in this way.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.backends import NOT_INSIDE, apply_of
from ..kernels.common import as_rows
from ..kernels.fp8_rows import lay_beside, takes_rows
from ..kernels.implementations import (
    Plans,
    attention_bwd,
    attention_fwd,
    bias_act_bwd,
    bias_act_fp8_bwd,
    bias_act_fp8_fwd,
    bias_act_fwd,
    compute,
    layer_norm_bwd,
    layer_norm_fp8_bwd,
    layer_norm_fp8_fwd,
    layer_norm_fwd,
    plans_of,
)
from ..kernels.launch import triton_runs_on
from . import fp8_layers
from .block_parts import QUICK, Options, Parameters, gelu_grad, gelu_of, in_dtypes, linear_grads, weight_grad


def whole_block(
    plans: Plans, shape: torch.Size, x: Tensor, branch: Tensor | None, parameters: Parameters, options: Options,
    cast: Parameters, bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a whole transformer block of a tower at once.

    Args:
        plans: the result of :func:`block_plans` for ``x``, ``branch`` and ``options``.
        shape: the shape [B, N, width] of the residual stream; [1, T, width] for a packing, the tokens of several
            sequences.
        x: the residual stream as rows, [B * N, width], so that no view has to be made between blocks.
        branch: the output of the MLP of the block before, which has not been added to ``x`` yet.
        parameters: the block's parameters, which get the gradients.
        options: the block's settings.
        cast: the parameters' values in the dtype of the products.
        bounds: [2, T], the bounds of each token's sequence for a packing (``Packing.bounds``); otherwise None.

    Returns:
        The residual stream t, and the output m of the block's MLP, which the next block adds to t; as rows.
    """
    results: tuple[Tensor, Tensor] = applied(_FUNCTION, plans, options, cast, bounds, shape, x, branch, parameters)
    return results


def block_without_gradients(
    plans: Plans, shape: torch.Size, x: Tensor, branch: Tensor | None, options: Options, cast: Parameters,
    bounds: Tensor | None, memory: "Memory | None",
) -> "tuple[Tensor, Tensor, Memory | None]":  # fmt: skip
    """Compute a transformer block as :func:`whole_block` does, where no gradients are recorded.

    Args:
        memory: the third result for the block before, if both have the same plans and a branch. Its tensors are written
            to again, also the stream ``x``. None for new tensors.

    Returns:
        The stream t and the branch m, and the memory for the next block; None if it has to be new.
    """
    with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
        if memory is None:
            (t, m), saved = _forward(plans, options, cast, bounds, shape, x, branch)
            if not options.adds_bias or bounds is not None or options.fp8 is not None or branch is None:
                return t, m, None
            s, mean, rstd, y, _, _, heads, _, lse, *_, t, mean_2, rstd_2, y_2, _, g, _, _, _, _, _ = saved
            return t, m, Memory((y, s, mean, rstd), (heads, lse), (y_2, t, mean_2, rstd_2), g)
        of_norm_1, of_attention, of_norm_2, g = memory
        of_stream = branch, x, cast.norm_1, cast.norm_1_bias, options.eps_1
        y, s, _, _ = plans["norm_1", layer_norm_fwd](*of_stream, of_norm_1)
        qkv = F.linear(y, cast.w_in, cast.b_in).view(shape[0], shape[1], -1)
        numbers = options.heads, options.causal, options.scale
        heads, _ = plans["", attention_fwd](qkv, None, None, *numbers, of_attention)
        a = F.linear(as_rows(heads), cast.w_out, cast.b_out)
        y, t, _, _ = plans["norm_2", layer_norm_fwd](a, s, cast.norm_2, cast.norm_2_bias, options.eps_2, of_norm_2)
        g = plans["", bias_act_fwd](F.linear(y, cast.w_fc), cast.b_fc, options.gelu == QUICK, g)
        return t, F.linear(g, cast.w_proj, cast.b_proj), memory


class Memory(NamedTuple):
    """The tensors of a block that the next block writes to again, where no gradients are recorded.

    Attributes:
        norm_1, norm_2: y, s (or t), mean and rstd of the norms.
        attention: the heads as rows, and the log-sum-exp.
        activation: the result of the activation.
    """

    norm_1: tuple[Tensor, Tensor, Tensor, Tensor]
    attention: tuple[Tensor, Tensor]
    norm_2: tuple[Tensor, Tensor, Tensor, Tensor]
    activation: Tensor


class Function(NamedTuple):
    """The forward and the backward computation of a transformer block, or of one row of the last block.

    Attributes:
        forward: gets the plans, the options, the cast parameters, ``places``, the shape of the stream, and stream and
            branch as rows, and returns the results and the tensors to save. ``places`` has the bounds of packed
            sequences, or, for the last block, the rows that are read.
        backward: gets the context, the gradients of the results and the saved tensors, and returns the gradients of
            stream, branch and parameters.
    """

    forward: Callable[..., tuple[Any, tuple[Tensor | None, ...]]]
    backward: Callable[..., tuple[Tensor | None, ...]]


def applied(
    function: Function, plans: Plans, options: Options, cast: Parameters, places: Any, shape: torch.Size, x: Tensor,
    branch: Tensor | None, parameters: Parameters,
) -> Any:  # fmt: skip
    """Call a function of a transformer block below autograd; tell autograd its derivative if gradients are recorded."""
    if torch.is_grad_enabled():
        return _apply(function, plans, options, cast, places, shape, x, branch, *parameters)
    with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
        return function.forward(plans, options, cast, places, shape, x, branch)[0]


def plans_for(
    function: Function, options: Options, places: Any, shape: torch.Size, x: Tensor, branch: Tensor | None
) -> Plans:
    """Return the dict of the functions that compute the ops of a transformer block, for inputs of this layout."""
    # On a CPU, these functions do not depend on the numbers of packed tokens and texts, which differ in each batch, so
    # the layout leaves these numbers out there.
    longest = getattr(places, "max_seqlen", None)
    is_packed = longest is not None or (places is not None and places.ndim == 2)
    first = 2 if is_packed and not triton_runs_on(x.device) else 0
    of_branch = None if branch is None else (branch.dtype, branch.stride())
    texts = (len(places), longest) if longest is not None and not first else None
    layout = x.device, x.dtype, shape[first:], x.stride(), of_branch, texts
    return plans_of(function, places.__class__, options, *layout)


class _Block(torch.autograd.Function):
    """The autograd function of a block."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, plans: Plans, options: Options, cast: Parameters, places: Any, shape: torch.Size,
        x: Tensor, branch: Tensor | None, *parameters: Tensor,
    ) -> Any:  # fmt: skip
        """Return the results of the transformer block's function."""
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            results, saved = function.forward(plans, options, cast, places, shape, x, branch)
        ctx.function, ctx.options, ctx.plans = function.backward, options, plans
        # The dtypes of the parameters' gradients; None for a parameter that needs no gradient.
        needed, ctx.wanted = ctx.needs_input_grad[-len(parameters) :], options.dtypes
        if False in needed:
            ctx.wanted = Parameters(*[p.dtype if p.requires_grad else None for p in parameters])  # type: ignore[arg-type]
        ctx.longest = getattr(places, "max_seqlen", None)
        # takes_rows: the backward pass uses rows in 8 bits that the next block has attached to the gradient of m.
        # gives_rows: the backward pass attaches rows in 8 bits to the gradient of the branch (``fp8_rows.lay_beside``).
        ctx.takes_rows = options.recomputes_inputs
        ctx.gives_rows = ctx.takes_rows and branch is not None and takes_rows(branch)
        ctx.shape, ctx.y_dtype, ctx.has_branch = shape, (x if branch is None else branch).dtype, branch is not None
        if options.fp8 is not None:
            saved, ctx.function = fp8_layers.flattened(saved, function.backward)
        ctx.save_for_backward(*saved)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of a transformer block's stream, branch and parameters."""
        saved = ctx.saved_tensors  # This may compute checkpointed modules again, which autograd has to see.
        if torch.is_grad_enabled():
            return _only_once(ctx, *grads, *saved)
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return None, None, None, None, None, None, *ctx.function(ctx, *grads, *saved)


class _OnlyOnce(torch.autograd.Function):
    """The gradients of a block in a backward pass that autograd records: a second derivative raises an error."""

    @staticmethod
    def forward(_: Any, ctx: Any, *tensors: Tensor) -> Any:
        """Return the gradients of the transformer block whose context is ``ctx``."""
        with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
            return None, None, None, None, None, None, *ctx.function(ctx, *tensors)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Any:
        """Refuse a second derivative of a transformer block."""
        raise NotImplementedError("a transformer block has no second derivative: call the model's set_backend('torch')")


_apply, _only_once = apply_of(_Block), apply_of(_OnlyOnce)


def _forward(
    plans: Plans, options: Options, cast: Parameters, bounds: Tensor | None, shape: torch.Size, x: Tensor,
    branch: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...]]:  # fmt: skip
    """Return t and m of a transformer block, and the tensors that its backward pass reads, as rows except for qkv."""
    s, y, mean, rstd = first_norm(plans, options, x, branch, cast)
    multiply: Any = F.linear if options.fp8 is None else fp8_layers.linear
    qkv = multiply(y, cast.w_in, cast.b_in).view(shape[0], shape[1], -1)
    heads, lse = compute(plans, attention_fwd, "", qkv, None, bounds, options.heads, options.causal, options.scale)
    heads = heads.view(-1, shape[2])
    o = None if options.fp8 is None else fp8_layers.operand(plans, "heads", (heads,), options.dtype)
    a = multiply(heads if o is None else o, cast.w_out, cast.b_out)
    t, m, saved = mlp_half(plans, options, s, a, cast)
    y, o, bias = (None, None, cast.norm_1_bias) if options.recomputes_inputs else (y, o, None)
    saved = (s, mean, rstd, y, qkv, bounds, heads, o, lse, cast.norm_1, bias, cast.w_in, cast.w_out, *saved)
    return (t, m), saved


def _backward(
    ctx: Any, grad_t: Tensor, grad_m: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, y: Any, qkv: Tensor,
    bounds: Tensor | None, heads: Tensor, o: Any, lse: Tensor, norm: Tensor, norm_bias: Tensor, w_in: Tensor,
    w_out: Tensor, *of_mlp: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return a transformer block's gradients of stream, branch and parameters, from the last equation to the first."""
    options, wanted, width = ctx.options, ctx.wanted, s.shape[-1]
    dt, da, of_norm_2, *mlp_grads = mlp_half_grads(ctx, grad_t.contiguous(), grad_m.contiguous(), *of_mlp)
    # The weight's gradient by the recipe ``full`` reads the heads in 8 bits.
    o = heads if o is None else o
    d_heads, dw_out, db_out = linear_grads(ctx, "out", da, o, w_out, wanted.w_out, wanted.b_out)
    with_sums = wanted.b_in is not None
    numbers = options.heads, options.causal, options.scale
    dqkv, db_in = compute(ctx.plans, attention_bwd, with_sums, d_heads, qkv, bounds, heads, lse, *numbers, with_sums)
    dqkv = dqkv.view(-1, 3 * width)
    dy, dw_in, _ = linear_grads(ctx, "in", dqkv, y, w_in, wanted.w_in, None)
    dy = dy if dy.dtype is ctx.y_dtype else dy.to(ctx.y_dtype)
    with_sums = bool(wanted.norm_1 or wanted.norm_1_bias)
    ds, du, of_norm_1, y = norm_grads(
        ctx, "norm_1", dy, dt, s, norm, norm_bias, mean, rstd, with_sums, wanted.w_in is not None, ctx.gives_rows
    )
    if y is not None:
        dw_in = weight_grad(dqkv, y.to(dqkv.dtype), wanted.w_in)
    of_parameters = (*pair(of_norm_1), *pair(of_norm_2), dw_in, db_in, dw_out, db_out, *mlp_grads)
    return (ds, du if ctx.has_branch else None, *in_dtypes(of_parameters, wanted))


_FUNCTION = Function(_forward, _backward)
block_plans = functools.partial(plans_for, _FUNCTION)


def first_norm(
    plans: Plans, options: Options, x: Tensor, branch: Tensor | None, cast: Parameters
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Return the block's sum s, norm_1(s) as the first linear layer takes it, and mean and rstd of the rows of s."""
    bias, added = cast.norm_1_bias, (x, None) if branch is None else (branch, x)
    norm = layer_norm_fwd if options.fp8 is None or added[0].dtype is not options.dtype else layer_norm_fp8_fwd
    *results, t, mean, rstd = compute(plans, norm, "norm_1", *added, cast.norm_1, bias, options.eps_1)
    if options.fp8 is not None:
        y: Any = fp8_layers.operand(plans, "norm_1", results, options.dtype)
    else:
        y = results[0] if results[0].dtype is options.dtype else results[0].to(options.dtype)
    return x if branch is None else t, y, mean, rstd


def pair(sums: Any) -> Any:
    """Return the gradients of weight and bias of a transformer block's norm, or twice None."""
    if sums is None:
        return None, None
    return sums.unbind(0) if isinstance(sums, Tensor) else sums  # unbind takes less time than unpacking a tensor


def mlp_half(
    plans: Plans, options: Options, s: Tensor, a: Tensor, cast: Parameters
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return t, m of a block's MLP, and the tensors that :func:`mlp_half_grads` reads."""
    is_fp8 = options.fp8 is not None
    norm = layer_norm_fp8_fwd if is_fp8 else layer_norm_fwd
    multiply: Any = fp8_layers.linear if is_fp8 else F.linear
    *results, t, mean, rstd = compute(plans, norm, "norm_2", a, s, cast.norm_2, cast.norm_2_bias, options.eps_2)
    y: Any = fp8_layers.operand(plans, "norm_2", results, options.dtype) if is_fp8 else results[0]
    h = multiply(y, cast.w_fc, None if options.adds_bias else cast.b_fc)
    if options.adds_bias:
        g = compute(plans, bias_act_fp8_fwd if is_fp8 else bias_act_fwd, "", h, cast.b_fc, options.gelu == QUICK)
    else:
        g = gelu_of(h, options.gelu)
    if is_fp8:
        g = fp8_layers.operand(plans, "gelu", g if options.adds_bias else (g,), options.dtype)
    m = multiply(g, cast.w_proj, cast.b_proj)
    y, g, bias = (None, None, cast.norm_2_bias) if options.recomputes_inputs else (y, g, None)
    b_fc = cast.b_fc if options.adds_bias else None
    return t, m, (t, mean, rstd, y, h, g, cast.norm_2, bias, cast.w_fc, b_fc, cast.w_proj)


def mlp_half_grads(
    ctx: Any, grad_t: Tensor, grad_m: Tensor, t: Tensor, mean: Tensor, rstd: Tensor, y: Any, h: Tensor, g: Any,
    norm: Tensor, norm_bias: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return a block's gradients of s and a, of norm_2 [2, width], and of w_proj, b_proj, w_fc and b_fc of its MLP."""
    options, wanted, again = ctx.options, ctx.wanted, ctx.options.recomputes_inputs
    dg, dw_proj, db_proj = linear_grads(ctx, "proj", grad_m, g, w_proj, wanted.w_proj, wanted.b_proj)
    with_g = again and wanted.w_proj is not None
    if not options.adds_bias:
        dh, db_fc = gelu_grad(dg, h, options.gelu), None
        g = gelu_of(h, options.gelu) if with_g else None
    else:
        with_sums = wanted.b_fc is not None
        gelu_bwd, more = (bias_act_fp8_bwd, (with_g,)) if again else (bias_act_bwd, ())
        numbers = options.gelu == QUICK, with_sums, *more
        dh, db_fc, *others = compute(ctx.plans, gelu_bwd, (with_sums, with_g), dg, h, b_fc, *numbers)
        if again:
            lay_beside(dh, *others[-2:])
            g = others[0]
        del others
    if with_g:
        dw_proj = weight_grad(grad_m, g, wanted.w_proj)
    del g, dg  # the largest tensors of the backward pass
    of_bias = None if options.adds_bias else wanted.b_fc
    dy, dw_fc, db = linear_grads(ctx, "fc", dh, y, w_fc, wanted.w_fc, of_bias)
    db_fc = db_fc if options.adds_bias else db
    with_sums = bool(wanted.norm_2 or wanted.norm_2_bias)
    ds, da, of_norm, y = norm_grads(
        ctx, "norm_2", dy, grad_t, t, norm, norm_bias, mean, rstd, with_sums, wanted.w_fc is not None, True
    )
    if y is not None:
        dw_fc = weight_grad(dh, y, wanted.w_fc)
    return ds, da, of_norm, dw_proj, db_proj, dw_fc, db_fc


def norm_grads(
    ctx: Any, name: str, grad_y: Tensor, grad_s: Tensor, s: Tensor, norm: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor, with_sums: bool, with_y: bool, gives_rows: bool,
) -> tuple[Tensor, Tensor, Any, Tensor | None]:  # fmt: skip
    """Return the gradients of stream, branch and parameters by a block's norm, and the norm itself if the block
    recomputes it (``with_y``); else None.

    With ``gives_rows``, rows in 8 bits are attached to the branch's gradient, in a block that makes such rows.
    """
    args: tuple[Any, ...] = grad_y, grad_s, s, norm, mean, rstd, with_sums
    y: list[Tensor] = []
    if ctx.options.recomputes_inputs:
        args, key = (*args, bias if with_y else None), (name, with_sums, with_y)
        ds, dx, sums, *y, values, scale = compute(ctx.plans, layer_norm_fp8_bwd, key, *args)
    else:
        ds, dx, sums = compute(ctx.plans, layer_norm_bwd, (name, with_sums), *args)
    dx = ds if s.dtype == grad_y.dtype else dx
    if ctx.options.recomputes_inputs and gives_rows:
        lay_beside(dx, values, scale)
    return ds, dx, sums, y[0] if y else None
