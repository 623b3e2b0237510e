"""Image-text pairs, from the files that hold them to batches.

``names`` expands patterns to names of shards, ``keys`` selects the image and the captions in a sample, and ``samples``
reads these. A shard is a tar file (``tar``), a Parquet or Arrow file (``rows``), a table (``tables``), a folder of
images (``folders``), or pairs that are drawn without files (``synthetic``, ``drawn_shapes``). ``source`` reads any
sample by its number: ``index`` knows the place of each sample, ``staging`` copies shards without random access, and
``counts`` finds the number of samples of a shard before it is copied. ``order`` determines the sequence of samples of a
run, ``batch_plan`` the size of each batch, ``loader`` makes batches of them in processes that ``workers`` starts
(``packed_batches`` for NaFlex), and ``read_ahead`` copies their shards in time. ``trial`` makes a batch of a few
samples, to see whether they can be used.
"""

from .batch_plan import BatchPlan, BudgetedBatches, EqualBatches, TokenBudget
from .crops import CroppedImages, CroppedToSequence, WholeImages
from .encoded import EncodedCrops, check_decoder
from .index import LOST, IndexCache, ShardIndex
from .keys import Keys, read_keys, read_separator
from .loader import Batch, PairBatches, Skipped, lost_parts, pair_loader
from .names import expand_shards
from .order import Mix, Order, Unique
from .packed_batches import PackedBatches
from .samples import caption, decode_image, metadata
from .source import MAX_OPEN, ShardSource, Source, identities, open_limit, open_shards, open_sources
from .synthetic import SyntheticBatches, SyntheticSource
from .trial import ANY_ORDER, EveryPair, spread, try_pairs
from .workers import PREFETCH, made_by_workers

__all__ = [
    "ANY_ORDER",
    "LOST",
    "MAX_OPEN",
    "PREFETCH",
    "Batch",
    "BatchPlan",
    "BudgetedBatches",
    "CroppedImages",
    "CroppedToSequence",
    "EncodedCrops",
    "EqualBatches",
    "EveryPair",
    "IndexCache",
    "Keys",
    "Mix",
    "Order",
    "PackedBatches",
    "PairBatches",
    "ShardIndex",
    "ShardSource",
    "Skipped",
    "Source",
    "SyntheticBatches",
    "SyntheticSource",
    "TokenBudget",
    "Unique",
    "WholeImages",
    "caption",
    "check_decoder",
    "decode_image",
    "expand_shards",
    "identities",
    "lost_parts",
    "made_by_workers",
    "metadata",
    "open_limit",
    "open_shards",
    "open_sources",
    "pair_loader",
    "read_keys",
    "read_separator",
    "spread",
    "try_pairs",
]  # fmt: skip
