"""Image-text pairs from WebDataset shards, as batches ready for a model, in an order that is a function of the seed
alone.

A sample is decoded and augmented from a random state that its key, epoch and pass determine, and order is decided
before anything is decoded. So a run that was interrupted can skip the batches it has seen without decoding them, and
goes on as if nothing had happened.
"""

import dataclasses
import json
import random
import signal
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .images import ImageError, open_image
from .tokenizer import Tokenizer

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
BUNDLED_PREFIX = "bundled:"
SHUFFLE_BUFFER = 5000
# Samples that wait for a batch without their like, in batches: beyond it, the shards have too few different ones.
MAX_HELD_BATCHES = 32

RawSample = dict[str, Any]


@dataclasses.dataclass
class Batch:
    """Images and texts that belong together, and the samples that had to be left out."""

    images: Tensor  # [B, 3, H, W]
    texts: Tensor  # [B, L]
    skipped: list[tuple[str, str]]  # (key, reason)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> "Batch":
        """Called by the data loader where it copies to a GPU."""
        return Batch(self.images.pin_memory(), self.texts.pin_memory(), self.skipped)


def expand_shards(pattern: str | Iterable[str]) -> list[str]:
    """Shards named by ``pattern``: braces (``{000..099}``), ``::`` between patterns, ``bundled:emoji/noto`` for what
    ships inside.

    Raises:
        ValueError: a local file that is not there.
    """
    from webdataset.shardlists import expand_urls

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    shards = [_bundled(shard) for one in patterns for shard in expand_urls(one)]
    missing = [shard for shard in shards if ":" not in shard and not Path(shard).is_file()]
    if missing or not shards:
        raise ValueError(
            f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)"
            if missing
            else "no shards given"
        )
    return shards


def _bundled(shard: str) -> str:
    if not shard.startswith(BUNDLED_PREFIX):
        return shard
    name = shard.removeprefix(BUNDLED_PREFIX)
    folder = files("clipfast").joinpath("assets")
    known = sorted(
        f"{kind.name}/{path.name.removesuffix('.tar.gz')}"
        for kind in folder.iterdir()
        if kind.is_dir()
        for path in kind.iterdir()
    )
    if name not in known:
        raise ValueError(f"no bundled shard {name!r}; there are: {', '.join(known)}")
    return str(folder.joinpath(f"{name}.tar.gz"))


def read_samples(shards: Iterable[str]) -> Iterator[RawSample]:
    """Samples of tar files in order, undecoded: ``__key__``, ``__url__`` and bytes by extension. Nothing is unpickled.

    Raises:
        ValueError: a shard that is not a readable tar file.
    """
    from webdataset.tariterators import tarfile_samples

    for shard in shards:
        try:
            yield from tarfile_samples([{"url": shard}])
        except Exception as error:
            raise ValueError(f"shard {shard} cannot be read: {error}") from error


def count_samples(shards: Iterable[str]) -> int:
    """Number of samples, by reading every shard once."""
    return sum(1 for _ in read_samples(shards))


