"""Text embedding: the rows of a table that token ids choose, plus positions, in one pass.

    x_bl = E[t_bl] + P[l]               dP[l] = sum_b g_bl              dE[v] = sum of the g_bl with t_bl = v

Forward goes from the table to the residual stream in one step, and rounds the sum once. It also leaves the ids in 32
bits for backward, -1 where one is no row of the table. Backward reads g twice, since its two sums take the rows in
different orders.

dE needs no atomics. A stable sort of the ids keeps the order of equal ids, and each program takes a chunk of CHUNK rows
in that order. A segment of equal ids that begins and ends inside the chunk is complete, and its sum goes to
dE. The first and the last segment may continue in the neighbouring chunks, so their sums and ids go to a list, which
has two rows for each chunk. That list is sorted as well, so the same kernel sums it, again and again until one chunk is
left, in which every segment is complete. All sums have a fixed order. The number of launches is log_{CHUNK/2}(B L),
even if an id occurs very often, as the start, end and padding tokens do. CHUNK is at least 4, since the list would
otherwise not get shorter. The chunks of a list are shorter than the chunks of g: a list is small, and a program with
many rows would take most of the time. Programs of the first launch search the sorted ids for the rows of dE without a
token, and set them to zero.

Bytes: forward, one row of E and one of x for each token; backward, two rows of g for each token, and dE and dP once.
Method: token and position embeddings of Vaswani et al. 2017, summed by a segmented reduction (Blelloch 1990).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import planned_op, uses_reference
from ..checks import check_device, check_float, check_integers, check_tensor
from ..dtypes import accumulate_dtype, autocast_dtype
from ..launch import triton_runs_on
from ..packing import Packing, packing_for
from . import cpu, launches


@planned_op("text_embed_fwd")
def _text_embed_fwd(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that embeds texts with the memory layout of ``text``.

    It returns the embedded tokens in ``dtype``, and the ids as int32, -1 for an id outside the table.
    """
    module = launches if triton_runs_on(text.device) else cpu
    return module.forward(text, token_embedding, positional_embedding, dtype)


