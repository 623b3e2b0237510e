"""Batches of image-text pairs for training, in an order that the seed and the number of workers determine.

The order is decided before anything is decoded, and each sample is augmented from a random state that depends only on
its name, the epoch and the pass. A run that was interrupted can therefore skip the batches that it has seen without
decoding them, and continues to the last bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import random
import signal
import sys
import zlib
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..tokenizer import trim_padding
from .samples import RawSample, caption, decode_image, field, read_samples, sample_name

if TYPE_CHECKING:
    from PIL import Image

SHUFFLE_BUFFER = 5000
# How many batches' worth of samples may wait for a batch without another sample of their identity. More are dropped.
MAX_HELD_BATCHES = 16
# A run stops if so many samples are unusable before the first that can be used.
MAX_UNUSABLE = 100
PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies

T = TypeVar("T")
Item = tuple[int, RawSample]  # number of the pass over the shards, and sample


@dataclasses.dataclass
class Batch:
    """Images and their texts, and the samples that had to be left out. If all of them were, B is 0."""

    images: Tensor  # [B, 3, H, W]
    texts: Tensor  # [B, L]
    skipped: list[tuple[str, str]]  # (name, reason)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; the data loader calls this if batches are copied to a GPU."""
        return Batch(self.images.pin_memory(), self.texts.pin_memory(), self.skipped)


@dataclasses.dataclass
class PairStream(IterableDataset[Batch]):
    """One epoch of batches from shards, divided among the workers of a data loader.

    ``unique_by`` is "caption" or a key of the samples' json. No two samples of a batch have the same value of it, since
    a second drawing of the same concept would be a false negative.
    """

    shards: list[str]  # tar files, as :func:`clipfast.data.expand_shards` gives them
    transform: Callable[[Image.Image], Tensor]  # draws its random numbers from torch's generator
    tokenizer: Callable[[list[str]], Tensor]
    batch_size: int
    num_batches: int  # of the epoch; the shards are read as often as that needs
    seed: int = 0  # of the order and of the augmentations
    epoch: int = 0  # another epoch has another order
    first_batch: int = 0  # so many batches are left out at the start, without being decoded
    unique_by: str | None = None
    keyword_prob: float = 0.0  # see :func:`clipfast.data.caption`
    reads_padding: bool = False  # whether the model reads the padding of texts, which then stays

    def __iter__(self) -> Iterator[Batch]:
        """Yield this worker's share of the batches, every ``num_workers``-th of the epoch.

        Raises:
            ValueError: the shards cannot be read, give no batch, or hold nothing that can be used.
        """
        info = get_worker_info()
        slot, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A loader always asks worker 0 first, so worker 0 must produce ``first_batch``.
        share = (slot + self.first_batch) % num_workers
        batches = unique_batches(self._shuffled(share, num_workers), self.batch_size, self._identity)
        # The list is None once a sample could be used. A stream that begins later has had such a sample before.
        unusable: list[tuple[str, str]] | None = None if self.first_batch else []
        for index in range(share, self.num_batches, num_workers):
            items = next(batches)
            if index < self.first_batch:
                continue
            batch = self._decode(items)
            unusable = None if len(batch) or unusable is None else unusable + batch.skipped
            if unusable and (len(unusable) >= MAX_UNUSABLE or index + num_workers >= self.num_batches):
                raise ValueError(f"not one of {len(unusable)} samples can be used; first: {': '.join(unusable[0])}")
            yield batch

    def _shuffled(self, share: int, num_workers: int) -> Iterator[Item]:
        """Yield the samples of this share of the shards, pass after pass, without end."""
        for data_pass in range(1 << 62):
            rng = random.Random(f"{self.seed}/{self.epoch}/{data_pass}")
            mine = rng.sample(self.shards, len(self.shards))[share::num_workers]
            empty = True
            for sample in shuffle(read_samples(mine), SHUFFLE_BUFFER, rng):
                empty = False
                yield data_pass, sample
            if empty:
                raise ValueError(f"shards hold no samples: {', '.join(mine)}")

    def _identity(self, item: Item) -> Hashable:
        """Return the value that no other sample of a batch may have."""
        _, sample = item
        # A sample that lacks the value equals no other here, and is left out when it is decoded.
        with contextlib.suppress(ValueError):
            if self.unique_by == "caption":
                return caption(sample)
            if self.unique_by is not None:
                return field(sample, self.unique_by)
        return sample["__url__"], sample["__key__"]

    def _decode(self, items: list[Item]) -> Batch:
        """Return the batch of these samples; those that cannot be used are left out and listed in ``skipped``."""
        images, captions, skipped = [], [], []
        for data_pass, sample in items:
            name = sample_name(sample)
            seed = zlib.crc32(f"{self.seed}/{self.epoch}/{data_pass}/{name}".encode("utf-8", "surrogateescape"))
            torch.default_generator.manual_seed(seed)
            try:
                if self.unique_by not in (None, "caption"):
                    field(sample, self.unique_by)
                text = caption(sample, self.keyword_prob, random.Random(seed))
                images.append(self.transform(decode_image(sample)))
                captions.append(text)
            except ValueError as error:
                skipped.append((name, str(error)))
        if not images:
            return Batch(torch.empty(0), torch.empty(0), skipped)
        texts = self.tokenizer(captions)
        return Batch(torch.stack(images), texts if self.reads_padding else trim_padding(texts), skipped)


