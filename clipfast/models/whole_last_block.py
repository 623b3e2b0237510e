"""The last block of a transformer as one autograd function, for the one row of each sequence that a tower reads.

The equations are those of :mod:`.whole_block`, for the row r of each sequence. W_k multiplies the query instead of the
tokens, and W_v multiplies the pooled token (:func:`.layers.single_query_attention`). For each head:

    q = (W_q y_r + b_q) scale       p = softmax_n(q W_k y_n)        o = W_v sum_n p_n y_n + b_v
    a = o W_out + b_out             t = s_r + a                     result: t + m
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.implementations import Plans, attention_pool_bwd, attention_pool_fwd, compute, layer_norm_bwd
from .block_parts import Options, Parameters, in_dtypes, linear_grads
from .packed_text import PackedText
from .whole_block import (
    Function,
    applied,
    first_norm,
    mlp_half,
    mlp_half_grads,
    pair,
    plans_for,
)


def last_row(
    shape: torch.Size, x: Tensor, branch: Tensor | None, rows: Tensor | PackedText | None, parameters: Parameters,
    options: Options, cast: Parameters,
) -> Tensor:  # fmt: skip
    """Return row ``rows[b]`` of the block's output for each sequence b, or the first if ``rows`` is None: [B, width].

    Of packed texts, whose shape is [1, T, width], the row is the last one of each, in their packed order. The other
    arguments are those of :func:`.whole_block.whole_block`.
    """
    plans = plans_for(_FUNCTION, options, rows, shape, x, branch)
    result: Tensor = applied(_FUNCTION, plans, options, cast, rows, shape, x, branch, parameters)
    return result


def _forward(
    plans: Plans, options: Options, cast: Parameters, rows: Tensor | PackedText | None, shape: torch.Size, x: Tensor,
    branch: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """Return one row of the last block's output for each sequence, and the tensors that the backward pass reads."""
    width = shape[2]
    s, y, mean, rstd = first_norm(plans, options, x, branch, cast)
    place, seen, longest = _seen(options, rows, shape, x.device)
    if place is None:
        y_r, s_r = y[:: shape[1]], s[:: shape[1]]
    else:
        y_r, s_r = y.index_select(0, place), s.index_select(0, place)
    w_q, w_k, w_v = cast.w_in.chunk(3)
    b_q, _, b_v = cast.b_in.chunk(3)
    q = _heads_first(F.linear(y_r, w_q, b_q) * options.scale, options)  # [H, B, D]
    query = q.bmm(w_k.view(options.heads, -1, width)).transpose(0, 1)  # [B, H, width]
    pooled, lse = compute(plans, attention_pool_fwd, "", query, y.view(shape), seen, longest)
    o = pooled.transpose(0, 1).bmm(w_v.view(options.heads, -1, width).transpose(1, 2))  # [H, B, D]
    o = o.transpose(0, 1).reshape(-1, width) + b_v
    t, m, saved = mlp_half(plans, options, s_r, F.linear(o, cast.w_out, cast.b_out), cast)
    saved = (s, mean, rstd, y, place, seen, y_r, q, query, pooled, lse, o, cast.norm_1, cast.w_in, cast.w_out, *saved)
    return t + m, saved


def _backward(
    ctx: Any, grad: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, y: Tensor, place: Tensor | None,
    seen: Tensor | None, y_r: Tensor, q: Tensor, query: Tensor, pooled: Tensor, lse: Tensor, o: Tensor,
    norm: Tensor, w_in: Tensor, w_out: Tensor, *of_mlp: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of the last block's stream, branch and parameters, from the last equation to the first."""
    options, wanted, width = ctx.options, ctx.wanted, s.shape[-1]
    grad = grad.contiguous()
    dt, da, of_norm_2, *mlp_grads = mlp_half_grads(ctx, grad, grad.to(o.dtype), *of_mlp)
    do, dw_out, db_out = linear_grads(ctx, "out", da, o, w_out, wanted.w_out, wanted.b_out)
    w_q, w_k, w_v = w_in.view(3, options.heads, -1, width).unbind(0)
    do_h = _heads_first(do, options)
    dquery, dy = compute(
        ctx.plans, attention_pool_bwd, "", do_h.bmm(w_v).transpose(0, 1), query, y.view(ctx.shape), seen, lse,
        ctx.longest,
    )  # fmt: skip
    dquery = dquery.transpose(0, 1)
    dq = dquery.bmm(w_k.transpose(1, 2)).transpose(0, 1).reshape(o.shape) * options.scale
    dw_in, db_in = None, None
    if wanted.w_in:
        dw_in = torch.empty_like(w_in)
        dw_q, dw_k, dw_v = dw_in.chunk(3)
        torch.mm(dq.t(), y_r, out=dw_q)
        torch.bmm(q.transpose(1, 2), dquery, out=dw_k.view(w_k.shape))
        torch.bmm(do_h.transpose(1, 2), pooled.transpose(0, 1), out=dw_v.view(w_v.shape))
    if wanted.b_in:
        # The gradient of the keys' bias is zero, since a bias of the keys cancels in the softmax.
        db_in = torch.zeros(3 * width, dtype=wanted.b_in, device=s.device)
        db_q, _, db_v = db_in.chunk(3)
        torch.sum(dq, 0, dtype=wanted.b_in, out=db_q)
        torch.sum(do, 0, dtype=wanted.b_in, out=db_v)
    dy = _add_rows(dy.view(s.shape), dq.mm(w_q.view(width, width)), place, ctx.shape[1])
    dy = dy if dy.dtype is ctx.y_dtype else dy.to(ctx.y_dtype)
    with_sums = bool(wanted.norm_1 or wanted.norm_1_bias)
    ds, du, of_norm_1 = compute(
        ctx.plans, layer_norm_bwd, ("norm_1", with_sums), dy, None, s, norm, mean, rstd, with_sums
    )
    du = _add_rows(du, dt, place, ctx.shape[1]) if s.dtype != dy.dtype else ds
    _add_rows(ds, dt, place, ctx.shape[1])
    of_parameters = (*pair(of_norm_1), *pair(of_norm_2), dw_in, db_in, dw_out, db_out, *mlp_grads)
    return (ds, du if ctx.has_branch else None, *in_dtypes(of_parameters, wanted))


_FUNCTION = Function(_forward, _backward)


def _seen(
    options: Options, rows: Tensor | PackedText | None, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Return the indices, among all tokens of the last block, of the rows that are read (None: each sequence's first).

    The second and third results are the last two arguments of attention pooling: the number of tokens that each row
    attends to (None: all) and None, or for packed texts their cumulative lengths and a bound of the lengths.
    """
    if isinstance(rows, PackedText):
        return rows.last, rows.packing.cu_seqlens, rows.max_seqlen
    batch, length = shape[:2]
    if rows is None:
        return None, torch.ones(batch, dtype=torch.int32, device=device) if options.causal else None, None
    place = torch.arange(0, batch * length, length, device=device) + rows
    return place, (rows + 1).to(torch.int32) if options.causal else None, None


def _heads_first(x: Tensor, options: Options) -> Tensor:
    """Return rows of the last block [B, H * D] with the heads first, [H, B, D]."""
    return x.view(len(x), options.heads, -1).transpose(0, 1)


def _add_rows(x: Tensor, rows: Tensor, place: Tensor | None, length: int) -> Tensor:
    """Add gradients to one row of each sequence of the last block, in place; return all rows [B * N, width]."""
    if place is None:
        x[::length] += rows
        return x
    return x.index_add_(0, place, rows.to(x.dtype))
