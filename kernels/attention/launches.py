"""The choice of the attention kernels for a shape, and their launches.

Queries are [B, M, H, D], keys and values [B, N, H, D]. They may have any strides, and those of a packed projection are
three views of one tensor.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import LOG2E
from ..configs import ShortConfig, looped_config, sdpa_config, short_config
from ..hardware import architecture
from ..launch import INTERPRET, arch_of, launch
from .looped import _key_bwd_kernel, _looped_fwd_kernel, _query_bwd_kernel
from .short import _short_bwd_kernel, _short_fwd_kernel
from .unrolled import _unrolled_bwd_kernel

# The most rows beyond one whole block that the unrolled backward kernel takes.
UNROLLED_REST = 16


class Route(NamedTuple):
    """The names of the kernels that compute attention at a shape."""

    forward: str  # "short", "looped" or "sdpa"
    backward: str  # "short", "unrolled", "two_phase" or "sdpa"


def attention_route(arch: int, dtype: torch.dtype, head_dim: int, num_keys: int, *, causal: bool) -> Route:
    """Return the kernels that compute a shape on a GPU of compute capability ``arch`` (90 for sm_90), if it has as many
    queries as keys.

    The tables of configurations decide. With at least as many keys as :func:`least_keys_of_sdpa` returns, PyTorch's own
    attention was faster when measured, and is used. Otherwise the kernels that hold a whole head are used where the
    tables have a configuration for them, and the kernels that loop over the keys everywhere else.
    """
    least = least_keys_of_sdpa(arch, dtype, head_dim, causal=causal)
    if least is not None and num_keys >= least:
        return Route("sdpa", "sdpa")
    forward = short_config("attention_short_fwd", arch, dtype, head_dim, num_keys)
    unrolled, short = _of_whole_heads(arch, dtype, head_dim, num_keys, num_keys)
    return Route("short" if forward else "looped", "unrolled" if unrolled else "short" if short else "two_phase")


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
    q, k, v = (_with_near_heads(x) for x in (q, k, v))
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, m, dtype=torch.float32)
    args = (out, lse, seqlens, m, n, heads, *q.stride(), *k.stride(), *v.stride(), scale * LOG2E)
    options = _options(seqlens, causal, q, k, v)
    arch = arch_of(device)
    short = short_config("attention_short_fwd", arch, q.dtype, head_dim, n)
    if short is not None:
        launch(
            _short_fwd_kernel, (batch * heads,), q, k, v, *args, config=short, device=device,
            BLOCK_M=short.block_m, N_PARTS=_parts(n), **options,
        )  # fmt: skip
        return out, lse
    cfg = looped_config("attention_looped_fwd", arch, q.dtype, head_dim, n)
    launch(
        _looped_fwd_kernel, (batch * heads * triton.cdiv(m, cfg.block_m),),
        q, k, v, *_tiles(cfg.block_n, seqlens, k, v), *args, config=cfg, device=device,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, TAIL=_tail(n, cfg.block_n, seqlens, causal), **options,
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
    grad_out, q, k, v = (_with_near_heads(x) for x in (grad_out, q, k, v))
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    of_dq, of_dk = (grad.stride()[:2] for grad in grads[:2])
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *of_dq, *of_dk)
    options = _options(seqlens, causal, q, k, v, grad_out, *grads) | {"HAS_SUMS": with_sums}
    unrolled, short = _of_whole_heads(arch_of(device), q.dtype, head_dim, m, n)
    if unrolled is None and short is None:
        sums = _two_phases(grad_out, q, k, v, out, lse, seqlens, causal, scale, grads, options)
    else:
        sums = _sums(q, 1, 1, with_sums)
        args = (*grads, *sums, m, n, heads, *strides, scale * LOG2E, scale)
        if unrolled is not None:
            block = unrolled.block_m
            launch(
                _unrolled_bwd_kernel, (batch * heads,), q, k, v, out, grad_out, lse, seqlens, *args,
                config=unrolled, device=device, M_PARTS=(block,) * (m // block) + _rest(m, block),
                N_PARTS=(block,) * triton.cdiv(n, block), **options,
            )  # fmt: skip
        elif short is not None:
            launch(
                _short_bwd_kernel, (batch * heads,), q, k, v, grad_out, lse, seqlens, *args,
                config=short, device=device,
                BLOCK_M=short.block_m, BLOCK_N=max(16, triton.next_power_of_2(n)), **options,
            )  # fmt: skip
    if not with_sums:
        return None
    return sums[0].flatten(0, 1).sum(0), sums[1].flatten(0, 1).sum(0)


def _two_phases(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: Tensor | None,
    causal: bool, scale: float, grads: tuple[Tensor, Tensor, Tensor], options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of attention by the two looped kernels; return each block's sums of dq and dv over its
    rows.
    """
    (batch, m, heads, head_dim), n, device = q.shape, k.shape[1], q.device
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    scales = scale * LOG2E, scale
    of_query, of_key = (
        looped_config(f"attention_{owner}_bwd", arch_of(device), q.dtype, head_dim, n) for owner in ("query", "key")
    )
    # The number of rows is a multiple of the block sizes of both kernels, which are powers of two.
    block = max(of_query.block_m, of_key.block_m)
    rows = triton.cdiv(m, block) * block
    num_m, num_n = rows // of_query.block_m, triton.cdiv(n, of_key.block_n)
    sums, stats = _sums(q, num_m, num_n, options["HAS_SUMS"]), lse.new_empty(batch, heads, 2, rows)
    launch(
        _query_bwd_kernel, (batch * heads * num_m,),
        q, k, v, *_tiles(of_query.block_n, seqlens, k, v), out, grad_out, lse, seqlens, stats, grads[0], sums[0],
        m, n, heads, rows, *strides, *grads[0].stride()[:2], *scales,
        config=of_query, device=device, BLOCK_M=of_query.block_m, BLOCK_N=of_query.block_n,
        TAIL=_tail(n, of_query.block_n, seqlens, causal), **options,
    )  # fmt: skip
    tiles = _tiles(of_key.block_m, None, q, grad_out)
    launch(
        _key_bwd_kernel, (batch * heads * num_n,),
        q, k, v, grad_out, *tiles, stats, seqlens, *grads[1:], sums[1],
        m, n, heads, rows, *strides, *grads[1].stride()[:2], *scales,
        config=of_key, device=device, BLOCK_M=of_key.block_m, BLOCK_N=of_key.block_n,
        TAIL=0 if tiles[0] is None else _tail(m, of_key.block_m, None, False), IS_HELD=_is_held(q), **options,
    )  # fmt: skip
    return sums


