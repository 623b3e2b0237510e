"""The choice of the kernels for a shape, and their launches.

Queries, keys and values are [B, M or N, H, D] with any strides: a packed projection is three views of one tensor.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import LOG2E
from ..configs import LoopedConfig, TwoPhaseConfig, attention_config, sdpa_config, short_config
from ..launch import arch_of, launch
from .looped import _looped_fwd_kernel, _two_phase_bwd_kernel
from .short import _short_bwd_kernel, _short_fwd_kernel


class Route(NamedTuple):
    """The kernels that a shape takes."""

    forward: str  # "short", "looped" or "sdpa"
    backward: str  # "short", "two_phase" or "sdpa"


def attention_route(arch: int, dtype: torch.dtype, head_dim: int, num_keys: int, *, causal: bool) -> Route:
    """Return the kernels that serve a shape on a GPU of compute capability ``arch`` (90 for sm_90).

    The tables decide. The short kernels serve where the tables have a configuration for them, and PyTorch's own
    attention serves from the number of keys on at which it measured faster.
    """
    least = least_keys_of_sdpa(arch, dtype, head_dim, causal=causal)
    if least is not None and num_keys >= least:
        return Route("sdpa", "sdpa")
    forward = short_config("attention_short_fwd", arch, dtype, head_dim, num_keys)
    backward = short_config("attention_short_bwd", arch, dtype, head_dim, num_keys)
    return Route("short" if forward else "looped", "short" if backward else "two_phase")


def least_keys_of_sdpa(arch: int, dtype: torch.dtype, head_dim: int, *, causal: bool) -> int | None:
    """Return the number of keys from which on PyTorch's own attention serves, or None where it never does."""
    found = sdpa_config(arch, dtype, head_dim)
    if found is None:
        return None
    return found.min_keys_causal if causal else found.min_keys


def forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, M, H, D], contiguous, and the log-sum-exp [B, H, M], which is divided by the scale."""
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, m, dtype=torch.float32)
    args = (q, k, v, out, lse, seqlens, m, n, heads, *q.stride(), *k.stride(), *v.stride(), scale * LOG2E)
    options = _options(head_dim, seqlens, causal)
    arch = arch_of(device)
    short = short_config("attention_short_fwd", arch, q.dtype, head_dim, n)
    if short is not None:
        launch(
            _short_fwd_kernel, (batch * heads,), *args, config=short, device=device,
            BLOCK_M=short.block_m, N_PARTS=_key_parts(n), **options,
        )  # fmt: skip
        return out, lse
    cfg = attention_config(LoopedConfig, "attention_looped_fwd", arch, q.dtype, head_dim)
    tail = cfg.block_n if causal or seqlens is not None else max(16, triton.next_power_of_2(n % cfg.block_n))
    launch(
        _looped_fwd_kernel, (batch * heads * triton.cdiv(m, cfg.block_m),), *args, config=cfg, device=device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, TAIL=tail, **options,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: Tensor | None,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``, whose heads are contiguous.

    Returns:
        With ``with_sums``, the sums over batch and rows of the gradients of q and of v, [H * D] float32 each.
    """
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    to_grads = (*grads[0].stride()[:2], *grads[1].stride()[:2])
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *to_grads)
    options = _options(head_dim, seqlens, causal) | {"HAS_SUMS": with_sums}
    arch = arch_of(device)
    short = short_config("attention_short_bwd", arch, q.dtype, head_dim, n)
    if short is not None:
        sums = _sums(q, 1, 1, with_sums)
        launch(
            _short_bwd_kernel, (batch * heads,),
            q, k, v, grad_out, lse, seqlens, *grads, *sums, m, n, heads, *strides, scale * LOG2E, scale,
            config=short, device=device,
            BLOCK_M=short.block_m, BLOCK_N=max(16, triton.next_power_of_2(n)), **options,
        )  # fmt: skip
    else:
        cfg = attention_config(TwoPhaseConfig, "attention_two_phase_bwd", arch, q.dtype, head_dim)
        num_q, num_k = triton.cdiv(m, cfg.own_q), triton.cdiv(n, cfg.own_k)
        sums = _sums(q, num_q, num_k, with_sums)
        launch(
            _two_phase_bwd_kernel, (batch * heads * (num_q + num_k),),
            q, k, v, out, grad_out, lse, seqlens, *grads, *sums, m, n, heads, *strides, scale * LOG2E, scale,
            config=cfg, device=device,
            OWN_K=cfg.own_k, STEP_Q=cfg.step_q, OWN_Q=cfg.own_q, STEP_K=cfg.step_k, **options,
        )  # fmt: skip
    if not with_sums:
        return None
    return sums[0].flatten(0, 1).sum(0), sums[1].flatten(0, 1).sum(0)


def _sums(q: Tensor, num_q: int, num_k: int, wanted: bool) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = q.shape
    dq, dv = (q.new_empty(batch, num, heads * head_dim if wanted else 0, dtype=torch.float32) for num in (num_q, num_k))
    return dq, dv


def _options(head_dim: int, seqlens: Tensor | None, causal: bool) -> dict[str, object]:
    return {
        "HEAD_DIM": head_dim, "D_PARTS": _head_parts(head_dim), "IS_CAUSAL": causal, "HAS_SEQLENS": seqlens is not None,
    }  # fmt: skip


def _key_parts(n: int) -> tuple[int, ...]:
    """Split ``n`` into powers of two of 16, which the matrix unit wants, or more: 197 into 128 + 64 + 16."""
    rounded = triton.cdiv(n, 16) * 16
    return tuple(2**bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1)


def _head_parts(head_dim: int) -> tuple[int, ...]:
    """Split a head dimension likewise, but into two parts at most: three for 104 do not fit the registers of sm_80."""
    parts = _key_parts(head_dim)
    return parts if len(parts) <= 2 else (triton.next_power_of_2(head_dim),)