@_text_embed_fwd.register_fake
def _(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = token_embedding.new_empty(*text.shape, token_embedding.shape[1], dtype=dtype)
    return out, text.new_empty(text.shape, dtype=torch.int32)


@planned_op("text_embed_bwd_token")
def _text_embed_bwd_token(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the function that computes the gradient of the table of token embeddings in ``dtype``, for tensors with
    the arguments' layout; ``ids`` are those that forward returns.
    """
    return (launches if triton_runs_on(grad.device) else cpu).backward_token(grad, ids, vocab, dtype)


@_text_embed_bwd_token.register_fake
def _(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(vocab, grad.shape[-1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the token ids for the backward pass."""
    _, token_embedding, positional_embedding, _ = inputs
    ctx.vocab, ctx.token_dtype = len(token_embedding), token_embedding.dtype
    ctx.positions, ctx.pos_dtype = len(positional_embedding), positional_embedding.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tables of token and position embeddings to autograd."""
    if grad is None:
        return (None,) * 4
    (ids,) = ctx.saved_tensors
    grad_token = grad_pos = None
    if ctx.needs_input_grad[1]:
        tensors, options = (grad, ids), (ctx.vocab, ctx.token_dtype)
        bwd, args = _text_embed_bwd_token, (*tensors, *options)
        grad_token = (bwd.find(options, tensors) or bwd.learn(options, tensors, args))(*args)
    if ctx.needs_input_grad[2]:
        # PyTorch's sum reads 16 bits, adds in float32, rounds once and has a fixed order. A kernel of ours could fuse
        # nothing more.
        if grad.dtype == ctx.pos_dtype:
            grad_pos = grad.sum(0)
        else:
            grad_pos = grad.sum(0, dtype=accumulate_dtype(grad.dtype)).to(ctx.pos_dtype)
        unused = ctx.positions - grad_pos.shape[0]
        if unused:
            grad_pos = F.pad(grad_pos, (0, 0, 0, unused))
    return None, grad_token, grad_pos, None


_text_embed_fwd.register_autograd(_backward, setup_context=_setup_context)


@planned_op("text_embed_packed_fwd")
def _text_embed_packed_fwd(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, bounds: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that embeds packed texts.

    It returns the embedded tokens [T, N] in ``dtype``, and their ids and positions as int32 [2, T]. An id outside the
    table is returned as -1. For a token that belongs to no text, id and position are both -1.
    """
    return (launches if triton_runs_on(text.device) else cpu).forward_packed


@_text_embed_packed_fwd.register_fake
def _(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, bounds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = token_embedding.new_empty(*text.shape, token_embedding.shape[1], dtype=dtype)
    return out, torch.empty_like(bounds)


def _setup_packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the ids and positions of packed texts for the backward pass."""
    ctx.tables = [(len(table), table.dtype) for table in inputs[1:3]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _packed_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of packed texts' token and position tables, both summed by index, to autograd."""
    if grad is None:
        return (None,) * 5
    bwd, free = _text_embed_bwd_token, () if triton_runs_on(grad.device) else (1, 1)
    grads: list[Tensor | None] = [None, None]
    for k, (indices, table) in enumerate(zip(ctx.saved_tensors[0], ctx.tables, strict=True)):
        if ctx.needs_input_grad[1 + k]:
            tensors = grad, indices
            args = *tensors, *table
            grads[k] = (bwd.find(table, tensors, free) or bwd.learn(table, tensors, args, free))(*args)
    return None, *grads, None, None


_text_embed_packed_fwd.register_autograd(_packed_backward, setup_context=_setup_packed_context)


def text_embed(
    text: Tensor,
    token_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    cu_seqlens: Tensor | Packing | None = None,
    backend: str = "auto",
) -> Tensor:
    """Embed the token ids of texts: the row of each id in the table plus the row of its position, added in float32.

    Under autocast the result has the autocast dtype. The table is read as it is; no copy of it is made.

    Args:
        text: [B, L] ids, int64 or int32, any strides.
        token_embedding: the table [V, N], float32, float16 or bfloat16 (float64 on the CPU), any strides.
        positional_embedding: [L or more, N], any floating dtype, any strides. Rows past L get a gradient of zero.
        cu_seqlens: int32 [B + 1] or a :class:`Packing`, for texts of several lengths that lie behind one another in
            ``text`` [T], as :func:`attention` takes them. The positions of each text begin at 0. Tokens that belong to
            no text become zeros.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, L, N] in the dtype of ``token_embedding``, contiguous; [T, N] with ``cu_seqlens``. Each gradient is summed
        in float32 and rounded once to the dtype of its parameter.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
        IndexError: on a CPU, an id that is no row of the table, or a packed text with more tokens than positions. On a
            GPU the check would have to wait for the device. There such a token is undefined, but nothing outside the
            tables is read or written, and the gradient of the table is that of the other ids.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "text_embed"
    tensors = text, token_embedding, positional_embedding
    if cu_seqlens is not None:
        return _text_embed_packed(*tensors, cu_seqlens, backend)
    compute = _text_embed_fwd.find((backend,), tensors)
    if compute is not None:
        return compute(*tensors, None)[0]
    _check_inputs(text, token_embedding, positional_embedding, 2)
    dtype = autocast_dtype(token_embedding)
    if uses_reference(op, backend, text):
        return reference.text_embed(text, token_embedding, positional_embedding).to(dtype)
    check_float(op, token_embedding=token_embedding, positional_embedding=positional_embedding)
    return _text_embed_fwd.learn((backend,), tensors, (*tensors, dtype))(*tensors, dtype)[0]


def _text_embed_packed(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, cu_seqlens: Tensor | Packing, backend: str
) -> Tensor:
    """Embed packed texts, as :func:`text_embed` documents it."""
    op, fwd, tables, options = "text_embed", _text_embed_packed_fwd, (token_embedding, positional_embedding), (backend,)
    if not isinstance(cu_seqlens, Packing):
        _check_text(text, 1)
        cu_seqlens = packing_for(op, cu_seqlens, text)
    tensors = text, *tables, cu_seqlens.bounds
    compute = fwd.find(options, tensors, _free_sizes(cu_seqlens))
    if compute is not None and cu_seqlens.bounds.shape == (2, *text.shape):
        return compute(*tensors, autocast_dtype(token_embedding))[0]
    _check_inputs(text, *tables, 1)
    packing = packing_for(op, cu_seqlens, text)
    dtype = autocast_dtype(token_embedding)
    if uses_reference(op, backend, text):
        return reference.text_embed(text, *tables, cu_seqlens=packing).to(dtype)
    check_float(op, token_embedding=token_embedding, positional_embedding=positional_embedding)
    args = *tensors, dtype
    return fwd.learn(options, tensors, args, _free_sizes(packing))(*args)[0]


def _free_sizes(packing: Packing) -> tuple[int, ...]:
    """Return the argument ``free`` of ``Op.find`` for packed texts, the two tables and the bounds: for each of these
    tensors, how many of its first sizes may differ from those of the planned call.
    """
    # A function for CPUs serves any number of tokens. A launch on a GPU is planned for one number, of which few occur.
    return () if triton_runs_on(packing.bounds.device) else (1, 0, 0, 2)


def _check_text(text: Tensor, ndim: int) -> None:
    """Refuse token ids that are no tensor of integers with ``ndim`` dimensions."""
    check_integers("text_embed", "text", text)
    if text.ndim != ndim:
        raise ValueError(f"text_embed: text must be {('[T]', '[B, L]')[ndim - 1]}, got shape {tuple(text.shape)}")


def _check_inputs(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, ndim: int) -> None:
    """Refuse inputs whose types, shapes or devices do not fit together."""
    _check_text(text, ndim)
    check_tensor("text_embed", "token_embedding", token_embedding, 2)
    check_tensor("text_embed", "positional_embedding", positional_embedding, 2)
    length, width = text.shape[1] if ndim == 2 else 0, token_embedding.shape[1]
    pos_shape = tuple(positional_embedding.shape)
    if pos_shape[0] < length or pos_shape[1] != width:
        raise ValueError(
            f"text_embed: positional_embedding must be [{length} or more, {width}] for text {tuple(text.shape)} "
            f"and token_embedding {tuple(token_embedding.shape)}, got {pos_shape}"
        )
    check_device("text_embed", "token_embedding", token_embedding, "text", text)
    check_device("text_embed", "positional_embedding", positional_embedding, "text", text)
