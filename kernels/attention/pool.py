"""Attention pooling: a few queries as wide as the tokens, which are keys and values at once.

Per image, with queries q [H, C] and tokens x [N, C]:

    p_hn = exp(q_h . x_n - lse_h)       lse_h = logsumexp_n q_h . x_n       o_h = sum_n p_hn x_n
    dp_hn = do_h . x_n                  ds_hn = p_hn (dp_hn - sum_m p_hm dp_hm)
    dq_h = sum_n ds_hn x_n              dx_n = sum_h p_hn do_h + ds_hn q_h

CLIP's ResNets pool with one query per head, so that a head's key projection can be folded into its query and its value
projection applied to what was pooled: with C = 2048 and N = 50 that is one fiftieth of the products. The last block of
a transformer that is read at one row is such a pooling too; in a causal one that row sees the tokens up to its own.

Bytes: the tokens are read twice forward, the second time from the cache, and thrice backward. FLOPs: 4 B H N C forward,
10 B H N C backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..backends import outside_autocast, uses_reference
from ..checks import check_float, check_like, check_tensor
from ..common import LOG2E
from ..configs import row_config
from ..dtypes import accumulate_dtype, autocast_to
from ..launch import arch_of, launch, triton_runs_on
from .op import check_seqlens

MAX_HEADS, MAX_TOKENS = 64, 1024
MAX_TILE = 16384  # elements of a tile of tokens


@triton.jit
def _load(ptr, rows, num_rows, stride_r, columns, num_columns, stride_c):
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offs = rows.to(tl.int64)[:, None] * stride_r + columns.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _pool_fwd_kernel(
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C]
    out_ptr,  # [B, H, C] contiguous
    lse_ptr,  # [B, H] fp32, base 2
    seqlens_ptr,  # [B]
    H, N, C,
    stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns an image."""
    b = tl.program_id(0).to(tl.int64)
    if HAS_SEQLENS:
        N = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
    q_ptr += b * stride_qb
    x_ptr += b * stride_xb
    heads, tokens = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    scores = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        x = _load(x_ptr, tokens, N, stride_xn, columns, C, stride_xc)  # [BN, BK]
        scores = tl.dot(q, x.T, scores, input_precision="ieee")
    scores = tl.where((tokens < N)[None, :], scores * log2e, float("-inf"))
    row_max = tl.max(scores, 1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # no token at all: not -inf less -inf
    p = tl.exp2(scores - row_max[:, None])
    row_sum = tl.sum(p, 1)
    # backward, exp2 of anything less this is 0
    lse = tl.where(row_sum == 0.0, float("inf"), row_max + tl.log2(row_sum))
    tl.store(lse_ptr + b * H + heads, lse, mask=heads < H)
    p = (p / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]).to(x_ptr.dtype.element_ty)  # [BH, BN]
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, tokens, N, stride_xn, columns, C, stride_xc)  # [BN, BK]
        out = tl.dot(p, x, input_precision="ieee")
        pointers = out_ptr + (b * H + heads)[:, None] * C + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None] & (columns < C)[None, :])


