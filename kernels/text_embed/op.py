"""Text embedding: the rows of a table that token ids choose, and the positions, in one pass.

    x_bl = E[t_bl] + P[l]               dP[l] = sum_b g_bl              dE[v] = sum of the g_bl with t_bl = v

Forward goes from the table to the residual stream in one step, and rounds the sum once. Backward reads g twice, since
its two sums take the rows in different orders.

dE without atomics: ids are sorted (stably: equal ones keep their order), and a program walks CHUNK rows in that order.
A segment of equal ids that begins and ends inside the chunk is complete and goes to dE. The first and the last one may
go on in the neighbours: their sums go, with their ids, to a list of two rows for each chunk. That list is sorted as
well, so the same kernel takes it, until one chunk is left, in which every segment is complete. All sums have a fixed
order and are made in log_{CHUNK/2}(B L) launches (CHUNK is 4 at least, or the list would not get shorter), however
many rows an id has: start, end and padding are in every text.

Bytes: forward one row of E and one of x for each token; backward two rows of g for each token, and dE and dP.
Method: token and position embeddings of Vaswani et al. 2017, summed up as a segmented reduction (Blelloch 1990).
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..backends import outside_autocast, uses_reference
from ..checks import check_float, check_tensor
from ..common import as_rows
from ..configs import row_config
from ..dtypes import accumulate_dtype, autocast_dtype, dtype_name
from ..launch import arch_of, launch, programs_at_once, triton_runs_on

FWD_REGISTERS = 64  # of a thread, about


@triton.jit
def _text_embed_fwd_kernel(
    text_ptr,  # [B, L]
    table_ptr,  # [V, N]
    pos_ptr,  # [L, N]
    out_ptr,  # [B, L, N] contiguous
    B, L, N, V,
    stride_tb, stride_tl, stride_ev, stride_en, stride_pl, stride_pn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M positions x BLOCK_N columns and walks texts, so that positions are loaded once."""
    num_n = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(L, BLOCK_M) * num_n
    tile = tl.program_id(0) % num_tiles
    offs_l = (tile // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_l, mask_n = offs_l < L, offs_n < N
    mask = mask_l[:, None] & mask_n[None, :]
    pos_tile = pos_ptr + offs_l[:, None] * stride_pl + offs_n[None, :] * stride_pn
    pos = tl.load(pos_tile, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    first, step = (tl.program_id(0) // num_tiles).to(tl.int64), tl.num_programs(0) // num_tiles
    for text in tl.range(first, B, step, num_stages=NUM_STAGES):
        ids = tl.load(text_ptr + text * stride_tb + offs_l * stride_tl, mask=mask_l, other=-1).to(tl.int64)  # [BM]
        in_table = (ids >= 0) & (ids < V)  # nothing outside is read, whatever the ids are
        rows = table_ptr + ids[:, None] * stride_ev + offs_n[None, :] * stride_en
        x = tl.load(rows, mask=in_table[:, None] & mask_n[None, :], other=0.0).to(tl.float32) + pos  # [BM, BN]
        tokens = (text * L + offs_l)[:, None]
        tl.store(out_ptr + tokens * N + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _segment_sums_kernel(
    rows_ptr,  # [M, N]
    order_ptr,  # [M] int64, the row that belongs to each id; without it they lie in the order of the ids
    ids_ptr,  # [M] int32, equal ones side by side; -1: no row
    out_ptr,  # [V, N] contiguous
    sums_ptr,  # [2 chunks, N] fp32
    sum_ids_ptr,  # [2 chunks] int32
    M, N, stride_m, stride_n,
    HAS_ORDER: tl.constexpr, IS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A program sums the segments of CHUNK rows x BLOCK_N columns; those at the ends are a partial sum each."""
    num_n = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // num_n).to(tl.int64)
    block_n = tl.program_id(0) % num_n
    offs_n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    current = tl.full((), -1, tl.int32)  # id of the open segment
    first = tl.full((), -1, tl.int32)  # id of the first segment, as soon as it is closed
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, M), num_stages=NUM_STAGES):
        token = tl.load(ids_ptr + i)
        row = tl.load(order_ptr + i) if HAS_ORDER else i
        x = tl.load(
            rows_ptr + row * stride_m + offs_n * stride_n, mask=offs_n < tl.where(token >= 0, N, 0), other=0.0
        )  # [BN]
        opens = (token >= 0) & (token != current)
        closes = opens & (current >= 0)
        # masks, not branches: the loads of rows to come run ahead of the stores
        is_complete = closes
        if not IS_LAST:
            is_complete = closes & (first >= 0)
            is_first = closes & (first < 0)
            tl.store(sums_ptr + 2 * chunk * N + offs_n, acc, mask=offs_n < tl.where(is_first, N, 0))
            first = tl.where(is_first, current, first)
        of_current = out_ptr + current.to(tl.int64) * N + offs_n
        tl.store(of_current, acc.to(out_ptr.dtype.element_ty), mask=offs_n < tl.where(is_complete, N, 0))
        acc = tl.where(opens, 0.0, acc) + x.to(tl.float32)
        current = tl.where(opens, token, current)
    mask = offs_n < tl.where(current >= 0, N, 0)
    if IS_LAST:
        tl.store(out_ptr + current.to(tl.int64) * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        is_only = first < 0  # one segment, or none: the second place stays empty
        place = 2 * chunk + tl.where(is_only, 0, 1)
        tl.store(sums_ptr + place * N + offs_n, acc, mask=mask)
        if block_n == 0:
            tl.store(sum_ids_ptr + 2 * chunk, tl.where(is_only, current, first))
            tl.store(sum_ids_ptr + 2 * chunk + 1, tl.where(is_only, -1, current))


def _fwd_triton(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    (batch, length), (vocab, width) = text.shape, token_embedding.shape
    out = token_embedding.new_empty(batch, length, width, dtype=dtype)
    cfg = row_config("text_embed_fwd", arch_of(text.device), dtype)
    tiles = triton.cdiv(length, cfg.block_m) * triton.cdiv(width, cfg.block_n)
    at_once = programs_at_once(text.device, cfg.num_warps, FWD_REGISTERS)
    walkers = min(batch, max(1, at_once // max(1, tiles)))
    launch(
        _text_embed_fwd_kernel, (walkers * tiles,), text, token_embedding, positional_embedding, out,
        batch, length, width, vocab, *text.stride(), *token_embedding.stride(), *positional_embedding.stride(),
        config=cfg, device=text.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    return out


def _bwd_token_triton(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    rows, ids = as_rows(grad), text.reshape(-1)
    ids, order = torch.where((ids >= 0) & (ids < vocab), ids, -1).to(torch.int32).sort(stable=True)
    out = grad.new_zeros(vocab, grad.shape[-1], dtype=dtype)
    cfg = row_config("text_embed_bwd", arch_of(grad.device), grad.dtype)
    num_n = triton.cdiv(rows.shape[1], cfg.block_n)
    has_order, is_last = True, False
    while not is_last:
        chunks = triton.cdiv(len(ids), cfg.block_m)
        is_last = chunks <= 1
        sums = rows.new_empty(0 if is_last else 2 * chunks, rows.shape[1], dtype=torch.float32)
        sum_ids = ids.new_empty(len(sums))
        launch(
            _segment_sums_kernel, (chunks * num_n,), rows, order if has_order else None, ids, out, sums, sum_ids,
            *rows.shape, *rows.stride(),
            config=cfg, device=grad.device, HAS_ORDER=has_order, IS_LAST=is_last,
            CHUNK=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
        )  # fmt: skip
        rows, ids, has_order = sums, sum_ids, False
    return out


def _fwd_cpu(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    vocab, work = len(token_embedding), accumulate_dtype(token_embedding.dtype)
    outside = (text < 0) | (text >= vocab)
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"text_embed: text must be ids of the {vocab} rows of token_embedding, got {int(text[first])} at {first}"
        )
    rows = F.embedding(text, token_embedding).to(work)
    return rows.add_(positional_embedding[: text.shape[1]]).to(dtype)


def _bwd_token_cpu(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    # a row of the table belongs to one thread, which adds in the order of the tokens
    work = grad.to(accumulate_dtype(grad.dtype))
    return torch.ops.aten.embedding_dense_backward(work, text, vocab, -1, False).to(dtype)


@torch.library.custom_op("clipfast::text_embed_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _text_embed_fwd(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``."""
    fwd = _fwd_triton if triton_runs_on(text.device) else _fwd_cpu
    return fwd(text, token_embedding, positional_embedding, dtype)


@_text_embed_fwd.register_fake
def _(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    return token_embedding.new_empty(*text.shape, token_embedding.shape[1], dtype=dtype)


@torch.library.custom_op("clipfast::text_embed_bwd_token", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _text_embed_bwd_token(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the table, in ``dtype``."""
    bwd = _bwd_token_triton if triton_runs_on(text.device) else _bwd_token_cpu
    return bwd(grad, text, vocab, dtype)


@_text_embed_bwd_token.register_fake
def _(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(vocab, grad.shape[-1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, token_embedding, positional_embedding, _ = inputs
    ctx.vocab, ctx.token_dtype = len(token_embedding), token_embedding.dtype
    ctx.positions, ctx.pos_dtype = len(positional_embedding), positional_embedding.dtype
    ctx.save_for_backward(text)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (text,) = ctx.saved_tensors
    grad_token = grad_pos = None
    if ctx.needs_input_grad[1]:
        grad_token = torch.ops.clipfast.text_embed_bwd_token(grad, text, ctx.vocab, ctx.token_dtype)
    if ctx.needs_input_grad[2]:
        # PyTorch's sum reads 16 bits, adds in float32 and has an order of its own; there is nothing to fuse with it
        used = grad.sum(0, dtype=accumulate_dtype(grad.dtype))
        grad_pos = F.pad(used, (0, 0, 0, ctx.positions - used.shape[0])).to(ctx.pos_dtype)
    return None, grad_token, grad_pos, None


_text_embed_fwd.register_autograd(_backward, setup_context=_setup_context)


def text_embed(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, *, backend: str = "auto") -> Tensor:
    """Tokens of a text transformer from their ids: a row of the table for each, and its position's, added in float32.

    Under autocast the result has the autocast dtype; the table is read as it is, and no copy of it is made.

    Args:
        text: [B, L] ids, int64 or int32, any strides.
        token_embedding: table [V, N], float32, float16 or bfloat16 (float64 on the CPU), any strides.
        positional_embedding: [L or more, N], of any floating dtype, any strides. Rows past L get a gradient of zero.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, L, N] in the dtype of ``token_embedding``, contiguous. Gradients are summed up in float32, and rounded once
        to the dtype of what they belong to.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
        IndexError: on the CPU, an id that is no row of the table. A GPU would have to wait for the answer: there the
            result for such an id is undefined, nothing outside the table is read or written, and the id has no part in
            the gradient of the table.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "text_embed"
    _check_inputs(text, token_embedding, positional_embedding)
    dtype = autocast_dtype(token_embedding)
    if uses_reference(op, backend, text):
        return reference.text_embed(text, token_embedding, positional_embedding).to(dtype)
    check_float(op, "token_embedding", token_embedding)
    check_float(op, "positional_embedding", positional_embedding)
    return _text_embed_fwd(text, token_embedding, positional_embedding, dtype)


def _check_inputs(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor) -> None:
    if not isinstance(text, Tensor) or text.dtype not in (torch.int64, torch.int32):
        got = dtype_name(text.dtype) if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"text_embed: text must be an int32 or int64 tensor, got {got}")
    if text.ndim != 2:
        raise ValueError(f"text_embed: text must be [B, L], got shape {tuple(text.shape)}")
    check_tensor("text_embed", "token_embedding", token_embedding, 2)
    check_tensor("text_embed", "positional_embedding", positional_embedding, 2)
    (length, width), pos_shape = (text.shape[1], token_embedding.shape[1]), tuple(positional_embedding.shape)
    if pos_shape[0] < length or pos_shape[1] != width:
        raise ValueError(
            f"text_embed: positional_embedding must be [{length} or more, {width}] for text {tuple(text.shape)} "
            f"and token_embedding {tuple(token_embedding.shape)}, got {pos_shape}"
        )
    for name, tensor in {"token_embedding": token_embedding, "positional_embedding": positional_embedding}.items():
        if tensor.device != text.device:
            raise ValueError(f"text_embed: {name} is on {tensor.device}, but text is on {text.device}")
