"""Benchmarks of whole data pipelines, ours and that of OpenCLIP's trainer: one pass over shards of pairs, in
batches.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clipfast import Tokenizer
from clipfast.data import CroppedImages, Mix, Order, PairBatches, ShardSource, pair_loader
from clipfast.kernels.reference import CLIP_MEAN, CLIP_STD
from clipfast.models.tokenizer import CONTEXT_LENGTH

from . import peers

BATCH = 256  # pairs of a batch; all pairs, if there are fewer


class _Batches:
    """A benchmark candidate that makes all batches of one pass over the pairs; subclasses yield the batches."""

    def __call__(self, order: Tensor) -> Tensor:
        for _ in self.batches():
            pass
        return order

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and texts of each batch of a benchmarked data pipeline."""
        raise NotImplementedError

    def observe(self, **_: Tensor) -> dict[str, Tensor]:
        """Return a pipeline's average colour and all texts for a benchmark; order and crops do not change them."""
        colours, texts = [], []
        for images, ids in self.batches():
            colours.append(denormalized(images).mean((2, 3)))
            texts += padded(ids).tolist()
        return {"value": torch.cat(colours).mean(0), "texts": torch.tensor(sorted(texts)).double()}


class OurBatches(_Batches):
    """The batches of our pipeline, :func:`clipfast.data.pair_loader`."""

    def __init__(self, source: ShardSource, crops: CroppedImages, workers: int) -> None:
        pairs = len(source)
        size = min(pairs, BATCH)
        self.number, self.workers = pairs // size, workers
        order = Mix([Order(source.sizes, 0)], [1], 0)
        self.made = PairBatches([source], order, crops, Tokenizer(), size)

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield images and texts of each batch of our benchmarked data pipeline."""
        for batch in pair_loader(self.made, 0, self.number, self.workers):
            yield batch.images_on(torch.device("cpu")), batch.texts


class OpenClipBatches(_Batches):
    """The batches of the pipeline that OpenCLIP's trainer builds for shards."""

    def __init__(self, shards: list[str], pairs: int, transform: Callable[[Any], Tensor], workers: int) -> None:
        self.data, self.transform = open_clip_data(), transform
        self.tokenizer = peers.need("open_clip", "open_clip_torch").SimpleTokenizer()
        self.options = argparse.Namespace(
            train_data="::".join(shards), train_num_samples=pairs, train_data_upsampling_factors=None, seed=0,
            batch_size=min(pairs, BATCH), workers=workers, world_size=1,
        )  # fmt: skip

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and texts of each batch of OpenCLIP's benchmarked data pipeline."""
        found = self.data.get_wds_dataset(self.options, self.transform, is_train=True, tokenizer=self.tokenizer)
        for batch in found.dataloader:
            images, texts = batch.values() if isinstance(batch, dict) else batch
            yield images, texts
        if self.options.workers:
            del found
            gc.collect()  # ends the workers, whose CPU time is known only after their end


@functools.cache
def open_clip_data() -> Any:
    """Return the module of OpenCLIP's trainer that reads data, to benchmark it.

    Raises:
        MissingError: OpenCLIP's trainer is not installed.
    """
    data: Any = peers.need("open_clip_train.data", "'open_clip_torch[training]'")
    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        # Since version 0.2.90, webdataset yields a mark at the end of each shard. OpenCLIP would treat it as a file
        # without a name.
        data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    return data


def denormalized(images: Tensor) -> Tensor:
    """Return a benchmarked pipeline's images [..., 3, H, W], bytes or normalised floats, as pixels from 0 to 1."""
    if images.dtype == torch.uint8:
        return images / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return images * std + mean


def padded(texts: Tensor) -> Tensor:
    """Return a benchmarked tokenizer's ids, filled up with zeros to the length that OpenCLIP gives them."""
    return torch.nn.functional.pad(texts, (0, CONTEXT_LENGTH - texts.shape[1]))
