"""Batches of image-text pairs for training.

The order of the samples is decided before anything is read, and each sample is augmented from random numbers that
depend only on the seed, the pass over the data and the sample. So any batch can be made by itself, on any process: an
interrupted run continues with the same batches, bit by bit, also on another number of ranks and data workers.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..models.file_tokenizer import FileTokenizer
from ..models.images import SampleError
from ..models.packed_images import PackedImages
from ..models.tokenizer import Tokenizer, trim_padding
from .index import LOST, ShardIndex
from .keys import DEFAULT_KEYS, Keys
from .order import Mix, Stretch, Unique, permutation, random_words
from .read_ahead import ReadAhead
from .samples import RawSample, caption, field, image_bytes, sample_name
from .source import Source
from .workers import PREFETCH, made_by_workers

# If a sample and this many substitutes cannot be used, the run stops: nothing in the data seems to be usable.
MAX_SUBSTITUTES = 100


class Skipped(NamedTuple):
    """A skipped sample: its name, the kind of the reason in two words, and the reason in a sentence."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def lost_parts(shards: Iterable[ShardIndex]) -> list[Skipped]:
    """Return a :class:`Skipped` for each damaged part of the shards, so that the report lists lost pairs too."""
    return [Skipped(os.path.basename(shard.name), LOST, loss) for shard in shards for loss in shard.losses()]


class DeviceImages(Protocol):
    """Images of a batch that are still to be decoded or drawn on the device that trains."""

    def __len__(self) -> int: ...

    def pin_memory(self) -> DeviceImages:
        """Return these images of a training batch with all data for a GPU in pinned memory."""

    def on(self, device: torch.device) -> Tensor:
        """Decode or draw the images on ``device``: uint8, [B, 3, H, W]."""


