"""Image-text pairs: reading them from shards (``samples``), and batches of them for training (``stream``)."""

from .samples import caption, count_samples, decode_image, expand_shards, metadata, read_samples
from .stream import Batch, PairStream, pair_loader

__all__ = [
    "Batch",
    "PairStream",
    "caption",
    "count_samples",
    "decode_image",
    "expand_shards",
    "metadata",
    "pair_loader",
    "read_samples",
]