def _with_near_heads(x: Tensor) -> Tensor:
    """Return a tensor [B, N, H, D], or a copy if the offset of its last head within an image does not fit into 32 bits.

    The kernels compute this offset in 32 bits: with 64 bits they would take more registers, and a quarter fewer
    programs would run at once.
    """
    return x if (x.shape[2] - 1) * x.stride(2) < 2**31 else x.contiguous()


def _of_whole_heads(
    arch: int, dtype: torch.dtype, head_dim: int, m: int, n: int
) -> tuple[ShortConfig | None, ShortConfig | None]:
    """Return the configurations of the unrolled and of the short backward kernel; None for one that does not fit."""
    unrolled = short_config("attention_unrolled_bwd", arch, dtype, head_dim, n)
    if unrolled is not None and max(m, n) > unrolled.block_m + UNROLLED_REST:
        unrolled = None
    return unrolled, short_config("attention_short_bwd", arch, dtype, head_dim, n)


def _sums(q: Tensor, num_q: int, num_k: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return buffers [B, tiles, H * D] for the sums of dq and of dv over the rows of each tile; empty unless
    ``wanted``.
    """
    batch, _, heads, head_dim = q.shape
    dq, dv = (q.new_empty(batch, num, heads * head_dim if wanted else 0, dtype=torch.float32) for num in (num_q, num_k))
    return dq, dv


def _options(seqlens: Tensor | None, causal: bool, *sources: Tensor) -> dict[str, Any]:
    """Return the compile-time constants that all attention kernels take for tensors [B, N, H, D]."""
    head_dim = sources[0].shape[-1]
    # Every head begins at a multiple of this number of elements.
    multiple = math.gcd(8, head_dim, *(stride for x in sources for stride in (x.stride(0), x.stride(2))))
    return {
        "HEAD_DIM": head_dim, "D_PARTS": _head_parts(head_dim), "MULTIPLE": multiple,
        "IS_CAUSAL": causal, "HAS_SEQLENS": seqlens is not None,
    }  # fmt: skip


def _tail(rows: int, block: int, seqlens: Tensor | None, causal: bool) -> int:
    """Return the number of rows in the last tile of an attention loop, after the last whole block.

    If no mask hides rows of whole blocks, this tile only has to hold the remaining rows, so it can be smaller than a
    block.
    """
    return block if causal or seqlens is not None else (*_rest(rows, block), 16)[0]


def _rest(rows: int, block: int) -> tuple[int, ...]:
    """Return the size of a tile for the rows after the last whole block, as matrix units need it; () if no row
    is left.
    """
    return (max(16, triton.next_power_of_2(rows % block)),) if rows % block else ()


def _tiles(rows: int, seqlens: Tensor | None, *sources: Tensor) -> list[TensorDescriptor | None]:
    """Return the arguments of :func:`walked_rows` for blocks of ``rows`` rows: two descriptors of each source, or None.

    With ``seqlens`` there are no descriptors: a descriptor would also load the hidden tokens of an image, which may
    hold NaN, and NaN times a probability of zero is NaN.
    """
    parts = _head_parts(sources[0].shape[-1])
    if seqlens is not None or not all(_is_tileable(x) for x in sources):
        return [None, None] * len(sources)
    found: list[TensorDescriptor | None] = []
    for x in sources:
        found += [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, part]) for part in parts]
        found += [None] * (2 - len(parts))
    return found


def _is_tileable(x: Tensor) -> bool:
    """Return whether the attention kernels load blocks of a tensor [B, N, H, D] through tensor descriptors.

    The strides must suit a descriptor, and the matrix unit must read its operands from shared memory.
    """
    if x.dtype.itemsize != 2 or x.numel() == 0 or not architecture(arch_of(x.device)).multiplies_from_shared:
        return False
    steps = [stride * x.dtype.itemsize for stride in x.stride()[:3]]
    is_aligned = all(step % 16 == 0 for step in (*steps, x.data_ptr()))
    return is_aligned and x.stride(3) == 1 and steps == sorted(steps, reverse=True) and steps[-1] > 0


def _is_held(x: Tensor) -> bool:
    """Return whether products of ``x`` run on wgmma, which works asynchronously and accumulates in registers."""
    unit = architecture(arch_of(x.device)).matrix_unit
    return unit == "wgmma.mma_async" and x.dtype.itemsize == 2 and not INTERPRET


def _parts(n: int) -> tuple[int, ...]:
    """Split ``n``, rounded up, into powers of two of at least 16, as matrix units need: 197 into 128 + 64 + 16."""
    rounded = triton.cdiv(n, 16) * 16
    return tuple(2**bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1)


def _head_parts(head_dim: int) -> tuple[int, ...]:
    """Split a head dimension as :func:`_parts` does, but round it up to a power of two if that gives three parts.

    The three parts of 104, for example, do not fit into the registers of sm_80.
    """
    parts = _parts(head_dim)
    return parts if len(parts) <= 2 else (triton.next_power_of_2(head_dim),)
