"""Symmetric contrastive loss of image and text features, blockwise: the N x N logits never exist.

With features x, y [N, D], scale s and logits s_ij = s x_i . y_j:

    nll_i = logsumexp_j s_ij - s_ii (images), logsumexp_j s_ji - s_ii (texts)     L = 1/(2N) (sum of both)
    G_ij  = exp(s_ij - max_i) / sum_i + exp(s_ij - max_j) / sum_j                 (softmax by row and by column, j != i)
    g_i   = (exp(-nll_i) - 1) of images + of texts                                (the diagonal, kept apart in fp32)
    dL/dx = s/(2N) (G y + g * y)    dL/dy = s/(2N) (G^T x + g * x)    dL/ds = 1/(2N) sum_i (G y + g * y)_i . x_i

The diagonal never passes through the low-precision tile, and nll is formed before it is rounded to the size of a logit:
late in training, when the softmax of a pair is nearly 1, what remains of it is all there is to learn from. For the same
reason the maximum and the sum of a row are kept apart: their logarithm would round the sum to the size of the maximum.

FLOPs: 4 N^2 D forward (one sweep for images, one for texts), 6 N^2 D backward (one recompute feeds both gradients).
Memory beyond inputs and gradients: forward O(N); backward two float32 [N, D] and one strip of G, at most
``STRIP_ELEMENTS`` or ``MIN_STRIP_ROWS`` rows.
Method: FlashAttention's online softmax (Dao et al. 2022) applied to the loss of Radford et al. 2021.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import cpu, reference
from ._launch import (
    FLOATS,
    LN2,
    LOG2E,
    accumulate_dtype,
    arch_of,
    autocast_to,
    check_float,
    check_like,
    check_tensor,
    dtype_name,
    launch,
    outside_autocast,
    triton_runs_on,
    uses_reference,
)
from ._tiles import exp2_minus_1, grouped_tile, online_softmax_step
from .configs import gemm_config, row_config

STRIP_ELEMENTS = 2**25  # 64 MiB of bf16: large enough to fill a GPU, independent of N
MIN_STRIP_ROWS = 128


@triton.jit
def _softmax_stats_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    max_ptr,  # [N] fp32, base 2
    sum_ptr,  # [N] fp32
    nll_ptr,  # [N] fp32, base 2
    N, D,
    stride_xn, stride_xd, stride_yn, stride_yd,
    log2e,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and nll of each row of the logits: one program owns BLOCK_M rows and walks all columns."""
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_xn  # [BM]
    scale = tl.load(scale_ptr) * log2e
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    diagonal = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y_rows = y_ptr + offs_n.to(tl.int64) * stride_yn  # [BN]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_k in range(0, D, BLOCK_K):
            dims = start_k + offs_k
            mask_k = dims < D
            x = tl.load(
                x_rows[:, None] + dims[None, :] * stride_xd, mask=mask_m[:, None] & mask_k[None, :], other=0.0
            )  # [BM, BK]
            y = tl.load(
                y_rows[None, :] + dims[:, None] * stride_yd, mask=mask_n[None, :] & mask_k[:, None], other=0.0
            )  # [BK, BN]
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        scores = tl.where(mask_n[None, :], acc * scale, float("-inf"))
        # from the same tile as the sum, so that its rounding cancels in nll
        if (start_n < start_m + BLOCK_M) & (start_m < start_n + BLOCK_N):
            diagonal += tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], acc * scale, 0.0), 1)
        _, _, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, 1.0)
    tl.store(max_ptr + offs_m, row_max, mask=mask_m)
    tl.store(sum_ptr + offs_m, row_sum, mask=mask_m)
    tl.store(nll_ptr + offs_m, (row_max - diagonal) + tl.log2(row_sum), mask=mask_m)


