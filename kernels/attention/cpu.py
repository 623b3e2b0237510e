"""Attention on a CPU: PyTorch's own flash kernel, with the arguments and results of the launches."""

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, M, H, D], contiguous, and the log-sum-exp [B, H, M] of the scaled scores."""
    batch, m, heads, _ = q.shape
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full((batch, heads, m), float("inf"), dtype=accumulate_dtype(q.dtype))
        return q.new_zeros(q.shape), lse
    k, v, mask = _without_hidden(k, v, seqlens)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), is_causal=causal, attn_mask=mask, scale=scale
    )
    out = out.transpose(1, 2)
    if seqlens is not None:
        is_empty = (seqlens == 0)[:, None, None]
        out, lse = out.masked_fill(is_empty[..., None], 0), lse.masked_fill(is_empty, float("inf"))
    return out.contiguous(), lse.contiguous()


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: Tensor | None,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``, and return the same gradient as ``launches.backward``."""
    if q.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
    else:
        k, v, mask = _without_hidden(k, v, seqlens)
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(grad_out, q, k, v, out), lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        for grad, result in zip(grads, results, strict=True):
            grad.copy_(result.transpose(1, 2))
            if seqlens is not None:
                grad.masked_fill_((seqlens == 0)[:, None, None, None], 0)
    if not with_sums:
        return None
    dtype = accumulate_dtype(q.dtype)
    dq, dv = grads[0].flatten(2).sum((0, 1), dtype=dtype), grads[2].flatten(2).sum((0, 1), dtype=dtype)
    return torch.stack([dq, torch.zeros_like(dq), dv])


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [B, N, H, D] as [B, H, N, D] with unit stride along D, as PyTorch's flash kernel needs them."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def _without_hidden(k: Tensor, v: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys and values with zeros at the hidden tokens, and a mask to add to the scores; None hides no token.

    The memory of a hidden token may hold NaN, which a mask on the scores alone would not keep out of the products.
    """
    if seqlens is None:
        return k, v, None
    hidden = torch.arange(k.shape[1], device=k.device) >= seqlens[:, None]
    mask = k.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None]
    return k.masked_fill(hidden[..., None, None], 0), v.masked_fill(hidden[..., None, None], 0), mask
