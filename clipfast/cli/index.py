"""Index shards of image-text pairs: find the position of each sample, and the damaged places.

A training run makes the same index when it starts, in as many processes as it has data workers. A shard that must first
be copied is indexed later, if the end of a Parquet file, sizes.json or img2dataset's NNNNN_stats.json says how many
samples the shard has. The index is kept in the folder that CLIPFAST_CACHE names, or in ~/.cache/clipfast, and only
shards that have changed are read again.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

from ..io.files import replace_text
from ..io.text import align
from ..train.option_checks import SOURCE_OPTIONS, keys_of, separator_of, source_command
from .arguments import WORKERS, add_output
from .options import add_arguments

EPILOG = """\
examples:
  clipfast index 'data/{00000..01243}.tar' --workers 16
  clipfast index images.parquet
  clipfast index bundled:emoji/noto --unique-by label --json index.json

exit code: 0 indexed, 2 a shard is missing, or cannot be read"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast index``."""
    parser = commands.add_parser("index", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="shards, named as for --train-data of clipfast train")
    add_arguments(parser, SOURCE_OPTIONS)
    add("--workers", type=WORKERS, default=1, metavar="N", help="processes that read shards (default: 1)")
    add("--unique-by", metavar="KEY", help="also read this json key, or 'caption', as training with --unique-by does")
    add_output(parser, "--json", help="also write the result to FILE")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast index``: index the shards, print what was found, and return the exit code."""
    from ..data import IndexCache, expand_shards, identities, open_sources

    started = time.perf_counter()
    index = IndexCache(separator=separator_of(vars(args)))
    sources = open_sources(expand_shards(args.shards), args.workers, index, whole=True)
    shards = [shard for source in sources for shard in source.shards]
    damaged = {shard.name: shard.damage for shard in shards if shard.damage}
    found: dict[str, Any] = {
        "shards": len(shards),
        "samples": sum(shard.count for shard in shards),
        "bytes": sum(shard.size for shard in shards),
        "lost": sum(sum(damage.values()) for damage in damaged.values()),
    }
    if args.unique_by is not None:
        found_in = [identities(source, args.unique_by, keys_of(vars(args))) for source in sources]
        found["different"] = len(np.unique(np.concatenate(found_in)))
    found |= {"seconds": round(time.perf_counter() - started, 2), "cache": str(index.folder)}
    print(align([(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in found.items()]))
    for name, damage in damaged.items():
        for place, count in damage.items():
            print(f"{name}: {f'about {count} sample(s)' if count else 'parts'} are lost: {place}")
    decode = source_command(["doctor", "--data", args.shards, "--all"], vars(args))
    print(f"No image was decoded; this command decodes all of them: {decode}")
    if args.json is not None:
        replace_text(args.json, json.dumps(found | {"damage": damaged}, indent=2) + "\n")
    return 0
