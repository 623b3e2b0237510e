"""Trials of data: a few pairs are read and prepared as in training, to see whether pairs can be used."""

import collections
from typing import Any

from torch.utils.data import Dataset

from ..models.images import SampleError
from .loader import Batch, PairBatches, Skipped
from .order import Mix, Order
from .samples import sample_name
from .source import Source

PIECE = 64  # number of pairs of one source that a process checks before it reports

ANY_ORDER = Mix([Order([1], 0)], [1.0], 0)  # a placeholder for batches of a trial, which never use the order
# Advice for the case that most pairs cannot be used for one kind of reason, if the reason itself gives none.
FIXES = {
    "no such field": "name a key that the pairs have",
    "not an image": "convert such images, or leave their shards out",
}


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` numbers of shards or pairs to try, evenly spread from 0 to ``count - 1``."""
    kept = min(count, most)
    return [number * (count - 1) // max(kept - 1, 1) for number in range(kept)]


def try_pair(batches: PairBatches, source: Source, number: int) -> tuple[Any, str] | Skipped:
    """Read a sample of one source and prepare it as in training; return image and caption, or why it cannot be used."""
    name = source.name(number)
    try:
        raw = source.read(number, batches.keys)
        name = sample_name(raw)
        return batches.pair(raw, batches.seed)
    except SampleError as error:
        return Skipped(name, error.kind, str(error))


class EveryPair(Dataset[list[Skipped]]):
    """A check of all pairs of ``batches`` as a dataset: each item lists the unusable pairs among ``PIECE`` pairs."""

    def __init__(self, batches: PairBatches) -> None:
        self.batches = batches
        self.pieces = [
            (place, first, min(first + PIECE, len(source)))
            for place, source in enumerate(batches.sources)
            for first in range(0, len(source), PIECE)
        ]

    def __getitem__(self, piece: tuple[int, int, int]) -> list[Skipped]:
        """Return the unusable pairs of a piece, which is a triple: index of the source, first pair, end."""
        place, first, stop = piece
        source = self.batches.sources[place]
        tried = [try_pair(self.batches, source, number) for number in range(first, stop)]
        source.close()  # without this, too many shards could be open
        return [one for one in tried if isinstance(one, Skipped)]


def try_pairs(batches: PairBatches, each: int) -> Batch:
    """Try up to ``each`` pairs of every shard; return the usable ones as one batch, prepared as in training.

    Raises:
        SampleError: no pair can be used, or there are no pairs. The message counts the reasons, and gives advice on the
            most common one.
    """
    images, captions, skipped = list[Any](), list[str](), list[Skipped]()
    for source in batches.sources:
        first = 0
        for count in source.sizes:
            for within in spread(count, each):
                pair = try_pair(batches, source, first + within)
                if isinstance(pair, Skipped):
                    skipped.append(pair)
                    continue
                images.append(pair[0])
                captions.append(pair[1])
            first += count
    kinds = collections.Counter(sample.kind for sample in skipped).most_common()
    if not skipped and not images:
        raise SampleError("the shards hold no samples", "no samples")
    if not images:
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds)
        raise SampleError(
            f"not one of {len(skipped)} pairs that were tried can be used ({counts}); first: {skipped[0]}"
            + (f"; {FIXES[kinds[0][0]]}" if kinds[0][0] in FIXES else ""),
            kinds[0][0],
        )
    return Batch(batches.gather(images, len(images)), batches.tokenizer(captions), skipped)
