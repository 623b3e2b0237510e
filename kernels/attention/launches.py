"""The choice of the attention kernels for a shape, and their launches.

Queries are [B, M, H, D], keys and values [B, N, H, D]. They may have any strides, and those of a packed projection are
three views of one tensor.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import LOG2E
from ..configs import LoopedConfig, attention_config, sdpa_config, short_config
from ..launch import arch_of, launch
from .looped import _key_bwd_kernel, _looped_fwd_kernel, _query_bwd_kernel
from .short import _short_bwd_kernel, _short_fwd_kernel


class Route(NamedTuple):
    """The names of the kernels that compute attention at a shape."""

    forward: str  # "short", "looped" or "sdpa"
    backward: str  # "short", "two_phase" or "sdpa"


def attention_route(arch: int, dtype: torch.dtype, head_dim: int, num_keys: int, *, causal: bool) -> Route:
    """Return the kernels that compute a shape on a GPU of compute capability ``arch`` (90 for sm_90).

    The tables of configurations decide. With at least as many keys as :func:`least_keys_of_sdpa` returns, PyTorch's own
    attention was faster when measured, and is used. Otherwise the short kernels, which hold all keys at once, are used
    where the tables have a configuration for them, and the kernels that loop over the keys everywhere else.
    """
    least = least_keys_of_sdpa(arch, dtype, head_dim, causal=causal)
    if least is not None and num_keys >= least:
        return Route("sdpa", "sdpa")
    forward = short_config("attention_short_fwd", arch, dtype, head_dim, num_keys)
    backward = short_config("attention_short_bwd", arch, dtype, head_dim, num_keys)
    return Route("short" if forward else "looped", "short" if backward else "two_phase")


def least_keys_of_sdpa(arch: int, dtype: torch.dtype, head_dim: int, *, causal: bool) -> int | None:
    """Return the smallest number of keys for which PyTorch's own attention is used, or None if it never is."""
    found = sdpa_config(arch, dtype, head_dim)
    if found is None:
        return None
    return found.min_keys_causal if causal else found.min_keys


def forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [B, M, H, D], contiguous, and the log-sum-exp of the scores over ``scale``, [B, H, M]."""
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
    # Without a mask, only what is left after the last whole block of keys needs the tail, so a smaller tile will do.
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
    """Write the gradients of q, k and v to ``grads``, in which the heads of a token must be contiguous.

    Returns:
        The sums over batch and tokens of the gradients of q and of v, [H * D] float32 each; None without ``with_sums``.
    """
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    of_dq, of_dk = (grad.stride()[:2] for grad in grads[:2])
    scales = scale * LOG2E, scale
    options = _options(head_dim, seqlens, causal) | {"HAS_SUMS": with_sums}
    arch = arch_of(device)
    short = short_config("attention_short_bwd", arch, q.dtype, head_dim, n)
    if short is not None:
        sums = _sums(q, 1, 1, with_sums)
        launch(
            _short_bwd_kernel, (batch * heads,),
            q, k, v, grad_out, lse, seqlens, *grads, *sums, m, n, heads, *strides, *of_dq, *of_dk, *scales,
            config=short, device=device,
            BLOCK_M=short.block_m, BLOCK_N=max(16, triton.next_power_of_2(n)), **options,
        )  # fmt: skip
    else:
        query_cfg, key_cfg = (
            attention_config(LoopedConfig, f"attention_{owner}_bwd", arch, q.dtype, head_dim)
            for owner in ("query", "key")
        )
        # as many as the blocks of both kernels divide, which are powers of two
        block = max(query_cfg.block_m, key_cfg.block_m)
        rows = triton.cdiv(m, block) * block
        num_m, num_n = rows // query_cfg.block_m, triton.cdiv(n, key_cfg.block_n)
        sums, stats = _sums(q, num_m, num_n, with_sums), lse.new_empty(batch, heads, 2, rows)
        launch(
            _query_bwd_kernel, (batch * heads * num_m,),
            q, k, v, out, grad_out, lse, seqlens, stats, grads[0], sums[0], m, n, heads, rows,
            *strides, *of_dq, *scales,
            config=query_cfg, device=device, BLOCK_M=query_cfg.block_m, BLOCK_N=query_cfg.block_n, **options,
        )  # fmt: skip
        launch(
            _key_bwd_kernel, (batch * heads * num_n,),
            q, k, v, grad_out, stats, seqlens, *grads[1:], sums[1], m, n, heads, rows,
            *strides, *of_dk, *scales,
            config=key_cfg, device=device, BLOCK_M=key_cfg.block_m, BLOCK_N=key_cfg.block_n, **options,
        )  # fmt: skip
    if not with_sums:
        return None
    return sums[0].flatten(0, 1).sum(0), sums[1].flatten(0, 1).sum(0)


def _sums(q: Tensor, num_q: int, num_k: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return buffers for each tile's sums of the gradients of q and of v, [B, tiles, H * D]; empty if not wanted."""
    batch, _, heads, head_dim = q.shape
    dq, dv = (q.new_empty(batch, num, heads * head_dim if wanted else 0, dtype=torch.float32) for num in (num_q, num_k))
    return dq, dv


def _options(head_dim: int, seqlens: Tensor | None, causal: bool) -> dict[str, object]:
    """Return the compile-time constants that all these kernels take."""
    return {
        "HEAD_DIM": head_dim, "D_PARTS": _head_parts(head_dim), "IS_CAUSAL": causal, "HAS_SEQLENS": seqlens is not None,
    }  # fmt: skip


def _key_parts(n: int) -> tuple[int, ...]:
    """Split ``n``, rounded up, into powers of two of at least 16, as matrix units need: 197 into 128 + 64 + 16."""
    rounded = triton.cdiv(n, 16) * 16
    return tuple(2**bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1)


def _head_parts(head_dim: int) -> tuple[int, ...]:
    """Split a head dimension as :func:`_key_parts` does, but round it up to a power of two if that gives three parts.

    The three parts of 104, for example, do not fit into the registers of sm_80.
    """
    parts = _key_parts(head_dim)
    return parts if len(parts) <= 2 else (triton.next_power_of_2(head_dim),)
