"""The launches of attention on packed sequences: queries, keys and values are [1, T, H, D], with any strides."""

import itertools

import torch
from torch import Tensor

from ..common import LOG2E, cdiv
from ..configs import looped_config, planned
from ..launch import Plan, arch_of
from .launches import grad_of_bias, kernel_options
from .varlen import _varlen_fwd_kernel, _varlen_key_bwd_kernel, _varlen_query_bwd_kernel


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention's output [1, T, H, D], contiguous, and the log-sum-exp [1, H, T], divided by ``scale``."""
    _, total, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((1, heads, total), dtype=torch.float32, device=q.device)
    plan = _forward_plan(q.device, q.dtype, q.shape, (q.stride(), k.stride(), v.stride()), causal, scale)
    plan.start(q, k, v, bounds, out, lse)
    return out, lse


@planned
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...],
    causal: bool, scale: float,
) -> Plan:  # fmt: skip
    """Plan the forward kernel of attention on packed sequences for q, k and v with these strides."""
    _, total, heads, head_dim = shape
    cfg = looped_config("attention_varlen_fwd", arch_of(device), dtype, head_dim)
    options = _varlen_options(head_dim, strides, causal)
    return Plan(
        _varlen_fwd_kernel, (heads * cdiv(total, cfg.block_m),), total, heads, *_steps(strides),
        scale * LOG2E, config=cfg, device=device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, **options,
    )  # fmt: skip


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of q, k and v to ``grads``; if ``with_sums``, return the gradient [3 * H * D] of a bias on
    the projection.
    """
    width = q.shape[2] * q.shape[3]
    of_query, of_key, num_m, num_n = _backward_plans(
        q.device, q.dtype, q.shape, (q.stride(), k.stride(), v.stride(), grad_out.stride()),
        (grads[0].stride(1), grads[1].stride(1)), causal, scale, with_sums,
    )  # fmt: skip
    delta = torch.empty_like(lse)
    sums = torch.empty((num_m + num_n, width if with_sums else 0), dtype=torch.float32, device=q.device)
    of_query.start(q, k, v, bounds, out, grad_out, lse, delta, grads[0], sums[:num_m])
    of_key.start(q, k, v, bounds, grad_out, lse, delta, *grads[1:], sums[num_m:])
    return grad_of_bias((sums[None, :num_m], sums[None, num_m:])) if with_sums else None


@planned
def _backward_plans(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...],
    grad_strides: tuple[int, int], causal: bool, scale: float, with_sums: bool,
) -> tuple[Plan, Plan, int, int]:  # fmt: skip
    """Plan the two phases of attention's backward pass; also return their numbers of blocks of queries and of keys.

    ``strides`` are those of q, k, v and the upstream gradient.
    """
    _, total, heads, head_dim = shape
    query, key = (
        looped_config(f"attention_varlen_{owner}_bwd", arch_of(device), dtype, head_dim) for owner in ("query", "key")
    )
    options = _varlen_options(head_dim, strides, causal) | {"HAS_SUMS": with_sums}
    num_m, num_n = cdiv(total, query.block_m), cdiv(total, key.block_n)
    numbers = (total, heads, *_steps(strides))
    first, second = (
        Plan(
            kernel, (heads * blocks,), *numbers, stride, scale * LOG2E, scale, config=cfg, device=device,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, **options,
        )
        for kernel, blocks, stride, cfg in (
            (_varlen_query_bwd_kernel, num_m, grad_strides[0], query),
            (_varlen_key_bwd_kernel, num_n, grad_strides[1], key),
        )
    )  # fmt: skip
    return first, second, num_m, num_n


def _steps(strides: tuple[tuple[int, ...], ...]) -> itertools.chain[int]:
    """Return the strides of tokens, heads and columns of tensors [1, T, H, D]."""
    return itertools.chain(*(each[1:] for each in strides))


def _varlen_options(head_dim: int, strides: tuple[tuple[int, ...], ...], causal: bool) -> dict[str, object]:
    """Return the compile-time constants that all kernels on packed sequences take."""
    options = kernel_options(head_dim, strides, False, causal)
    return {name: options[name] for name in ("HEAD_DIM", "D_PARTS", "MULTIPLE", "IS_CAUSAL")}
