"""Sequences of several lengths behind one another: tokens [T, ...] without padding between them."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_integers
from .launch import triton_runs_on


class Packing(NamedTuple):
    """The places of B sequences among T tokens, for many calls with the same sequences; :func:`pack` makes it.

    Attributes:
        cu_seqlens: int32 [B + 1], the cumulative lengths: sequence b has the tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1] - 1``. Tokens from ``cu_seqlens[-1]`` on belong to no sequence.
        bounds: int32 [2, T], the first token of each token's sequence, and the end of the sequence; T and 0 for tokens
            that belong to none.
    """

    cu_seqlens: Tensor
    bounds: Tensor


def pack(cu_seqlens: Tensor, total: int, op: str = "pack") -> Packing:
    """Return where the sequences with these cumulative lengths, int32 [B + 1], lie among ``total`` tokens.

    ``op`` is the name for errors.

    Raises:
        TypeError: ``cu_seqlens`` is not an int32 tensor.
        ValueError: it has no element, falls, or does not run from 0 to ``total`` at most. The values on a GPU are not
            checked, because the host would have to wait for them; wrong ones give wrong results, but no access outside
            of tensors.
    """
    check_integers(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1], got shape {tuple(cu_seqlens.shape)}")
    if not triton_runs_on(cu_seqlens.device) and not cu_seqlens.is_meta and not torch.compiler.is_compiling():
        _check_values(op, cu_seqlens.tolist(), total)
    ends = cu_seqlens.clamp(0, total)
    tokens = torch.arange(total, dtype=torch.int32, device=ends.device)
    sequence = torch.searchsorted(ends[1:], tokens, right=True)  # the number of sequences that end before each token
    first = torch.cat([ends[:-1], ends.new_full((1,), total)])[sequence]
    end = torch.cat([ends[1:], ends.new_zeros(1)])[sequence]
    return Packing(cu_seqlens, torch.stack([first, end]))


def packing_for(op: str, cu_seqlens: Tensor | Packing, like: Tensor) -> Packing:
    """Return the packing that an op was given for the tokens ``like``, [T, ...].

    Raises:
        TypeError, ValueError: as :func:`pack`, or the packing is of another number of tokens or on another device.
    """
    packing = cu_seqlens if isinstance(cu_seqlens, Packing) else pack(cu_seqlens, len(like), op)
    bounds = packing.bounds
    if bounds.dtype != torch.int32 or bounds.ndim != 2 or len(bounds) != 2 or not bounds.is_contiguous():
        raise ValueError(f"{op}: cu_seqlens must be an int32 tensor, or the result of kernels.packing.pack")
    if bounds.shape[1] != len(like) or bounds.device != like.device:
        raise ValueError(
            f"{op}: cu_seqlens are of {bounds.shape[1]} tokens on {bounds.device}, "
            f"got {len(like)} tokens on {like.device}"
        )
    return packing


def _check_values(op: str, cu_seqlens: list[int], total: int) -> None:
    """Refuse cumulative lengths that fall, or do not run from 0 to ``total`` at most."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > total:
        raise ValueError(
            f"{op}: cu_seqlens must run from 0 to {total} tokens at most, got {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    for sequence, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens must not fall, got {end} after {start} at sequence {sequence}")