@triton.jit
def _grad_tile_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    scale_ptr,  # [] fp32
    max_ptr,  # [2, N] fp32, base 2: of images, of texts
    sum_ptr,  # [2, N] fp32
    strip_ptr,  # [ROWS, N]
    N, D, first_row, ROWS,
    stride_xn, stride_xd, stride_yn, stride_yd,
    log2e, strip_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """strip = strip_scale * G for rows first_row .. first_row + ROWS, with zeros on the diagonal."""
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(ROWS, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + offs_m
    mask_m = offs_m < ROWS
    mask_n = offs_n < N
    x_rows = x_ptr + rows.to(tl.int64) * stride_xn  # [BM]
    y_rows = y_ptr + offs_n.to(tl.int64) * stride_yn  # [BN]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = dims < D
        x = tl.load(
            x_rows[:, None] + dims[None, :] * stride_xd, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BM, BK]
        y = tl.load(
            y_rows[None, :] + dims[:, None] * stride_yd, mask=mask_n[None, :] & mask_k[:, None], other=0.0
        )  # [BK, BN]
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    scores = acc * (tl.load(scale_ptr) * log2e)  # [BM, BN]
    image_max = tl.load(max_ptr + rows, mask=mask_m, other=0.0)
    text_max = tl.load(max_ptr + N + offs_n, mask=mask_n, other=0.0)
    image_weight = strip_scale / tl.load(sum_ptr + rows, mask=mask_m, other=1.0)
    text_weight = strip_scale / tl.load(sum_ptr + N + offs_n, mask=mask_n, other=1.0)
    grad = (
        tl.exp2(scores - image_max[:, None]) * image_weight[:, None]
        + tl.exp2(scores - text_max[None, :]) * text_weight[None, :]
    )
    grad = tl.where(rows[:, None] == offs_n[None, :], 0.0, grad)
    strip = strip_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(strip, grad.to(strip_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, D]
    out_ptr,  # [M, D] fp32, contiguous
    M, K, D,
    stride_am, stride_ak, stride_bk, stride_bd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """out (+)= a b in fp32: one writer per tile, so the sum over launches has a fixed order."""
    num_d = tl.cdiv(D, BLOCK_N)
    pid_m = tl.program_id(0) // num_d
    pid_d = tl.program_id(0) % num_d
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_d = offs_d < D
    a_rows = a_ptr + offs_m.to(tl.int64) * stride_am  # [BM]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        a = tl.load(
            a_rows[:, None] + offs_k[None, :] * stride_ak, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BM, BK]
        b_tile = b_ptr + offs_k[:, None] * stride_bk + offs_d[None, :] * stride_bd
        b = tl.load(b_tile, mask=mask_k[:, None] & mask_d[None, :], other=0.0)  # [BK, BN]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & mask_d[None, :]
    if not IS_FIRST:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc, mask=mask)


@triton.jit
def _finish_kernel(
    acc_ptr,  # [N, D] fp32, contiguous: strip_scale * (G y)
    self_ptr,  # [N, D]: x
    partner_ptr,  # [N, D]: y
    nll_ptr,  # [2, N] fp32, base 2: of images, of texts
    coefficient_ptr,  # [] fp32: dL/dloss / (2N)
    scale_ptr,  # [] fp32
    grad_ptr,  # [N, D] contiguous
    dot_ptr,  # [N] fp32: (G y + g * y)_i . x_i
    N, D,
    stride_sn, stride_sd, stride_pn, stride_pd,
    inv_strip_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_i = coefficient * scale * (acc_i / strip_scale + g_i y_i), and each row's share of dL/ds."""
    offs_n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    image_nll = tl.load(nll_ptr + offs_n, mask=mask_n, other=0.0)
    text_nll = tl.load(nll_ptr + N + offs_n, mask=mask_n, other=0.0)
    g = exp2_minus_1(-image_nll) + exp2_minus_1(-text_nll)  # [BM]
    factor = tl.load(coefficient_ptr) * tl.load(scale_ptr)
    rows = offs_n.to(tl.int64)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = mask_n[:, None] & (dims < D)[None, :]
        acc = tl.load(acc_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)  # [BM, BK]
        own = tl.load(self_ptr + rows[:, None] * stride_sn + dims[None, :] * stride_sd, mask=mask, other=0.0)
        partner = tl.load(partner_ptr + rows[:, None] * stride_pn + dims[None, :] * stride_pd, mask=mask, other=0.0)
        total = acc * inv_strip_scale + g[:, None] * partner.to(tl.float32)  # [BM, BK]
        dot += tl.sum(total * own.to(tl.float32), 1)
        grad = (total * factor).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + rows[:, None] * D + dims[None, :], grad, mask=mask)
    tl.store(dot_ptr + offs_n, dot, mask=mask_n)


