"""Image-text pairs: ``samples`` reads them from shards, ``stream`` makes batches of them for training."""

from .samples import caption, count_samples, decode_image, expand_shards, metadata, read_samples
from .stream import Batch, PairStream, pair_loader

__all__ = [
    "Batch", "PairStream", "caption", "count_samples", "decode_image", "expand_shards", "metadata", "pair_loader",
    "read_samples",
]  # fmt: skip
