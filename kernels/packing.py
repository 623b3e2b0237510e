"""Sequences of several lengths behind one another: tokens [T, ...] without padding between them."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_device, check_integers
from .launch import triton_runs_on


class Packing(NamedTuple):
    """The places of B sequences among T tokens, for many calls with the same sequences; :func:`pack` makes it.

    Attributes:
        cu_seqlens: int32 [B + 1], the cumulative lengths: sequence b has the tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1] - 1``. Tokens from ``cu_seqlens[-1]`` on belong to no sequence.
        bounds: int32 [2, T], the first token of each token's sequence, and the end of the sequence; T and the end of
            the last sequence for tokens that belong to none. Neither row falls.
        sequence: int32 [T], the number of each token's sequence; B for tokens that belong to none.
    """

    cu_seqlens: Tensor
    bounds: Tensor
    sequence: Tensor


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
    ends = cu_seqlens.clamp(0, total)
    if check_values(op, cu_seqlens, total):
        lengths = torch.cat([ends.diff(), total - ends[-1:]])  # the last one is that of the tokens of no sequence
        sequence = torch.arange(len(lengths), dtype=torch.int32, device=ends.device).repeat_interleave(lengths)
    else:
        # The number of sequences that end before each token is the number of its own. The host waits for nothing.
        tokens = torch.arange(total, dtype=torch.int32, device=ends.device)
        sequence = torch.searchsorted(ends[1:], tokens, right=True, out_int32=True)
    first = torch.cat([ends[:-1], ends.new_full((1,), total)]).index_select(0, sequence)
    end = torch.cat([ends[1:], ends[-1:]]).index_select(0, sequence)
    return Packing(cu_seqlens, torch.stack([first, end]), sequence)


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


def cu_seqlens_for(op: str, cu_seqlens: Tensor | Packing, batch: int, like: Tensor) -> Tensor:
    """Return the cumulative lengths, int32 [B + 1], that an op was given for the tokens ``like`` [T, ...].

    Their values are not checked, and no bounds are computed.

    Raises:
        TypeError, ValueError: they are of another type, number or device; a packing is of another number of tokens.
    """
    if isinstance(cu_seqlens, Packing):
        cu_seqlens = packing_for(op, cu_seqlens, like).cu_seqlens
    check_integers(op, "cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.shape != (batch + 1,):
        raise ValueError(f"{op}: cu_seqlens must be [{batch + 1}], got shape {tuple(cu_seqlens.shape)}")
    check_device(op, "cu_seqlens", cu_seqlens, "tokens", like)
    return cu_seqlens.contiguous()


def check_values(op: str, cu_seqlens: Tensor, total: int, longest: int | None = None) -> bool:
    """Refuse cumulative lengths that fall, do not run from 0 to ``total`` at most, or of which one exceeds ``longest``.

    Nothing is checked where the host would have to wait for the values, or where there are none. Return whether the
    values were checked.
    """
    if triton_runs_on(cu_seqlens.device) or cu_seqlens.is_meta or torch.compiler.is_compiling():
        return False
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > total:
        raise ValueError(f"{op}: cu_seqlens must run from 0 to {total} tokens at most, got {ends[0]} to {ends[-1]}")
    for sequence, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens must not fall, got {end} after {start} at sequence {sequence}")
        if longest is not None and end - start > longest:
            raise ValueError(
                f"{op}: no sequence may be longer than max_seqlen={longest}, got {end - start} tokens at sequence "
                f"{sequence}"
            )
    return True


class Run(NamedTuple):
    """Sequences of the same length that lie side by side, and their tokens: a batch without copies.

    Attributes:
        sequences: the place of the sequences among all.
        tokens: the place of their tokens among all.
    """

    sequences: slice
    tokens: slice

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return self.sequences.stop - self.sequences.start

    def of(self, x: Tensor) -> Tensor:
        """Return the tokens of the run as a view [sequences, length, ...] of packed tokens [1, T, ...]."""
        return x[0, self.tokens].unflatten(0, (self.num_sequences, -1))


def runs(lengths: Tensor) -> Iterator[Run]:
    """Return the runs of sequences of the same length, for the length of each sequence; those without tokens are in
    none.
    """
    sequence = token = 0
    for length, count in zip(*(x.tolist() for x in torch.unique_consecutive(lengths, return_counts=True)), strict=True):
        if length:
            yield Run(slice(sequence, sequence + count), slice(token, token + length * count))
        sequence, token = sequence + count, token + length * count