def _fwd_triton(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = image.shape
    maximum, total, nll = (torch.empty(2, n, dtype=torch.float32, device=image.device) for _ in range(3))
    cfg = gemm_config("contrastive_stats", arch_of(image.device), image.dtype)
    for side, (own, other) in enumerate(((image, text), (text, image))):
        launch(
            _softmax_stats_kernel, (triton.cdiv(n, cfg.block_m),),
            own, other, logit_scale, maximum[side], total[side], nll[side], n, d, *own.stride(), *other.stride(), LOG2E,
            config=cfg, device=image.device,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PRECISION="ieee",
        )  # fmt: skip
    return nll.mean() * LN2, maximum, total, nll


def _bwd_triton(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, maximum: Tensor, total: Tensor, nll: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = image.shape
    device, arch = image.device, arch_of(image.device)
    strip_rows = min(n, max(MIN_STRIP_ROWS, STRIP_ELEMENTS // max(n, 1) // MIN_STRIP_ROWS * MIN_STRIP_ROWS))
    strip = torch.empty(strip_rows, n, dtype=image.dtype, device=device)
    acc_image, acc_text = torch.empty(2, n, d, dtype=torch.float32, device=device)
    for first_row in range(0, n, max(strip_rows, 1)):
        rows = min(strip_rows, n - first_row)
        _launch_grad_tile(image, text, logit_scale, maximum, total, strip, first_row, rows, arch)
        _launch_product(strip[:rows], text, acc_image[first_row:], arch, is_first=True)
        _launch_product(strip[:rows].T, image[first_row : first_row + rows], acc_text, arch, is_first=first_row == 0)
    coefficient = grad_loss.to(torch.float32) / max(2 * n, 1)
    cfg = row_config("contrastive_finish", arch, image.dtype)
    grads, dot = [], nll.new_empty(2, n)
    for side, (acc, own, partner) in enumerate(((acc_image, image, text), (acc_text, text, image))):
        grad = torch.empty_like(own, memory_format=torch.contiguous_format)
        launch(
            _finish_kernel, (triton.cdiv(n, cfg.block_m),),
            acc, own, partner, nll, coefficient, logit_scale, grad, dot[side], n, d, *own.stride(), *partner.stride(),
            1.0 / _strip_scale(image.dtype),
            config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_K=cfg.block_k,
        )  # fmt: skip
        grads.append(grad)
    return grads[0], grads[1], dot[0].sum() * coefficient


def _launch_grad_tile(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    maximum: Tensor,
    total: Tensor,
    strip: Tensor,
    first_row: int,
    rows: int,
    arch: int,
) -> None:
    n, d = image.shape
    cfg = gemm_config("contrastive_grad_tile", arch, image.dtype)
    launch(
        _grad_tile_kernel, (triton.cdiv(rows, cfg.block_m) * triton.cdiv(n, cfg.block_n),),
        image, text, logit_scale, maximum, total, strip, n, d, first_row, rows,
        *image.stride(), *text.stride(), LOG2E, _strip_scale(image.dtype),
        config=cfg, device=image.device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, GROUP_M=8, PRECISION="ieee",
    )  # fmt: skip


def _launch_product(a: Tensor, b: Tensor, out: Tensor, arch: int, *, is_first: bool) -> None:
    (m, k), d = a.shape, b.shape[1]
    cfg = gemm_config("contrastive_product", arch, a.dtype)
    launch(
        _product_kernel, (triton.cdiv(m, cfg.block_m) * triton.cdiv(d, cfg.block_n),),
        a, b, out, m, k, d, *a.stride(), *b.stride(),
        config=cfg, device=a.device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, BLOCK_K=cfg.block_k, PRECISION="ieee", IS_FIRST=is_first,
    )  # fmt: skip


def _strip_scale(dtype: torch.dtype) -> float:
    # G lies in [0, 2] and is about 2/N at the start: in fp16 that would be subnormal, so the strip is stored larger.
    return 2.0**14 if dtype == torch.float16 else 1.0


@torch.library.custom_op("clipfast::contrastive_fwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _contrastive_fwd(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and what the backward pass needs of both sides (images, texts): maximum, sum and nll, [2, N] each."""
    fwd = _fwd_triton if triton_runs_on(image.device) else cpu.contrastive_fwd
    return fwd(image, text, logit_scale)


@_contrastive_fwd.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(image.dtype)
    maximum, total, nll = (image.new_empty(2, image.shape[0], dtype=dtype) for _ in range(3))
    return image.new_empty((), dtype=dtype), maximum, total, nll


@torch.library.custom_op("clipfast::contrastive_bwd", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _contrastive_bwd(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, maximum: Tensor, total: Tensor, nll: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    bwd = _bwd_triton if triton_runs_on(image.device) else cpu.contrastive_bwd
    return bwd(grad_loss, image, text, logit_scale, maximum, total, nll)


@_contrastive_bwd.register_fake
def _(
    grad_loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, maximum: Tensor, total: Tensor, nll: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape), nll.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None, None
    return torch.ops.clipfast.contrastive_bwd(grad_loss, *ctx.saved_tensors)


_contrastive_fwd.register_autograd(_backward, setup_context=_setup_context)


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, normalize: bool = False, backend: str = "auto"
) -> Tensor:
    """CLIP's symmetric contrastive loss of matching rows, without the N x N logits.

    Args:
        image: image features [N, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Row i matches row
            i of ``text``. Under autocast both are taken in the autocast dtype, as a matrix product would.
        text: text features [N, D], same dtype and device as ``image``.
        logit_scale: the factor on the cosine similarities, already exponentiated: a one-element tensor, into which
            gradients flow, or a number (which ``torch.compile`` takes for a constant).
        normalize: divide each row by its Euclidean norm first.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Mean loss over pairs and directions, a float32 scalar (float64 for float64 input); NaN when N is 0, as a mean
        is.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "contrastive_loss"
    check_tensor(op, "image", image, 2)
    check_tensor(op, "text", text, 2)
    if image.shape != text.shape:
        raise ValueError(
            f"{op}: image and text must have the same shape, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    scale = _scale_tensor(op, logit_scale, image)
    is_reference = uses_reference(op, backend, image)
    if not is_reference:
        check_float(op, "image", autocast_to(image))
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    image, text = autocast_to(image), autocast_to(text)
    check_like(op, "text", text, "image", image)
    if is_reference:
        return reference.contrastive_loss(image, text, scale)
    return _contrastive_fwd(image, text, scale.to(accumulate_dtype(image.dtype)))[0]


def _scale_tensor(op: str, logit_scale: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(logit_scale, (int, float)):
        return torch.full((), logit_scale, dtype=torch.float32, device=like.device)
    if not isinstance(logit_scale, Tensor):
        raise TypeError(f"{op}: logit_scale must be a number or a torch.Tensor, got {type(logit_scale).__name__}")
    if logit_scale.dtype not in FLOATS:
        raise TypeError(f"{op}: logit_scale must have a floating dtype, got {dtype_name(logit_scale.dtype)}")
    if logit_scale.numel() != 1:
        raise ValueError(f"{op}: logit_scale must have one element, got shape {tuple(logit_scale.shape)}")
    if logit_scale.device != like.device:
        raise ValueError(f"{op}: logit_scale is on {logit_scale.device}, but image is on {like.device}")
    return logit_scale.reshape(())