def decode_image(sample: RawSample) -> Image.Image:
    """The sample's image.

    Raises:
        ImageError: none, or one that cannot be decoded.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return open_image(sample[extension])
    raise ImageError(
        f"sample has no image ({', '.join(IMAGE_EXTENSIONS)}), "
        f"only {sorted(key for key in sample if not key.startswith('__'))}"
    )


def metadata(sample: RawSample) -> dict[str, Any]:
    """The sample's ``json``, empty where it has none.

    Raises:
        ValueError: not valid JSON, or not an object.
    """
    parsed = json.loads(sample.get("json", b"{}"))
    if not isinstance(parsed, dict):
        raise ValueError(f"json of sample {sample['__key__']} is not an object")
    return parsed


def caption(sample: RawSample, keyword_prob: float = 0.0, rng: random.Random | None = None) -> str:
    """The sample's ``txt``; with probability ``keyword_prob`` some of the ``keywords`` of its ``json`` before, behind,
    or instead of it.

    Raises:
        ValueError: no caption, or one that is not UTF-8.
    """
    if "txt" not in sample:
        raise ValueError(f"sample {sample['__key__']} has no txt")
    text = sample["txt"].decode("utf-8").strip()
    if rng is None or keyword_prob == 0 or rng.random() >= keyword_prob:
        return text
    keywords = metadata(sample).get("keywords") or []
    if not keywords:
        return text
    chosen = ", ".join(rng.sample(keywords, min(len(keywords), rng.randint(1, 3))))
    return rng.choice((f"{text}, {chosen}", f"{chosen}, {text}", chosen))


@dataclasses.dataclass
class PairStream(IterableDataset[Batch]):
    """One epoch of batches from shards, shared out among the workers of a data loader.

    Attributes:
        shards: tar files, as :func:`expand_shards` gives them.
        transform: from PIL image to tensor; its randomness comes from torch's generator.
        tokenizer: from captions to ids.
        batch_size: pairs per batch.
        num_batches: batches in the epoch; the shards are read again as often as that takes.
        epoch: number of the epoch; with ``seed`` it determines everything.
        first_batch: batches to leave out at the start, without decoding them.
        unique_by: "caption", or a key of the samples' json: no two samples of a batch share its value (a second
            drawing of one concept would be a false negative).
        keyword_prob: see :func:`caption`.
    """

    shards: list[str]
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    batch_size: int
    num_batches: int
    seed: int = 0
    epoch: int = 0
    first_batch: int = 0
    unique_by: str | None = None
    keyword_prob: float = 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this worker: every ``num_workers``-th of the epoch."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        batches = unique_batches(self._shuffled(worker, num_workers), self.batch_size, self._identity)
        for index in range(worker, self.num_batches, num_workers):
            raw = next(batches)
            if index >= self.first_batch:
                yield self._decode(raw)

    def _shuffled(self, worker: int, num_workers: int) -> Iterator[tuple[int, RawSample]]:
        """(pass, sample), without end."""
        from webdataset.filters import _shuffle

        for data_pass in range(1 << 62):
            rng = random.Random(f"{self.seed}/{self.epoch}/{data_pass}")
            mine = rng.sample(self.shards, len(self.shards))[worker::num_workers]
            samples = _shuffle(read_samples(mine), SHUFFLE_BUFFER, SHUFFLE_BUFFER, rng)
            empty = True
            for sample in samples:
                empty = False
                yield data_pass, sample
            if empty:
                raise ValueError(f"the shards of data worker {worker} hold no samples: {mine}")

    def _identity(self, item: tuple[int, RawSample]) -> Hashable:
        _, sample = item
        if self.unique_by is None:
            return sample["__url__"], sample["__key__"]
        if self.unique_by == "caption":
            return sample.get("txt", b"").strip()
        fields = metadata(sample)
        if self.unique_by not in fields:
            raise ValueError(
                f"sample {sample['__key__']} has no {self.unique_by!r} in its json; it has {sorted(fields)}"
            )
        return str(fields[self.unique_by])

    def _decode(self, items: list[tuple[int, RawSample]]) -> Batch:
        images, captions, skipped = [], [], []
        for data_pass, sample in items:
            name = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            seed = zlib.crc32(f"{self.seed}/{self.epoch}/{data_pass}/{name}".encode())
            torch.default_generator.manual_seed(seed)
            try:
                text = caption(sample, self.keyword_prob, random.Random(seed))
                images.append(self.transform(decode_image(sample)))
                captions.append(text)
            except ValueError as error:
                skipped.append((name, str(error)))
        if not images:
            raise ValueError(f"not one sample of a batch could be used; first: {skipped[0]}")
        return Batch(torch.stack(images), trim_padding(self.tokenizer(captions)), skipped)


def unique_batches(
    samples: Iterator[tuple[int, RawSample]], batch_size: int, identity: Callable[[tuple[int, RawSample]], Hashable]
) -> Iterator[list[tuple[int, RawSample]]]:
    """Group samples into batches in which no identity occurs twice; one that would is held back for the next batch.

    Raises:
        ValueError: a batch cannot be filled, because too few identities occur.
    """
    held: deque[tuple[int, RawSample]] = deque()
    while True:
        batch: dict[Hashable, tuple[int, RawSample]] = {}
        waiting, held = held, deque()
        while len(batch) < batch_size:
            item = waiting.popleft() if waiting else next(samples, None)
            if item is None:
                return
            key = identity(item)
            if key in batch:
                held.append(item)
            else:
                batch[key] = item
            if len(held) > MAX_HELD_BATCHES * batch_size:
                raise ValueError(
                    f"cannot fill a batch of {batch_size} with different samples: "
                    f"only {len(batch)} found, lower the batch size"
                )
        held.extend(waiting)
        yield list(batch.values())


def trim_padding(texts: Tensor, multiple: int = 4) -> Tensor:
    """Cut the columns that are padding in every row, up to a multiple: [B, L] -> [B, L'].

    A causal text tower gives the same features for them.
    """
    longest = int(texts.argmax(-1).max()) + 1
    return texts[:, : min(texts.shape[1], -(-longest // multiple) * multiple)].contiguous()


def pair_loader(stream: PairStream, num_workers: int, *, pin_memory: bool = False) -> DataLoader[Batch]:
    """Loader of the batches of ``stream``, decoded by ``num_workers`` processes (0: by this one).

    Raises:
        ValueError: more workers than shards; a worker would have nothing to read.
    """
    if num_workers > len(stream.shards):
        raise ValueError(
            f"{len(stream.shards)} shard(s) cannot feed {num_workers} data workers: "
            f"use --workers {len(stream.shards)} or fewer"
        )
    return DataLoader(
        stream, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=_ignore_interrupts
    )


def _ignore_interrupts(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the trainer decides when to stop, and needs its batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
