"""The checks of ``clipfast doctor --data``: the shards of a data set on which a run would train."""

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..host import cores
from ..io.files import replace_text
from ..io.progress import each, progress
from ..io.units import BYTES, scaled
from ..train.option_checks import SOURCE_OPTIONS, keys_of, separator_of, source_command
from ..train.train_config import TrainConfig
from .machine import NOTE, PROBLEM, Finding, judged

if TYPE_CHECKING:
    from ..data import IndexCache, PairBatches, Source

PAIRS = 64  # the batch size with which ``--all`` reads every pair
SIDE = 224  # width and height in pixels to which ``--all`` crops the images


def dataset(pattern: str, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the shards that ``pattern`` names, for ``clipfast doctor``: try a few pairs, or read all of them.

    Args:
        pattern: the value of ``--data``.
        options: the flags of ``clipfast doctor``. Those in ``SOURCE_OPTIONS`` say how a sample is read. With ``all``,
            every pair is read, and pairs that cannot be used are written to the file ``list``.
    """
    from ..data import IndexCache, expand_shards
    from ..data.names import is_folder, is_synthetic

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
    pairs = _few_pairs(names, options)  # stores the index of each shard that it opens, so it precedes ``index.known``
    here = [*files, *folders]
    indexed = [shard for shard in index.known(here) if shard is not None]
    if here:
        value = f"{len(indexed):,} of {len(here):,} here, with {sum(shard.count for shard in indexed):,} samples"
        command = source_command(["index", pattern, "--workers", str(cores())], options)
        fix = f"{command}: otherwise the run begins by indexing"
        yield judged("indexed", value, NOTE, fix, applies=len(indexed) < len(here))
    damaged = [shard.name for shard in indexed if shard.damage]
    if damaged:
        fix = "correct it, or make it anew: a run reads the samples that are left in it"
        yield Finding("damaged", f"{len(damaged):,} of them; the first is {damaged[0]}", NOTE, fix)
    yield pairs
    if options.get("all"):
        yield _every_pair(names, options, index)


def _few_pairs(names: Sequence[str], options: Mapping[str, Any]) -> Finding:
    """Check for ``clipfast doctor`` whether a training run with these ``options`` could read a few pairs of shards."""
    import torch

    from ..models import CLIP, get_model_config
    from ..models.tokenizer import Tokenizer
    from ..train.preflight import try_shards

    given = {name: options[name] for name in SOURCE_OPTIONS if name in options}
    given |= {"json_text_key": tuple(options.get("json_text_key", ()))}
    config = TrainConfig(train_data="those that are tried", **given)
    with torch.device("meta"):
        model = CLIP(get_model_config(config.model))
    try:
        batch = try_shards(config, list(names), model, Tokenizer())
    except ValueError as error:
        return Finding("pairs", str(error), PROBLEM, "correct --data, or make the shards anew")
    value = f"{len(batch)} of {len(batch) + len(batch.skipped)} that were tried are usable"
    skipped = f"first: {batch.skipped[0]}" if batch.skipped else ""
    return judged("pairs", value, NOTE, skipped, applies=bool(batch.skipped))


def _batches(sources: "Sequence[Source]", options: Mapping[str, Any]) -> "PairBatches":
    """Return all pairs of the sources as batches, for ``clipfast doctor --all``."""
    from ..data import ANY_ORDER, CroppedImages, PairBatches
    from ..models.tokenizer import Tokenizer

    return PairBatches(sources, ANY_ORDER, CroppedImages(SIDE), Tokenizer(), PAIRS, keys=keys_of(options))


def _every_pair(names: Sequence[str], options: Mapping[str, Any], index: "IndexCache") -> Finding:
    """Read every pair of the shards on all cores, for ``clipfast doctor --all``; report how many cannot be used."""
    from ..data import LOST, EveryPair, Skipped, lost_parts, made_by_workers, open_sources
    from ..models.images import SampleError

    sources, bad = list["Source"](), list[Skipped]()
    for name in each(names, "index", "shards"):
        try:
            sources += open_sources([name], index=index)
        except SampleError as error:
            bad.append(Skipped(os.path.basename(name), error.kind, str(error)))
    damaged = [shard for source in sources for shard in source.shards if shard.damage]
    bad += lost_parts(damaged)
    every, total = EveryPair(_batches(sources, options)), sum(map(len, sources))
    workers = min(cores(), len(every.pieces)) if len(every.pieces) > 1 else 0
    with (
        made_by_workers(every, every.pieces, workers) as found,
        progress(total, "reading every pair", "pairs") as advance,
    ):
        for piece, skipped in zip(every.pieces, found, strict=True):
            bad += skipped
            advance(piece[2] - piece[1])
    if options.get("list") is not None:
        lines = ("\t".join(" ".join(field.split()) for field in one) + "\n" for one in bad)
        replace_text(options["list"], "".join(lines))
    kinds = collections.Counter(one.kind for one in bad if one.kind != LOST)
    kinds += collections.Counter({LOST: sum(shard.lost for shard in damaged)})
    total += sum(shard.lost for shard in damaged)
    if not bad:
        return Finding("every pair", f"all {total:,} are usable")
    limit = TrainConfig.max_bad_fraction
    said = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common()) or "parts of shards are lost"
    fix = f"first: {bad[0]}; --list FILE has all of them; beyond {limit:.0%}, a run ends (--max-bad-fraction)"
    status = PROBLEM if kinds.total() > limit * total else NOTE
    return Finding("every pair", f"{kinds.total():,} of {total:,} cannot be used: {said}", status, fix)
