"""Attention on a packed projection: [B, N, 3 H D] in, [B, N, H D] out, read and written in place of any transpose or
copy.

Per image and head, with scores s_ij = q_i . k_j / sqrt(D) (j <= i where causal):

    p_ij = exp(s_ij - lse_i)        lse_i = logsumexp_j s_ij        o_i = sum_j p_ij v_j
    delta_i = do_i . o_i            ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = sum_j ds_ij k_j / sqrt(D)      dk_j = sum_i ds_ij q_i / sqrt(D)      dv_j = sum_i p_ij do_i

Bytes: forward 4 N D items + 4 N (lse), backward 12 N D items; FLOPs 4 N^2 D forward, 14 N^2 D backward (two kernels
recompute the scores, so that each gradient has one writer and the result is deterministic).
Method: FlashAttention (Dao et al. 2022) and FlashAttention-2 (Dao 2023).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu, reference
from ._launch import (
    LOG2E,
    accumulate_dtype,
    arch_of,
    autocast_to,
    check_float,
    check_tensor,
    launch,
    outside_autocast,
    triton_runs_on,
    uses_reference,
)
from ._tiles import online_softmax_step
from .configs import AttentionConfig, attention_config

MAX_HEAD_DIM = 128


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # [B, N, 3, H, D]
    out_ptr,  # [B, N, H, D] contiguous
    lse_ptr,  # [B, H, N] fp32, base 2
    N, H,
    stride_qkv_b, stride_qkv_n, stride_qkv_c,
    qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head and walks the keys; qk_scale = log2(e) / sqrt(D)."""
    num_m = tl.cdiv(N, BLOCK_M)
    pid_bh = tl.program_id(0) // num_m
    pid_m = tl.program_id(0) % num_m
    b = (pid_bh // H).to(tl.int64)
    h = pid_bh % H
    width = H * HEAD_DIM
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_m = offs_m < N
    columns = (h * HEAD_DIM + offs_d).to(tl.int64)  # [BD]
    base = qkv_ptr + b * stride_qkv_b
    q_base = base + columns * stride_qkv_c
    k_base = base + (columns + width) * stride_qkv_c
    v_base = base + (columns + 2 * width) * stride_qkv_c
    q_tile = q_base[None, :] + offs_m.to(tl.int64)[:, None] * stride_qkv_n
    q = tl.load(q_tile, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BM, BD]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end_n = tl.minimum(N, (pid_m + 1) * BLOCK_M) if IS_CAUSAL else N
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows = offs_n.to(tl.int64) * stride_qkv_n  # [BN]
        k = tl.load(k_base[:, None] + rows[None, :], mask=mask_d[:, None] & mask_n[None, :], other=0.0)  # [BD, BN]
        v = tl.load(v_base[None, :] + rows[:, None], mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BN, BD]
        scores = tl.dot(q, k, input_precision=PRECISION)  # [BM, BN]
        visible = mask_n[None, :] & (offs_n[None, :] <= offs_m[:, None]) if IS_CAUSAL else mask_n[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        p, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, qk_scale)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    out = out_ptr + (b * N + offs_m)[:, None] * width + h * HEAD_DIM + offs_d[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])
    tl.store(lse_ptr + pid_bh.to(tl.int64) * N + offs_m, row_max * qk_scale + tl.log2(row_sum), mask=mask_m)


