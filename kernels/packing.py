"""Packed sequences: sequences of several lengths in one tensor of tokens [T, ...], without padding between them."""

import itertools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import check_device, check_integers
from .launch import triton_runs_on


class Packing(NamedTuple):
    """The positions of B sequences among T tokens, for many calls with the same sequences; :func:`pack` makes it.

    Attributes:
        cu_seqlens: int32 [B + 1], the cumulative lengths: sequence b has the tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1] - 1``. Tokens from ``cu_seqlens[-1]`` on belong to no sequence.
        bounds: int32 [2, T], the first token of each token's sequence, and the end of the sequence; T and the end of
            the last sequence for tokens that belong to none. Each row is in ascending order.
        sequence: int32 [T], the number of each token's sequence; B for tokens that belong to none.
    """

    cu_seqlens: Tensor
    bounds: Tensor
    sequence: Tensor


def pack(cu_seqlens: Tensor, total: int, op: str = "pack") -> Packing:
    """Return the :class:`Packing` of sequences with these cumulative lengths, int32 [B + 1], among ``total`` tokens.

    ``op`` is the name of the op in errors.

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
    runs = _read_runs(op, cu_seqlens, total) if host_reads(cu_seqlens) else None
    # Of each sequence, and last of the tokens of no sequence, which begin at ``total`` and end with the last sequence.
    first, end = torch.cat([ends[:-1], ends.new_full((1,), total), ends[1:], ends[-1:]]).view(2, -1)
    if runs is not None:
        sequence = torch.repeat_interleave((end - first).abs_(), output_size=total)
    else:
        # The number of a token's sequence is the number of sequences that end before the token. It is computed on the
        # GPU, since the host would have to wait for the lengths.
        tokens = torch.arange(total, dtype=torch.int32, device=ends.device)
        sequence = torch.searchsorted(ends[1:], tokens, right=True, out_int32=True)
    bounds = torch.stack([first.index_select(0, sequence), end.index_select(0, sequence)])
    packing = Packing(ends, bounds, sequence)
    if runs is not None and not ends.is_inference():  # a tensor that was made in inference mode has no version
        for places in packing[:2]:
            _known[places] = places._version, runs
    return packing


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


class Run(NamedTuple):
    """Packed sequences of the same length that lie side by side: a view of their tokens is a batch, without a copy.

    Attributes:
        sequences: the indices of the sequences among all sequences.
        tokens: the indices of their tokens among all tokens.
        shape: the number of sequences, and the number of tokens of each; sequences without tokens are in no run.
    """

    sequences: slice
    tokens: slice
    shape: tuple[int, int]


# The runs that ``pack`` has found for a packing on a CPU, by its ``cu_seqlens`` and by its ``bounds``. All layers of a
# model use them, forward and backward. The version of the tensor is kept with them, to detect later changes of it.
_known = WeakTensorKeyDictionary()


def host_reads(cu_seqlens: Tensor) -> bool:
    """Return whether the host can read the values of cumulative lengths, without waiting for a GPU."""
    return not (triton_runs_on(cu_seqlens.device) or cu_seqlens.is_meta or torch.compiler.is_compiling())


def runs_of(op: str, cu_seqlens: Tensor, total: int, longest: int | None = None) -> list[Run]:
    """Return the :class:`Run` tuples of the packed sequences with these cumulative lengths.

    Raises:
        ValueError: the lengths fall, do not run from 0 to ``total`` at most, or one exceeds ``longest``.
    """
    runs = _known_runs(cu_seqlens)
    if runs is None or (runs and runs[-1].tokens.stop > total):
        runs = _read_runs(op, cu_seqlens, total)
    if longest is not None:
        for run in runs:
            if run.shape[1] > longest:
                raise ValueError(
                    f"{op}: no sequence may be longer than max_seqlen={longest}, got {run.shape[1]} tokens at sequence "
                    f"{run.sequences.start}"
                )
    return runs


def runs_of_bounds(bounds: Tensor) -> list[Run]:
    """Return the :class:`Run` tuples of packed sequences from the ``bounds`` of their :class:`Packing`.

    Sequences without tokens may be missing from their ``sequences``, since the bounds do not show them.
    """
    runs = _known_runs(bounds)
    if runs is None:
        starts, lengths = torch.unique_consecutive(bounds[0], return_counts=True)
        of_none = len(starts) and starts[-1] == bounds.shape[1]  # the last tokens belong to no sequence
        runs = _find_runs(lengths[: -1 if of_none else None].tolist())
    return runs


def _known_runs(places: Tensor) -> list[Run] | None:
    """Return the runs that were found when the packing with this tensor was made; None if the tensor was changed since
    then, or the runs were not found.
    """
    version, runs = _known.get(places, (None, None))
    return None if runs is None or places._version != version else runs


def _read_runs(op: str, cu_seqlens: Tensor, total: int) -> list[Run]:
    """Read the cumulative lengths of packed sequences, and return the runs; refuse wrong ones as :func:`runs_of`."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > total:
        raise ValueError(f"{op}: cu_seqlens must run from 0 to {total} tokens at most, got {ends[0]} to {ends[-1]}")
    lengths = [*map(operator.sub, ends[1:], ends)]
    if min(lengths, default=0) < 0:
        sequence = next(number for number, length in enumerate(lengths) if length < 0)
        start, end = ends[sequence : sequence + 2]
        raise ValueError(f"{op}: cu_seqlens must not fall, got {end} after {start} at sequence {sequence}")
    return _find_runs(lengths)


def _find_runs(lengths: Iterable[int]) -> list[Run]:
    """Return the runs of packed sequences with these lengths: a run for each group of equal neighbouring lengths."""
    found, sequence, token = list[Run](), 0, 0
    for length, equal in itertools.groupby(lengths):
        count = len(list(equal))
        if length:
            tokens = slice(token, token + length * count)
            found.append(Run(slice(sequence, sequence + count), tokens, (count, length)))
        sequence, token = sequence + count, token + length * count
    return found
