"""The choice of the attention kernels for a shape, and their launches.

Queries are [B, M, H, D], keys and values [B, N, H, D]. They may have any strides: the queries, keys and values of a
packed projection are three views of one tensor.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import LOG2E, cdiv, next_power_of_2
from ..configs import ShortConfig, looped_config, planned, sdpa_config, short_config
from ..hardware import architecture
from ..launch import INTERPRET, Plan, arch_of
from .looped import _key_bwd_kernel, _looped_fwd_kernel, _query_bwd_kernel
from .short import _short_bwd_kernel, _short_fwd_kernel
from .tiles import MOST_REST
from .unrolled import _unrolled_bwd_kernel

# The most queries or keys beyond one whole block that a head may have for the unrolled backward kernel.
UNROLLED_REST = 16


class Route(NamedTuple):
    """The names of the kernels that compute attention at a shape."""

    forward: str  # "short", "looped" or "sdpa"
    backward: str  # "short", "unrolled", "two_phase" or "sdpa"


def attention_route(arch: int, dtype: torch.dtype, head_dim: int, num_keys: int, *, causal: bool) -> Route:
    """Return the kernels that compute attention with as many queries as keys on a GPU of compute capability ``arch``
    (90 for sm_90).

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


@planned
def forward_plan(
    device: torch.device, dtype: torch.dtype, q_shape: tuple[int, ...], n: int, strides: tuple[tuple[int, ...], ...],
    has_seqlens: bool, causal: bool, scale: float, is_aligned: bool,
) -> tuple[Plan, bool, int]:  # fmt: skip
    """Plan the forward kernel of attention for q, k and v with these strides.

    Returns:
        The plan; whether the kernel has parameters for descriptors of keys and values; and the rows of the tiles that
        it loads through descriptors, or 0 if it loads without them.
    """
    batch, m, heads, head_dim = q_shape
    arch = arch_of(device)
    numbers = (m, n, heads, *itertools.chain(*strides), scale * LOG2E)
    options = kernel_options(head_dim, strides, has_seqlens, causal)
    short = short_config("attention_short_fwd", arch, dtype, head_dim, n)
    if short is not None:
        options |= {"BLOCK_M": short.block_m, "N_PARTS": _parts(n)}
        plan = Plan(_short_fwd_kernel, (batch * heads,), *numbers, config=short, device=device, **options)
        return plan, False, 0
    cfg = looped_config("attention_looped_fwd", arch, dtype, head_dim, n)
    is_tiled = is_aligned and not has_seqlens and _are_tileable(arch, dtype, (batch, n, heads, head_dim), strides[1:])
    options |= _ends(n, cfg.block_n, has_seqlens or causal, arch, dtype)
    options |= {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "IS_HELD": _is_held(arch, dtype)}
    grid = (batch * heads * cdiv(m, cfg.block_m),)
    plan = Plan(_looped_fwd_kernel, grid, *numbers, config=cfg, device=device, **options)
    return plan, True, cfg.block_n if is_tiled else 0


class BackwardPlan(NamedTuple):
    """How the gradients of attention are computed at a layout.

    Attributes:
        kernel: "short", "unrolled" or "two_phase".
        plans: the plan of the one kernel, or those of the two phases.
        sums: the number of blocks of queries, and of keys, for which sums of dq, and of dv, are written.
        rows: the number of queries, rounded up, for which the first phase writes statistics for the second one.
        tiles: the rows of the tiles of the two phases that descriptors load (0: no descriptors).
        rest: the number of blocks of queries that write their parts of the gradients of the last keys, and the number
            of these keys (:func:`_few_rest`); None if there are no such keys.
    """

    kernel: str
    plans: tuple[Plan, ...]
    sums: tuple[int, int] = (1, 1)
    rows: int = 0
    tiles: tuple[int, int] = (0, 0)
    rest: tuple[int, int] | None = None