def shuffle(samples: Iterable[T], buffer_size: int, rng: random.Random) -> Iterator[T]:
    """Yield ``samples`` in random order: whenever ``buffer_size`` of them are held, one of these is drawn.

    The order is that of ``webdataset.shuffle(buffer_size, initial=buffer_size, rng=rng)``.
    """
    buffer: list[T] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) == buffer_size:
            yield _draw(buffer, rng)
    while buffer:
        yield _draw(buffer, rng)


def _draw(buffer: list[T], rng: random.Random) -> T:
    """Remove a random element and return it; the last one takes its place."""
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def unique_batches(
    samples: Iterator[Item], batch_size: int, identity: Callable[[Item], Hashable]
) -> Iterator[list[Item]]:
    """Yield batches in which no identity occurs twice; a sample whose identity is taken waits for a later batch.

    When ``MAX_HELD_BATCHES`` batches' worth of samples wait, the oldest are dropped: their identities are more frequent
    than one per batch.

    Raises:
        ValueError: a batch cannot be filled, because too few identities occur.
    """
    limit = MAX_HELD_BATCHES * batch_size
    held: deque[tuple[Hashable, Item]] = deque()
    while True:
        batch: dict[Hashable, Item] = {}
        waiting, held = held, deque(maxlen=limit)
        refused = 0
        while len(batch) < batch_size:
            if waiting:
                key, item = waiting.popleft()
            else:
                fresh = next(samples, None)
                if fresh is None:
                    return
                key, item = identity(fresh), fresh
                refused = refused + 1 if key in batch else 0
            if key in batch:
                held.append((key, item))
            else:
                batch[key] = item
            if refused > limit:
                raise ValueError(
                    f"cannot fill a batch of {batch_size} with different samples: only {len(batch)} found in a row of "
                    f"{limit}, lower the batch size"
                )
        held.extend(waiting)
        yield list(batch.values())


class _Reporting(IterableDataset[Batch | str]):
    """A stream that yields the message of its ValueError: if a worker raised it, it would be wrapped in a traceback."""

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | str]:
        try:
            yield from self.stream
        except ValueError as error:
            yield str(error)


def pair_loader(stream: PairStream, num_workers: int, *, pin_memory: bool = False) -> Generator[Batch, None, None]:
    """Return the batches of ``stream``, decoded by ``num_workers`` processes; 0 decodes them in this process.

    Closing the generator ends the processes.

    Raises:
        ValueError: there are more workers than shards, so that one would have nothing to read; or an error of the
            stream.
    """
    if num_workers > len(stream.shards):
        raise ValueError(
            f"{len(stream.shards)} shard(s) cannot feed {num_workers} data workers: "
            f"use --workers {len(stream.shards)} or fewer"
        )
    options: dict[str, Any] = {"pin_memory": pin_memory, "worker_init_fn": _start_worker}
    return _raising(DataLoader(_Reporting(stream), batch_size=None, num_workers=num_workers, **options))


def _raising(batches: DataLoader[Batch | str]) -> Generator[Batch, None, None]:
    iterator = iter(batches)
    try:
        for batch in iterator:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch
    finally:
        # Tracebacks keep an iterator alive, and its workers would then wait at the end of the process.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _start_worker(_: int) -> None:
    # A terminal or a job scheduler sends these signals to every process. The trainer decides when to stop, and needs
    # batches until then. A second SIGTERM ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))
    # A trainer that is killed tells its workers nothing. On Linux, the kernel can.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