@triton.jit
def _attention_bwd_dq_kernel(
    qkv_ptr,  # [B, N, 3, H, D]
    out_ptr,  # [B, N, H, D] contiguous
    lse_ptr,  # [B, H, N] fp32, base 2
    grad_out_ptr,  # [B, N, H, D]
    grad_qkv_ptr,  # [B, N, 3, H, D] contiguous
    delta_ptr,  # [B, H, N] fp32
    N, H,
    stride_qkv_b, stride_qkv_n, stride_qkv_c, stride_do_b, stride_do_n, stride_do_c,
    qk_scale, sm_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries: writes their delta and dq."""
    num_m = tl.cdiv(N, BLOCK_M)
    pid_bh = tl.program_id(0) // num_m
    pid_m = tl.program_id(0) % num_m
    b = (pid_bh // H).to(tl.int64)
    h = pid_bh % H
    width = H * HEAD_DIM
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_m = offs_m < N
    mask_md = mask_m[:, None] & mask_d[None, :]
    columns = (h * HEAD_DIM + offs_d).to(tl.int64)  # [BD]
    rows_m = offs_m.to(tl.int64)
    base = qkv_ptr + b * stride_qkv_b
    q_base = base + columns * stride_qkv_c
    k_base = base + (columns + width) * stride_qkv_c
    v_base = base + (columns + 2 * width) * stride_qkv_c
    grad_tile = grad_out_ptr + b * stride_do_b + rows_m[:, None] * stride_do_n + columns[None, :] * stride_do_c
    q = tl.load(q_base[None, :] + rows_m[:, None] * stride_qkv_n, mask=mask_md, other=0.0)  # [BM, BD]
    do = tl.load(grad_tile, mask=mask_md, other=0.0)  # [BM, BD]
    o = tl.load(out_ptr + (b * N + rows_m)[:, None] * width + columns[None, :], mask=mask_md, other=0.0)  # [BM, BD]
    stats = pid_bh.to(tl.int64) * N + offs_m
    lse = tl.load(lse_ptr + stats, mask=mask_m, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # [BM]
    tl.store(delta_ptr + stats, delta, mask=mask_m)
    acc_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end_n = tl.minimum(N, (pid_m + 1) * BLOCK_M) if IS_CAUSAL else N
    for start_n in range(0, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows_n = offs_n.to(tl.int64) * stride_qkv_n  # [BN]
        mask_dn = mask_d[:, None] & mask_n[None, :]
        k = tl.load(k_base[:, None] + rows_n[None, :], mask=mask_dn, other=0.0)  # [BD, BN]
        v = tl.load(v_base[:, None] + rows_n[None, :], mask=mask_dn, other=0.0)  # [BD, BN]
        scores = tl.dot(q, k, input_precision=PRECISION) * qk_scale  # [BM, BN]
        visible = mask_n[None, :] & (offs_n[None, :] <= offs_m[:, None]) if IS_CAUSAL else mask_n[None, :]
        # masked where p is made: a padded key has score 0, and 2^(0 - lse) can be infinite
        p = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(do, v, input_precision=PRECISION)  # [BM, BN]
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        acc_dq = tl.dot(ds, tl.trans(k), acc_dq, input_precision=PRECISION)
    dq = grad_qkv_ptr + (b * N + rows_m)[:, None] * (3 * width) + columns[None, :]
    tl.store(dq, (acc_dq * sm_scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_md)


@triton.jit
def _attention_bwd_dkv_kernel(
    qkv_ptr,  # [B, N, 3, H, D]
    lse_ptr,  # [B, H, N] fp32, base 2
    grad_out_ptr,  # [B, N, H, D]
    grad_qkv_ptr,  # [B, N, 3, H, D] contiguous
    delta_ptr,  # [B, H, N] fp32
    N, H,
    stride_qkv_b, stride_qkv_n, stride_qkv_c, stride_do_b, stride_do_n, stride_do_c,
    qk_scale, sm_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys and walks the queries, on transposed scores: writes dk and dv."""
    num_n = tl.cdiv(N, BLOCK_N)
    pid_bh = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    b = (pid_bh // H).to(tl.int64)
    h = pid_bh % H
    width = H * HEAD_DIM
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_nd = (offs_n < N)[:, None] & mask_d[None, :]
    columns = (h * HEAD_DIM + offs_d).to(tl.int64)  # [BD]
    rows_n = offs_n.to(tl.int64)
    base = qkv_ptr + b * stride_qkv_b
    q_base = base + columns * stride_qkv_c
    k_base = base + (columns + width) * stride_qkv_c
    v_base = base + (columns + 2 * width) * stride_qkv_c
    k = tl.load(k_base[None, :] + rows_n[:, None] * stride_qkv_n, mask=mask_nd, other=0.0)  # [BN, BD]
    v = tl.load(v_base[None, :] + rows_n[:, None] * stride_qkv_n, mask=mask_nd, other=0.0)  # [BN, BD]
    grad_base = grad_out_ptr + b * stride_do_b + columns * stride_do_c
    stats = pid_bh.to(tl.int64) * N
    acc_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_m = (pid_n * BLOCK_N) // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    for start_m in range(first_m, N, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        mask_md = mask_m[:, None] & mask_d[None, :]
        rows_m = offs_m.to(tl.int64)
        q = tl.load(q_base[None, :] + rows_m[:, None] * stride_qkv_n, mask=mask_md, other=0.0)  # [BM, BD]
        do = tl.load(grad_base[None, :] + rows_m[:, None] * stride_do_n, mask=mask_md, other=0.0)  # [BM, BD]
        lse = tl.load(lse_ptr + stats + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + stats + offs_m, mask=mask_m, other=0.0)
        scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale  # [BN, BM]
        visible = mask_m[None, :] & (offs_n[:, None] <= offs_m[None, :]) if IS_CAUSAL else mask_m[None, :]
        p_t = tl.where(visible, tl.exp2(scores_t - lse[None, :]), 0.0)
        acc_dv = tl.dot(p_t.to(do.dtype), do, acc_dv, input_precision=PRECISION)
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        acc_dk = tl.dot(ds_t, q, acc_dk, input_precision=PRECISION)
    dk = grad_qkv_ptr + (b * N + rows_n)[:, None] * (3 * width) + width + columns[None, :]
    tl.store(dk, (acc_dk * sm_scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(dk + width, acc_dv.to(grad_qkv_ptr.dtype.element_ty), mask=mask_nd)


def _fwd_triton(qkv: Tensor, num_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    batch, length, width3 = qkv.shape
    head_dim = width3 // 3 // num_heads
    out = qkv.new_empty(batch, length, width3 // 3)
    lse = torch.empty(batch, num_heads, length, dtype=torch.float32, device=qkv.device)
    cfg = attention_config("attention_fwd", arch_of(qkv.device), qkv.dtype, head_dim)
    launch(
        _attention_fwd_kernel, (batch * num_heads * triton.cdiv(length, cfg.block_m),),
        qkv, out, lse, length, num_heads, *qkv.stride(), LOG2E / math.sqrt(head_dim),
        config=cfg, device=qkv.device, **_constexprs(cfg, head_dim, causal),
    )  # fmt: skip
    return out, lse


def _bwd_triton(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, causal: bool) -> Tensor:
    batch, length, width3 = qkv.shape
    head_dim = width3 // 3 // num_heads
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    arch, blocks = arch_of(qkv.device), batch * num_heads
    sizes = (length, num_heads, *qkv.stride(), *grad_out.stride(), LOG2E / math.sqrt(head_dim), 1 / math.sqrt(head_dim))
    dq = attention_config("attention_bwd_dq", arch, qkv.dtype, head_dim)
    launch(
        _attention_bwd_dq_kernel, (blocks * triton.cdiv(length, dq.block_m),),
        qkv, out, lse, grad_out, grad_qkv, delta, *sizes,
        config=dq, device=qkv.device, **_constexprs(dq, head_dim, causal),
    )  # fmt: skip
    dkv = attention_config("attention_bwd_dkv", arch, qkv.dtype, head_dim)
    launch(
        _attention_bwd_dkv_kernel, (blocks * triton.cdiv(length, dkv.block_n),),
        qkv, lse, grad_out, grad_qkv, delta, *sizes,
        config=dkv, device=qkv.device, **_constexprs(dkv, head_dim, causal),
    )  # fmt: skip
    return grad_qkv


def _constexprs(cfg: AttentionConfig, head_dim: int, causal: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "IS_CAUSAL": causal, "PRECISION": "ieee",
    }  # fmt: skip


@torch.library.custom_op("clipfast::attention_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _attention_fwd(qkv: Tensor, num_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    fwd = _fwd_triton if triton_runs_on(qkv.device) else cpu.attention_fwd
    return fwd(qkv, num_heads, causal)


@_attention_fwd.register_fake
def _(qkv: Tensor, num_heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    batch, length, width3 = qkv.shape
    return qkv.new_empty(batch, length, width3 // 3), qkv.new_empty(
        batch, num_heads, length, dtype=accumulate_dtype(qkv.dtype)
    )


@torch.library.custom_op("clipfast::attention_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _attention_bwd(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, causal: bool) -> Tensor:
    bwd = _bwd_triton if triton_runs_on(qkv.device) else cpu.attention_bwd
    return bwd(grad_out, qkv, out, lse, num_heads, causal)


@_attention_bwd.register_fake
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if grad_out is None:
        return None, None, None
    return torch.ops.clipfast.attention_bwd(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.causal), None, None


_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def attention(qkv: Tensor, num_heads: int, *, causal: bool = False, backend: str = "auto") -> Tensor:
    """Softmax attention of every head, straight from the packed projection.

    Args:
        qkv: [B, N, 3 * num_heads * head_dim], the projections to queries, keys and values one after the other (the
            layout of ``nn.MultiheadAttention``'s ``in_proj``); float32, float16 or bfloat16 (float64 on the CPU); any
            strides. Under autocast it is taken in the autocast dtype.
        num_heads: heads; head_dim is at most 128 outside the reference.
        causal: token i sees tokens 0 .. i only.
        backend: "auto" (Triton on GPUs, PyTorch's flash kernel on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, N, num_heads * head_dim] in the dtype of ``qkv``, contiguous. Scores are scaled by head_dim ** -0.5.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention"
    check_tensor(op, "qkv", qkv, 3)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{op}: num_heads must be an int, got {type(num_heads).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    if num_heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"{op}: the last dimension of qkv must be 3 * num_heads * head_dim, "
            f"got {qkv.shape[-1]} with num_heads={num_heads}"
        )
    qkv = autocast_to(qkv)
    if uses_reference(op, backend, qkv):
        return reference.attention(qkv, num_heads, causal=causal)
    check_float(op, "qkv", qkv)
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}: use more heads or backend='torch'"
        )
    return _attention_fwd(qkv, num_heads, causal)[0]
