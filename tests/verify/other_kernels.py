"""Small Triton kernels as others write them, and their checks, for the tests of ``clipfast verify MODULE:NAME``."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck


@triton.jit
def softmax_kernel(x_ptr, out_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=float("-inf")).to(tl.float32)
    x = x - tl.max(x, 0)
    e = tl.exp(x)
    tl.store(out_ptr + row * width + offs, e / tl.sum(e, 0), mask=mask)


def softmax(x):
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    softmax_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


@triton.jit
def layer_norm_kernel(x_ptr, weight_ptr, out_ptr, mean_ptr, rstd_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    x = tl.load(x_ptr + row * width + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + offs, centred * rstd * weight, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def layer_norm_backward_kernel(
    x_ptr, weight_ptr, grad_ptr, mean_ptr, rstd_ptr, d_x_ptr, d_weight_ptr, rows, width, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        d_weight += grad * normed
        grad *= weight
        mean_grad = tl.sum(grad, 0) / width
        slope = tl.sum(grad * normed, 0) / width
        tl.store(d_x_ptr + row * width + offs, (grad - mean_grad - normed * slope) * rstd, mask=mask)
    tl.store(d_weight_ptr + program * width + offs, d_weight, mask=mask)


class LayerNorm(torch.autograd.Function):
    PROGRAMS = 2

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        rows, width = x.shape
        out, (mean, rstd) = torch.empty_like(x), torch.empty(2, rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        layer_norm_kernel[(rows,)](x, weight, out, mean, rstd, width, 1e-5, BLOCK=block)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        rows, width = x.shape
        d_x = torch.empty_like(x)
        d_weight = torch.empty(LayerNorm.PROGRAMS, width, dtype=torch.float32, device=x.device)
        layer_norm_backward_kernel[(LayerNorm.PROGRAMS,)](
            x, weight, grad, mean, rstd, d_x, d_weight, rows, width, BLOCK=triton.next_power_of_2(width)
        )
        return d_x, d_weight.sum(0).to(weight.dtype)


@triton.jit
def gelu_kernel(x_ptr, bias_ptr, out_ptr, count, width, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    x += tl.load(bias_ptr + offs % width, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), mask=mask)


def gelu(x, bias):
    x, bias = x.contiguous(), bias.contiguous()
    out = torch.empty_like(x)
    gelu_kernel[(triton.cdiv(x.numel(), 128),)](x, bias, out, x.numel(), x.shape[-1], BLOCK=128)
    return out


@triton.autotune(
    configs=[triton.Config({"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4) for m in (32, 64)], key=["K"]
)
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, a_row, a_col, b_row, b_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a_mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        b_mask = (offs_k[:, None] < K) & (offs_n[None, :] < N)
        a = tl.load(a_ptr + offs_m[:, None] * a_row + offs_k[None, :] * a_col, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * b_row + offs_n[None, :] * b_col, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc, mask=mask)


def matmul(a, b):
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)

    def grid(meta):
        return triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"])

    matmul_kernel[grid](a, b, out, m, n, k, *a.stride(), *b.stride())
    return out


@triton.jit
def column_sum_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    x = tl.load(x_ptr + tl.program_id(0) * width + offs, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(out_ptr + offs, x, mask=mask)


def column_sum(x):
    out = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    column_sum_kernel[(x.shape[0],)](x.contiguous(), out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out.to(x.dtype)


SOFTMAX = KernelCheck(
    function=softmax,
    reference=lambda x: torch.softmax(x, -1),
    inputs=lambda draw, rows, width: {"x": draw.normal(rows, width)},
    shapes=[{"rows": 5, "width": 100}],
    floor=lambda itemsize, rows, width: Floor(0, 2 * itemsize * rows * width),
)
LAYER_NORM = KernelCheck(
    function=lambda x, weight: LayerNorm.apply(x, weight),
    reference=lambda x, weight: F.layer_norm(x, weight.shape, weight),
    inputs=lambda draw, rows, width: {"x": draw.normal(rows, width) + 0.5, "weight": draw.normal(width)},
    shapes=[{"rows": 7, "width": 100}],
)
GELU = KernelCheck(
    function=gelu,
    reference=lambda x, bias: F.gelu(x + bias),
    inputs=lambda draw, rows, width: {"x": draw.normal(rows, width), "bias": draw.normal(width)},
    shapes=[{"rows": 5, "width": 100}],
)
MATMUL = KernelCheck(
    function=matmul,
    reference=lambda a, b: a @ b,
    inputs=lambda draw, m, n, k: {"a": draw.normal(m, k), "b": draw.normal(k, n)},
    shapes=[{"m": 40, "n": 50, "k": 80}],
)
COLUMN_SUM = KernelCheck(
    function=column_sum,
    reference=lambda x: x.sum(0),
    inputs=lambda draw, rows, width: {"x": draw.normal(rows, width)},
    shapes=[{"rows": 9, "width": 100}],
)