@triton.jit
def _pool_bwd_kernel(
    grad_ptr,  # [B, H, C]
    q_ptr,  # [B, H, C]
    x_ptr,  # [B, N, C]
    lse_ptr,  # [B, H] fp32, base 2
    dq_ptr,  # [B, H, C] contiguous
    dx_ptr,  # [B, N, C] contiguous
    seqlens_ptr,  # [B]
    H, N, C,
    stride_gb, stride_gh, stride_gc, stride_qb, stride_qh, stride_qc, stride_xb, stride_xn, stride_xc, log2e,
    HAS_SEQLENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns an image; a token that no query sees gets a gradient of zero."""
    b = tl.program_id(0).to(tl.int64)
    num_tokens = N
    if HAS_SEQLENS:
        num_tokens = tl.minimum(tl.load(seqlens_ptr + b), N).to(tl.int32)
    dtype = x_ptr.dtype.element_ty
    grad_ptr += b * stride_gb
    q_ptr += b * stride_qb
    x_ptr += b * stride_xb
    heads, tokens = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    scores = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        do = _load(grad_ptr, heads, H, stride_gh, columns, C, stride_gc)  # [BH, BK]
        x = _load(x_ptr, tokens, num_tokens, stride_xn, columns, C, stride_xc)  # [BN, BK]
        scores = tl.dot(q, x.T, scores, input_precision="ieee")
        dp = tl.dot(do, x.T, dp, input_precision="ieee")
    lse = tl.load(lse_ptr + b * H + heads, mask=heads < H, other=0.0)
    is_there = (heads < H)[:, None] & (tokens < num_tokens)[None, :]
    p = tl.where(is_there, tl.exp2(scores * log2e - lse[:, None]), 0.0)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(dtype)  # [BH, BN]
    p = p.to(dtype)
    for start in range(0, C, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        q = _load(q_ptr, heads, H, stride_qh, columns, C, stride_qc)  # [BH, BK]
        do = _load(grad_ptr, heads, H, stride_gh, columns, C, stride_gc)  # [BH, BK]
        x = _load(x_ptr, tokens, num_tokens, stride_xn, columns, C, stride_xc)  # [BN, BK]
        mask_c = (columns < C)[None, :]
        dq = tl.dot(ds, x, input_precision="ieee")
        pointers = dq_ptr + (b * H + heads)[:, None] * C + columns[None, :]
        tl.store(pointers, dq.to(dq_ptr.dtype.element_ty), mask=(heads < H)[:, None] & mask_c)
        dx = tl.dot(ds.T, q, tl.dot(p.T, do, input_precision="ieee"), input_precision="ieee")
        pointers = dx_ptr + (b * N + tokens)[:, None] * C + columns[None, :]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=(tokens < N)[:, None] & mask_c)


def _constexprs(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> dict[str, Any]:
    cfg = row_config("attention_pool", arch_of(query.device), query.dtype)
    block_h, block_n = (max(16, triton.next_power_of_2(x.shape[1])) for x in (query, tokens))
    return {
        "config": cfg, "device": query.device, "HAS_SEQLENS": seqlens is not None,
        "BLOCK_H": block_h, "BLOCK_N": block_n, "BLOCK_K": min(cfg.block_n, MAX_TILE // block_n),
    }  # fmt: skip


def _wide(*tensors: Tensor) -> list[Tensor]:
    # products in float32 at least, as in the kernels
    return [x.to(accumulate_dtype(x.dtype)) for x in tensors]


def _without_hidden(tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with zeros where no query looks, where there may be anything, and [B, 1, N] which these are."""
    if seqlens is None:
        return tokens, None
    hidden = torch.arange(tokens.shape[1], device=tokens.device) >= seqlens[:, None]
    return tokens.masked_fill(hidden[..., None], 0), hidden[:, None]


def _fwd_cpu(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the kernel, but for the base of the log-sum-exp, which is e."""
    q, x = _wide(query, tokens)
    x, hidden = _without_hidden(x, seqlens)
    scores = q @ x.transpose(1, 2)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    return ((scores - lse).exp() @ x).to(query.dtype), lse.squeeze(-1)


def _bwd_cpu(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    do, q, x = _wide(grad_out, query, tokens)
    x, hidden = _without_hidden(x, seqlens)
    p = (q @ x.transpose(1, 2) - lse[..., None]).exp_()
    if hidden is not None:
        p.masked_fill_(hidden, 0)
    dp = do @ x.transpose(1, 2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dx = p.transpose(1, 2) @ do + ds.transpose(1, 2) @ q
    return (ds @ x).to(query.dtype), dx.to(tokens.dtype)


@torch.library.custom_op("clipfast::attention_pool_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _pool_fwd(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    if not triton_runs_on(query.device):
        return _fwd_cpu(query, tokens, seqlens)
    (batch, heads, width), n = query.shape, tokens.shape[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    launch(
        _pool_fwd_kernel, (batch,), query, tokens, out, lse, seqlens, heads, n, width,
        *query.stride(), *tokens.stride(), LOG2E, **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    return out, lse


@_pool_fwd.register_fake
def _(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))


@torch.library.custom_op("clipfast::attention_pool_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _pool_bwd(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    if not triton_runs_on(query.device):
        return _bwd_cpu(grad_out, query, tokens, seqlens, lse)
    (batch, heads, width), n = query.shape, tokens.shape[1]
    dq, dx = query.new_empty(query.shape), tokens.new_empty(tokens.shape)
    launch(
        _pool_bwd_kernel, (batch,), grad_out, query, tokens, lse, dq, dx, seqlens, heads, n, width,
        *grad_out.stride(), *query.stride(), *tokens.stride(), LOG2E, **_constexprs(query, tokens, seqlens),
    )  # fmt: skip
    return dq, dx


@_pool_bwd.register_fake
def _(grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), tokens.new_empty(tokens.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_out is None:
        return None, None, None
    dq, dx = torch.ops.clipfast.attention_pool_bwd(grad_out, *ctx.saved_tensors)
    return dq, dx, None


_pool_fwd.register_autograd(_backward, setup_context=_setup_context)


def attention_pool(query: Tensor, tokens: Tensor, *, seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention in which the tokens are keys and values of every query.

    Args:
        query: [B, H, C], scaled already; float32, float16 or bfloat16 (float64 on the CPU); any strides. H is at most
            64. Under autocast it is taken in the autocast dtype.
        tokens: [B, N, C], same dtype and device; N is from 1 to 1,024 outside the reference.
        seqlens: [B], integers: only so many tokens of each image are looked at, and where that is none the result is
            zero. Default: all.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, H, C]: for each query, the mean of the tokens by their weights.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention_pool"
    check_tensor(op, "query", query, 3)
    check_tensor(op, "tokens", tokens, 3)
    check_like(op, "tokens", tokens, "query", query)
    if query.shape[::2] != tokens.shape[::2] or tokens.shape[1] == 0:
        raise ValueError(
            f"{op}: query must be [B, H, C] and tokens [B, N, C] with at least one token, "
            f"got {tuple(query.shape)} and {tuple(tokens.shape)}"
        )
    seqlens = check_seqlens(op, seqlens, query)
    query, tokens = autocast_to(query), autocast_to(tokens)
    if uses_reference(op, backend, query):
        return reference.attention_pool(query, tokens, seqlens=seqlens)
    check_float(op, "query", query)
    if query.shape[1] > MAX_HEADS or tokens.shape[1] > MAX_TOKENS:
        raise ValueError(
            f"{op}: at most {MAX_HEADS} queries and {MAX_TOKENS} tokens, got {query.shape[1]} and {tokens.shape[1]}: "
            "use attention_qkv or backend='torch'"
        )
    return _pool_fwd(query, tokens, seqlens)[0]
