"""A trial: a few pairs are read and prepared as in training, to see what all of them are like."""

import collections
from typing import Any

from ..images import SampleError
from .loader import Batch, PairBatches, Skipped
from .order import Mix, Order
from .samples import sample_name

ANY_ORDER = Mix([Order([1], 0)], [1.0], 0)  # for batches that are only tried: no trial asks for their order
# These say what to do if most pairs cannot be used for one reason, by its kind, where the reason does not say it.
FIXES = {
    "no such field": "name a key that the pairs have",
    "not an image": "convert such images, or leave their shards out",
}


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` numbers from 0 to ``count - 1``, evenly spread, with the first and the last among them."""
    kept = min(count, most)
    return [number * (count - 1) // max(kept - 1, 1) for number in range(kept)]


def try_pairs(batches: PairBatches, each: int) -> Batch:
    """Return up to ``each`` pairs of every shard as one batch, prepared as ``batches`` prepares them.

    Raises:
        SampleError: not one of them can be used, or there are none; the message counts the reasons, and says what to
            do about the most common one.
    """
    images, captions, skipped = list[Any](), list[str](), list[Skipped]()
    for source in batches.sources:
        first = 0
        for count in source.sizes:
            for within in spread(count, each):
                name = source.name(first + within)
                try:
                    raw = source.read(first + within, batches.keys)
                    name = sample_name(raw)
                    image, text = batches.pair(raw, batches.seed)
                except SampleError as error:
                    skipped.append(Skipped(name, error.kind, str(error)))
                    continue
                images.append(image)
                captions.append(text)
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
