"""The shards that a run would train on."""

import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..training.options import keys_of, separator_of
from ..units import BYTES, scaled
from .findings import NOTE, PROBLEM, Finding, judged
from .folders import CHUNK, SLOW, read_speed

if TYPE_CHECKING:
    from ..data import IndexCache

PAIRS = 4  # that are read of the first shard
SIDE = 224  # pixels of the images that are made of them


def dataset(pattern: str, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Look at the shards that ``pattern`` names: all of them by their files, and at a few pairs of the first.

    ``options`` say which keys and which separator the pairs have, as the flags of ``SOURCE_OPTIONS``.
    """
    from ..data import IndexCache, expand_shards
    from ..data.samples import is_folder, is_synthetic

    try:
        names = expand_shards(pattern)
    except ValueError as error:
        yield Finding("shards", str(error), PROBLEM, "correct --data")
        return
    index = IndexCache(separator=separator_of(options))
    files, folders = [name for name in names if os.path.isfile(name)], list(filter(is_folder, names))
    drawn = sum(map(is_synthetic, names))
    kinds = {
        f"file(s) of {scaled(sum(map(os.path.getsize, files)), BYTES)} here": len(files),
        "folder(s) of images here": len(folders),
        "set(s) of synthetic pairs": drawn,
        "elsewhere": len(names) - len(files) - len(folders) - drawn,
    }
    yield Finding("shards", ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count))
    pairs = list(_few_pairs(names[0], options, index))
    here = [*files, *folders]
    indexed = [shard for shard in index.known(here) if shard is not None]
    if here:
        value = f"{len(indexed):,} of {len(here):,} here, with {sum(shard.count for shard in indexed):,} samples"
        fix = f"clipfast index '{pattern}' --workers 4: otherwise the run begins with it"
        yield judged("indexed", value, NOTE, fix, applies=len(indexed) < len(here))
    damaged = [shard.name for shard in indexed if shard.damage]
    if damaged:
        fix = "make it anew; what is left of it is read"
        yield Finding("damaged", f"{len(damaged):,} of them; the first is {damaged[0]}", NOTE, fix)
    yield from pairs
    if files:
        yield _reading(files[-1])


def _few_pairs(name: str, options: Mapping[str, Any], index: "IndexCache") -> Iterator[Finding]:
    """Read a few pairs of a shard as a run with these options would, and with the defaults of all others."""
    from ..data import ANY_ORDER, CroppedImages, PairBatches, open_sources, try_pairs
    from ..images import SampleError
    from ..tokenizer import Tokenizer

    try:
        sources, keys = open_sources([name], index=index), keys_of(options)
        batches = PairBatches(sources, ANY_ORDER, CroppedImages(SIDE), Tokenizer(), PAIRS, keys=keys)
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
    """Say how fast the first part of a file is read; opening a small one takes longer than reading it."""
    descriptor = os.open(name, os.O_RDONLY)
    try:
        is_large = os.fstat(descriptor).st_size >= CHUNK
        speed = read_speed(descriptor)
    finally:
        os.close(descriptor)
    value = f"{os.path.basename(name)} at {scaled(speed, BYTES)}/s"
    return judged(
        "read", value, NOTE, "it is slow: copy the shards to a faster disk", applies=is_large and speed < SLOW
    )