@dataclasses.dataclass
class Batch:
    """A training batch: images, texts, and statistics of its making.

    Attributes:
        images: uint8 or float, [B, 3, H, W]; packed images; or images that are still to be made on the device.
        texts: token ids, [B, L].
        skipped: samples that could not be used and were replaced by others.
        seconds: time spent on each stage: "read", "decode", "tokenize" and "other".
        bytes_read: bytes read from the shards and from the files that they name.
    """

    images: Tensor | PackedImages | DeviceImages
    texts: Tensor
    skipped: list[Skipped]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes_read: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def images_on(self, device: torch.device) -> Tensor | PackedImages:
        """Return the images of the batch on ``device``. From pinned memory, they are copied to a GPU asynchronously."""
        if isinstance(self.images, Tensor | PackedImages):
            return self.images.to(device, non_blocking=True)
        return self.images.on(device)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; the data loader calls this if batches are copied to a GPU."""
        return dataclasses.replace(self, images=self.images.pin_memory(), texts=self.texts.pin_memory())


def stacked(images: Iterable[Tensor], count: int) -> Tensor:
    """Stack ``count`` images of one size into the image tensor of a batch."""
    for index, image in enumerate(images):
        if index == 0:
            together = room_for(count, image)
        together[index] = image
    return together


def room_for(count: int, like: Tensor) -> Tensor:
    """Allocate a tensor for ``count`` images; in a data worker, its memory is shared with the process that trains."""
    shape = (count, *like.shape)
    if get_worker_info() is None:
        return like.new_empty(shape)
    storage = torch.UntypedStorage._new_shared(count * like.nbytes)
    return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape, like.new_empty(shape, device="meta").stride())


@dataclasses.dataclass
class PairBatches(Dataset[Batch]):
    """The batches of a run as a map-style dataset: batch ``number``, or this rank's part of it.

    Attributes:
        sources: the sets of pairs.
        order: the order of the samples, which determines every batch.
        transform: turns the bytes of an image into a tensor, or into another input for ``gather``, with random numbers
            from torch's generator.
        tokenizer: tokenizer of the model.
        batch_size: pairs of all ranks together.
        seed: seed of the augmentations.
        unique_by: "caption" or a key of the samples' json. ``order`` puts no two samples with the same value into a
            batch; samples without the key cannot be used.
        keyword_prob: as :func:`clipfast.data.caption` takes it.
        keys: the keys of the image and the captions in a sample.
        keeps_padding: whether texts keep the padding that all of a batch have; otherwise it is cut off.
        rank, world_size: this rank takes the ``rank``-th of ``world_size`` equal parts of each batch.
        gather: makes the images of a batch from the results of ``transform`` and the number of images.
    """

    sources: Sequence[Source]
    order: Mix | Unique
    transform: Callable[[bytes], Any]
    tokenizer: Tokenizer | FileTokenizer
    batch_size: int
    seed: int = 0
    unique_by: str | None = None
    keyword_prob: float = 0.0
    keys: Keys = DEFAULT_KEYS
    keeps_padding: bool = False
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Iterable[Any], int], Tensor | PackedImages | DeviceImages] = stacked

    def __post_init__(self) -> None:
        """Refuse a batch size that is less than 1, or cannot be divided among the ranks.

        Raises:
            ValueError: the batch size is refused.
        """
        if self.batch_size < 1:
            raise ValueError(f"a batch must have at least one pair, got batch_size {self.batch_size}")
        if self.batch_size % self.world_size:
            raise ValueError(f"a batch of {self.batch_size} pairs cannot be divided among {self.world_size} ranks")

    def __getitem__(self, number: int) -> Batch:
        """Read, decode and tokenize batch ``number`` of the run, counted from 0.

        Raises:
            ValueError: far too many samples cannot be used.
        """
        whole = self._whole(number)
        mine = self._part(whole)
        taken = self._identities(whole)
        clock, before = _Clock(), self._bytes_read()
        captions, skipped = list[str](), list[Skipped]()

        def usable() -> Iterator[Any]:
            """Yield the images of a training batch, and collect their captions."""
            for place in zip(mine.source.tolist(), mine.data_pass.tolist(), mine.sample.tolist(), strict=True):
                image, text = self._usable(*place, taken, skipped, clock)
                captions.append(text)
                yield image

        images = self.gather(usable(), len(mine))
        texts = self.token_ids(captions)
        clock.stop("tokenize")
        return Batch(images, texts, skipped, clock.seconds, self._bytes_read() - before)

    def token_ids(self, captions: list[str]) -> Tensor:
        """Tokenize the texts of a batch, and cut off the padding that all of them have, unless it is to be kept."""
        texts = self.tokenizer(captions)
        return texts if self.keeps_padding else trim_padding(texts)

    def samples(self, number: int) -> Stretch:
        """Return the source and the number of each sample of batch ``number`` on this rank, without reading it.

        Raises:
            ValueError: the order cannot be computed.
        """
        return self._part(self._whole(number))

    def _whole(self, number: int) -> Stretch:
        """Return the samples of batch ``number`` for all ranks together."""
        first, pairs = self.extent(number)
        return self.order(first, first + pairs)

    def extent(self, number: int) -> tuple[int, int]:
        """Return the position of the first pair of batch ``number``, and its number of pairs, of all ranks together."""
        return number * self.batch_size, self.batch_size

    def _part(self, whole: Stretch) -> Stretch:
        """Return this rank's part of a training batch."""
        part = len(whole) // self.world_size
        return whole[self.rank * part : (self.rank + 1) * part]

    def _bytes_read(self) -> int:
        """Return the number of bytes that were read from all shards."""
        return sum(source.bytes_read for source in self.sources)

    def _identities(self, stretch: Stretch) -> set[int]:
        """Return the identities of all samples of a batch, for ``unique_by``: no substitute may have one of them."""
        return set(self.order.identities_of(stretch).tolist()) if isinstance(self.order, Unique) else set()

    def _usable(
        self, source: int, data_pass: int, sample: int, taken: set[int], skipped: list[Skipped], clock: _Clock
    ) -> tuple[Any, str]:
        """Return image and caption of a training sample, or of its first usable substitute; list the skipped ones."""
        tried: list[Skipped] = []
        for substitute in self._substitutes(source, data_pass, sample, taken):
            name = self.sources[source].name(substitute)
            try:
                clock.stop("other")
                raw = self.sources[source].read(substitute, self.keys)
                clock.stop("read")
                name = sample_name(raw)
                pair = self.pair(raw, int(random_words(1, self.seed, source, data_pass, substitute, 0)[0]))
                clock.stop("decode")
                return pair
            except SampleError as error:
                tried.append(Skipped(name, error.kind, str(error)))
                if len(tried) == 1:  # an unusable substitute is listed at its own place in the order
                    skipped.append(tried[0])
        raise ValueError(f"not one of {len(tried)} samples can be used; first: {tried[0]}")

    def _substitutes(self, source: int, data_pass: int, sample: int, taken: set[int]) -> Iterator[int]:
        """Yield ``sample``, then the samples to try in its stead if it cannot be read.

        These depend only on the seed and on the place of ``sample`` in the order. With ``unique_by``, samples that have
        the identity of ``sample`` come first, then samples of identities that the batch does not have. (Two substitutes
        in one batch may still have the same identity.)
        """
        yield sample
        key = (self.seed, source, data_pass, sample)
        if isinstance(self.order, Unique):
            alike = self.order.alike(source, sample)
            yield from (int(other) for other in alike[permutation(len(alike), *key, 2)] if other != sample)
        words = random_words(MAX_SUBSTITUTES, *key, 1)
        others = (words % np.uint64(len(self.sources[source]))).astype(np.int64)
        for other in others.tolist():
            if not isinstance(self.order, Unique) or int(self.order.identities[source][other]) not in taken:
                yield other

    def pair(self, raw: RawSample, seed: int) -> tuple[Any, str]:
        """Decode and augment the image of a training sample and choose its caption, by random numbers from ``seed``.

        Raises:
            SampleError: the sample cannot be used.
        """
        if self.unique_by not in (None, "caption"):
            field(raw, self.unique_by)
        text = caption(raw, self.keyword_prob, random.Random(seed), self.keys)
        data = image_bytes(raw, self.keys)
        with torch.random.fork_rng(devices=[]):  # afterwards this process has its own random state again
            torch.default_generator.manual_seed(seed)
            return self.transform(data), text


class _Clock:
    """A stopwatch that adds up the seconds of each stage of making a batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Add the time since the last call to a stage of the data pipeline, such as the decoding."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def pair_loader(
    batches: PairBatches, first: int, stop: int, num_workers: int, *, pin_memory: bool = False, local_ranks: int = 1
) -> Generator[Batch, None, None]:
    """Yield training batches ``first`` to ``stop - 1``, made by ``num_workers`` processes, or by this one if 0.

    Threads of this process copy shards ahead of their use, if they are read from copies. The room for copies is shared
    by the ``local_ranks`` processes of this machine. Closing the generator tells workers and threads to end. Workers
    that have not ended after a moment are killed; a thread ends when its copy gets its next piece of data.

    Raises:
        ValueError: a batch could not be made, or a data worker died.
        DiskFullError: there is no space for the copy of a shard.
    """
    # The workers start before the threads: in a process that is forked while a thread holds a lock, the lock stays
    # taken.
    with (
        made_by_workers(batches, range(first, stop), num_workers, pin_memory=pin_memory) as iterator,
        ReadAhead(batches, first, stop, num_workers * PREFETCH, local_ranks) as ahead,
    ):
        for number, batch in enumerate(iterator, first + 1):
            ahead.reached(number)
            yield batch