@planned
def backward_plan(
    device: torch.device, dtype: torch.dtype, q_shape: tuple[int, ...], n: int, strides: tuple[tuple[int, ...], ...],
    grad_strides: tuple[tuple[int, ...], ...], has_seqlens: bool, causal: bool, scale: float, with_sums: bool,
    is_aligned: bool,
) -> BackwardPlan:  # fmt: skip
    """Plan the gradients of attention for q, k, v and the upstream gradient with these strides."""
    batch, m, heads, head_dim = q_shape
    scales = scale * LOG2E, scale
    of_grads = (*grad_strides[0][:2], *grad_strides[1][:2])
    options = kernel_options(head_dim, (*strides, *grad_strides), has_seqlens, causal) | {"HAS_SUMS": with_sums}
    unrolled, short = _of_whole_heads(arch_of(device), dtype, head_dim, m, n)
    numbers = (m, n, heads, *itertools.chain(*strides), *of_grads, *scales)
    grid = (batch * heads,)
    if unrolled is not None:
        block = unrolled.block_m
        options |= {"M_PARTS": (block,) * (m // block) + _rest(m, block), "N_PARTS": (block,) * cdiv(n, block)}
        plan = Plan(_unrolled_bwd_kernel, grid, *numbers, config=unrolled, device=device, **options)
        return BackwardPlan("unrolled", (plan,))
    if short is not None:
        options |= {"BLOCK_M": short.block_m, "BLOCK_N": max(16, next_power_of_2(n))}
        return BackwardPlan("short", (Plan(_short_bwd_kernel, grid, *numbers, config=short, device=device, **options),))
    return _two_phases(device, dtype, q_shape, n, strides, grad_strides, scales, options, is_aligned)


def _two_phases(
    device: torch.device, dtype: torch.dtype, q_shape: tuple[int, ...], n: int, strides: tuple[tuple[int, ...], ...],
    grad_strides: tuple[tuple[int, ...], ...], scales: tuple[float, float], options: dict[str, Any], is_aligned: bool,
) -> BackwardPlan:  # fmt: skip
    """Plan the gradients of attention by the two looped kernels."""
    batch, m, heads, head_dim = q_shape
    arch, (of_q, of_k, of_v, of_grad) = arch_of(device), strides
    has_seqlens, causal = options["HAS_SEQLENS"], options["IS_CAUSAL"]
    query, key = (looped_config(f"attention_{owner}_bwd", arch, dtype, head_dim, n) for owner in ("query", "key"))
    # ``rows``, the number of queries rounded up, is a multiple of both kernels' block sizes, which are powers of two.
    block = max(query.block_m, key.block_m)
    rows = cdiv(m, block) * block
    rest = 0 if has_seqlens or causal else _few_rest(n, (query.block_n, key.block_n), head_dim, arch, dtype)
    num_m, num_n = rows // query.block_m, cdiv(n, key.block_n)
    has_keys = not has_seqlens and is_aligned and _are_tileable(arch, dtype, (batch, n, heads, head_dim), (of_k, of_v))
    has_queries = is_aligned and _are_tileable(arch, dtype, q_shape, (of_q, of_grad))
    numbers = (m, n, heads, rows, *itertools.chain(*strides))
    first = Plan(
        _query_bwd_kernel, (batch * heads * num_m,), *numbers, *grad_strides[0][:2], *scales,
        config=query, device=device, BLOCK_M=query.block_m, BLOCK_N=query.block_n,
        **_ends(n, query.block_n, has_seqlens or causal, arch, dtype), **options,
    )  # fmt: skip
    second = Plan(
        _key_bwd_kernel, (batch * heads * (num_n - (rest > 0)),), *numbers, *grad_strides[1][:2], num_m, *scales,
        config=key, device=device, BLOCK_M=key.block_m, BLOCK_N=key.block_n,
        TAIL=sum(_rest(m, key.block_m)) if has_queries else 0, IS_HELD=_is_held(arch, dtype), **options,
    )  # fmt: skip
    tiles = query.block_n if has_keys else 0, key.block_m if has_queries else 0
    return BackwardPlan("two_phase", (first, second), (num_m, num_n), rows, tiles, (num_m, rest) if rest else None)


def grad_of_bias(sums: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the gradient [3 * H * D] of a bias on the projection, from the sums of dq and of dv; the gradient of the
    keys' bias is zero (op.py says why).
    """
    if isinstance(sums, Tensor):
        width = sums.shape[-1]
        grad_bias = sums.new_zeros(3 * width)
        torch.sum(sums, 1, out=grad_bias.as_strided((2, width), (2 * width, 1)))
        return grad_bias
    grad_bias = sums[0].new_zeros(3 * sums[0].shape[-1])
    of_q, _, of_v = grad_bias.chunk(3)
    for rows, total in zip(sums, (of_q, of_v), strict=True):
        torch.sum(rows.flatten(0, 1), 0, out=total)
    return grad_bias


def _of_whole_heads(
    arch: int, dtype: torch.dtype, head_dim: int, m: int, n: int
) -> tuple[ShortConfig | None, ShortConfig | None]:
    """Return the configurations of the unrolled and of the short backward kernel; None for one that does not fit."""
    unrolled = short_config("attention_unrolled_bwd", arch, dtype, head_dim, n)
    if unrolled is not None and max(m, n) > unrolled.block_m + UNROLLED_REST:
        unrolled = None
    return unrolled, short_config("attention_short_bwd", arch, dtype, head_dim, n)


def kernel_options(
    head_dim: int, strides: tuple[tuple[int, ...], ...], has_seqlens: bool, causal: bool
) -> dict[str, Any]:
    """Return the compile-time constants that all attention kernels take for tensors [B, N, H, D] with these strides."""
    # Every head begins at a multiple of this number of elements.
    multiple = math.gcd(8, head_dim, *(stride for each in strides for stride in (each[0], each[2])))
    return {
        "HEAD_DIM": head_dim, "D_PARTS": head_parts(head_dim), "MULTIPLE": multiple,
        "IS_CAUSAL": causal, "HAS_SEQLENS": has_seqlens,
    }  # fmt: skip


def _ends(rows: int, block: int, is_masked: bool, arch: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the rows of the tiles that an attention kernel takes before and after its loop over whole blocks; 0 for
    none.

    Under a mask, tiles after the loop have the size of a block too. Otherwise one tile, which can be smaller, holds the
    rows that are left over. With wgmma this tile comes before the loop: its loads then run at the same time as the load
    of the program's queries, and fewer registers are live in the loop. On other GPUs, the compiler would spill
    registers for this order.
    """
    rest = block if is_masked else sum(_rest(rows, block))
    return {"FIRST": rest, "TAIL": 0} if _uses_wgmma(arch, dtype) and not is_masked else {"FIRST": 0, "TAIL": rest}


def _rest(rows: int, block: int) -> tuple[int, ...]:
    """Return the size of a tile for the rows after the last whole block, as matrix units need it; () if no row
    is left.
    """
    return (max(16, next_power_of_2(rows % block)),) if rows % block else ()


def _few_rest(n: int, blocks: tuple[int, ...], head_dim: int, arch: int, dtype: torch.dtype) -> int:
    """Return the number of keys beyond whole blocks whose gradients the backward pass's first phase writes in parts
    (looped.py); 0 if the second phase computes the gradients of all keys.

    Such keys must be as many for each size in ``blocks``, at most MOST_REST, and be loaded before the loop
    (:func:`_ends`). wgmma multiplies 64 rows at a time, and each part of the head dimension must fill them.
    """
    rests = {n % block for block in blocks}
    if len(rests) > 1 or n < max(blocks) or not _uses_wgmma(arch, dtype) or min(head_parts(head_dim)) < 64:
        return 0
    rest = rests.pop()
    return rest if rest <= MOST_REST.value else 0


def _are_tileable(arch: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether the attention kernels load blocks of tensors [B, N, H, D] through tensor descriptors.

    The strides must suit a descriptor, and the matrix unit must read its operands from shared memory.
    """
    if dtype.itemsize != 2 or 0 in shape or not architecture(arch).multiplies_from_shared:
        return False
    for *outer, inner in strides:
        steps = [stride * dtype.itemsize for stride in outer]
        if inner != 1 or steps[-1] <= 0 or steps != sorted(steps, reverse=True) or any(step % 16 for step in steps):
            return False
    return True


def _uses_wgmma(arch: int, dtype: torch.dtype) -> bool:
    """Return whether products of ``dtype`` run on wgmma, which works asynchronously and accumulates in registers."""
    return architecture(arch).matrix_unit == "wgmma.mma_async" and dtype.itemsize == 2


def _is_held(arch: int, dtype: torch.dtype) -> bool:
    """Return whether attention kernels wait for products by :func:`held`, which Triton's interpreter cannot run."""
    return _uses_wgmma(arch, dtype) and not INTERPRET


def _parts(n: int) -> tuple[int, ...]:
    """Split ``n``, rounded up to a multiple of 16, into powers of two for matrix units: 197 into 128 + 64 + 16."""
    rounded = cdiv(n, 16) * 16
    return tuple(2**bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1)


def head_parts(head_dim: int) -> tuple[int, ...]:
    """Split a head dimension into one or two powers of two: 80 into 64 + 16.

    A head dimension that :func:`_parts` would split into three parts or more is rounded up to a power of two, 104 to
    128: three parts do not fit into the registers of sm_80.
    """
    parts = _parts(head_dim)
    return parts if len(parts) <= 2 else (next_power_of_2(head_dim),)
