"""Attention on a CPU, by PyTorch's own flash kernel.

The log-sum-exp that this kernel returns is that of the scaled scores. The Triton kernels divide it by ``scale``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype

# PyTorch's ops are called without their Python wrappers, which would take the host some time.
flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._op
flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._op


def forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention's output [B, M, H, D], contiguous, and the log-sum-exp [B, H, M] of the scaled scores."""
    batch, m, heads, _ = q.shape
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full((batch, heads, m), float("inf"), dtype=accumulate_dtype(q.dtype))
        return q.new_zeros(q.shape), lse
    k, v, mask = _without_hidden(k, v, seqlens)
    out, lse = flash(*heads_first(q, k, v), 0.0, causal, attn_mask=mask, scale=scale)
    out = out.transpose(1, 2)
    if seqlens is not None:
        is_empty = (seqlens == 0)[:, None, None]
        out, lse = out.masked_fill(is_empty[..., None], 0), lse.masked_fill(is_empty, float("inf"))
    return out.contiguous(), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: Tensor | None,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Write the gradients of attention's q, k and v to ``grads``."""
    if q.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    k, v, mask = _without_hidden(k, v, seqlens)
    results = flash_backward(*heads_first(grad_out, q, k, v, out), lse, 0.0, causal, attn_mask=mask, scale=scale)
    for grad, result in zip(grads, results, strict=True):
        grad.copy_(result.transpose(1, 2))
        if seqlens is not None:
            grad.masked_fill_((seqlens == 0)[:, None, None, None], 0)


def forward_packed(
    qkv: Tensor, seqlens: Tensor | None, num_heads: int, causal: bool, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes attention on packed projections with the layout of ``qkv``; its results are
    those of :func:`forward`, with the output as [B, N, H * D].
    """
    shape = _packed_shape(qkv, num_heads)
    out_shape = *qkv.shape[:2], qkv.shape[-1] // 3
    is_plain = _is_plain(qkv, seqlens)

    def run(qkv: Tensor, bias: Tensor | None, seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Compute attention on a packed projection on the CPU."""
        views = qkv.view(shape)
        if is_plain:
            out, lse = flash(*views.permute(2, 0, 3, 1, 4).unbind(0), 0.0, causal, scale=scale)
            return out.transpose(1, 2).reshape(out_shape), lse
        q, k, v = views.unbind(2)
        out, lse = forward(q, k, v, seqlens, causal, scale)
        return out.view(out_shape), lse

    return run


def backward_packed(
    qkv: Tensor, seqlens: Tensor | None, num_heads: int, causal: bool, scale: float, with_bias: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function that computes attention's gradients of packed projections with the layout of ``qkv``, and of
    their bias.
    """
    shape, dtype = _packed_shape(qkv, num_heads), accumulate_dtype(qkv.dtype)
    out_shape = *shape[:2], *shape[3:]
    is_plain, width = _is_plain(qkv, seqlens), qkv.shape[-1] // 3

    def run(
        grad_out: Tensor, qkv: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of attention on a packed projection on the CPU."""
        grad_out, out, views = grad_out.reshape(out_shape), out.view(out_shape), qkv.view(shape)
        if is_plain:
            q, k, v = views.permute(2, 0, 3, 1, 4).unbind(0)
            operands = heads_first(grad_out)[0], q, k, v, out.transpose(1, 2)
            grads = flash_backward(*operands, lse, 0.0, causal, scale=scale)
            grad_qkv = torch.stack([grad.transpose(1, 2) for grad in grads], 2).view(qkv.shape)
        else:
            grad_qkv = qkv.new_empty(qkv.shape)
            (q, k, v), (dq, dk, dv) = views.unbind(2), grad_qkv.view(shape).unbind(2)
            backward(grad_out, q, k, v, out, lse, seqlens, causal, scale, (dq, dk, dv))
        if not with_bias:
            return grad_qkv, None
        grad_bias = grad_qkv.sum((0, 1), dtype=dtype)
        grad_bias[width : 2 * width] = 0
        return grad_qkv, grad_bias

    return run


def _packed_shape(qkv: Tensor, num_heads: int) -> tuple[int, ...]:
    """Return the shape [B, N, 3, H, D] of the heads in a packed projection."""
    batch, length, width = qkv.shape
    return batch, length, 3, num_heads, width // (3 * num_heads)


def _is_plain(qkv: Tensor, seqlens: Tensor | None) -> bool:
    """Return whether PyTorch's flash kernel takes a packed projection as it is."""
    return seqlens is None and qkv.numel() > 0 and qkv.stride(-1) == 1


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [B, N, H, D] as [B, H, N, D] with unit stride along D, as PyTorch's flash kernel needs them."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def _without_hidden(k: Tensor, v: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys and values with zeros at the hidden tokens, and a mask to add to the scores.

    The mask is None if ``seqlens`` is None, which hides no token. The memory of a hidden token may hold NaN, which a
    mask on the scores alone would not keep out of the products.
    """
    if seqlens is None:
        return k, v, None
    hidden = torch.arange(k.shape[1], device=k.device) >= seqlens[:, None]
    mask = k.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None]
    return k.masked_fill(hidden[..., None, None], 0), v.masked_fill(hidden[..., None, None], 0), mask
