"""The shards that a run would train on."""

import os
import time
from collections.abc import Iterator

from ..units import BYTES, scaled
from .findings import NOTE, PROBLEM, Finding, judged
from .folders import SLOW, read_speed

PAIRS = 4  # that are read of the first shard
SIDE = 224  # pixels of the images that are made of them


def dataset(pattern: str) -> Iterator[Finding]:
    """Look at the shards that ``pattern`` names: all of them by their files, and at a few pairs of the first."""
    from ..data import IndexCache, expand_shards
    from ..data.samples import is_remote

    try:
        names = expand_shards(pattern)
    except ValueError as error:
        yield Finding("shards", str(error), PROBLEM, "correct --data")
        return
    here = [name for name in names if os.path.isfile(name) and not is_remote(name)]
    size = sum(os.path.getsize(name) for name in here)
    elsewhere = f", and {len(names) - len(here):,} elsewhere" if len(here) < len(names) else ""
    yield Finding("shards", f"{len(here):,} files of {scaled(size, BYTES)} here{elsewhere}")
    pairs = list(_few_pairs(names[0]))
    indexed = [shard for shard in IndexCache().known(here) if shard is not None]
    value = f"{len(indexed):,} of these files, with {sum(shard.count for shard in indexed):,} samples"
    fix = f"clipfast index '{pattern}' --workers 4: otherwise the run begins with it"
    yield judged("indexed", value, NOTE, fix, applies=len(indexed) < len(here))
    damaged = [shard.name for shard in indexed if shard.damage]
    if damaged:
        fix = "make it anew; what is left of it is read"
        yield Finding("damaged", f"{len(damaged):,} of them; the first is {damaged[0]}", NOTE, fix)
    yield from pairs
    if here:
        yield _reading(here[-1])


def _few_pairs(name: str) -> Iterator[Finding]:
    """Read a few pairs of a shard as a run with default options would."""
    from ..data import CroppedImages, Mix, Order, PairBatches, open_sources, try_pairs
    from ..images import SampleError
    from ..tokenizer import Tokenizer

    try:
        (source,) = open_sources([name])
        order = Mix([Order(source.sizes or [0], 0)], (1.0,), 0)
        batches = PairBatches([source], order, CroppedImages(SIDE), Tokenizer(), PAIRS)
        try_pairs(batches, PAIRS)  # the first time, modules are imported
        started = time.perf_counter()
        batch = try_pairs(batches, PAIRS)
    except (SampleError, ValueError) as error:
        yield Finding("pairs", str(error), PROBLEM, "correct --data, or make the shards anew")
        return
    each = (time.perf_counter() - started) / (len(batch) + len(batch.skipped))
    value = f"{len(batch)} of {len(batch) + len(batch.skipped)} that were tried are usable, {1000 * each:.1f} ms each"
    skipped = f"first: {batch.skipped[0]}" if batch.skipped else ""
    yield judged("pairs", value, NOTE, skipped, applies=bool(batch.skipped))


def _reading(name: str) -> Finding:
    descriptor = os.open(name, os.O_RDONLY)
    try:
        speed = read_speed(descriptor)
    finally:
        os.close(descriptor)
    value = f"{os.path.basename(name)} at {scaled(speed, BYTES)}/s"
    return judged("read", value, NOTE, "it is slow: copy the shards to a faster disk", applies=speed < SLOW)
