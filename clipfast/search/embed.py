"""``clipfast embed``: compute the features of a source's pictures and texts, part by part, into a folder.

The part and the batch of a sample follow from its position alone, and on a CPU each batch is computed by one thread,
with several batches at a time. Therefore the content of the folder does not depend on the number of processes, threads
and data workers, or on interruptions.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from ..data import Skipped, made_by_workers
from ..evaluate.encoder import Encoder
from ..evaluate.zero_shot import encode_texts
from ..io.files import replace_text
from ..models.packed_images import PackedImages, batch_images
from ..runs.lock import LOCK_NAME
from .layout import (
    ABOUT,
    IMAGES,
    METADATA,
    TEXTS,
    Part,
    part_path,
    read_about,
    read_part,
    read_parts,
    write_about,
    write_part,
)
from .source_samples import Samples, table_of

log = logging.getLogger("clipfast")
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float16}
SKIPPED = "skipped"  # the key in the schema of a part's Parquet file under which skipped samples are listed
SKIPPED_FILE = "skipped.tsv"
GPU_BATCH = 256  # the default number of samples that are encoded at once on a GPU
# On a CPU, the batch of each thread has about CPU_PIXELS pixels, within these bounds: smaller images make larger
# batches.
CPU_BATCH, SMALL_BATCH, CPU_PIXELS = 32, 128, 1 << 17


@dataclasses.dataclass
class _Batch:
    """A batch of samples that ``clipfast embed`` has read and, once ``features`` are set, encoded.

    ``rows`` has the metadata of each usable sample, and ``skipped`` the position of each unusable one with the reason.
    """

    pixels: Tensor | PackedImages | None = None
    texts: list[str] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[int, Skipped]] = dataclasses.field(default_factory=list)
    features: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # the keys are IMAGES and TEXTS


class _Batches(Dataset[_Batch]):
    """A dataset of batches to embed: indexing it by positions reads, decodes and transforms the samples there."""

    def __init__(self, samples: Samples, encoder: Encoder) -> None:
        self.samples, self.transform = samples, encoder.transform
        self.for_gpu = torch.device(encoder.device).type != "cpu"

    def __getitem__(self, places: Sequence[int]) -> _Batch:
        batch, pixels = _Batch(), list[Tensor]()
        for place in places:
            sample = self.samples.read(place)
            if isinstance(sample, Skipped):
                batch.skipped.append((place, sample))
                continue
            if sample.image is not None:
                pixels.append(self.transform(sample.image))
            batch.texts.append(sample.caption or "")
            batch.rows.append(sample.row)
        if pixels:
            batch.pixels = batch_images(pixels, self.transform, for_gpu=self.for_gpu)
        return batch


@dataclasses.dataclass
class Work:
    """The work of ``clipfast embed``: the source, the model, the options, and the folder of the embeddings.

    Attributes:
        encoder: the model.
        samples: the source.
        folder: the folder into which the parts are written.
        precision: the precision in which features are stored, "fp16" or "fp32"; with "fp8", the model computes in 8
            bits, and features are stored in fp16.
        part_size: the number of samples of a part, usable or not.
        batch_size: the number of samples that are encoded at once; None for a number that suits the device.
    """

    encoder: Encoder
    samples: Samples
    folder: Path
    precision: str = "fp16"
    part_size: int = 10_000
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if the source has no samples to embed."""
        if not len(self.samples):
            raise ValueError(f"{self.samples.data} has no samples")

    @property
    def parts(self) -> list[range]:
        """For each part of the embeddings, the positions of its samples in the source."""
        return _cut(range(len(self.samples)), self.part_size)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """The content of ``about.json``: the model, source and options on which the embeddings depend."""
        made_by = {**self.encoder.about(), "normalized": True, "precision": self.precision}
        sizes = {"part_size": self.part_size, "parts": len(self.parts)}
        return {"version": 1, **made_by, **self.samples.about(), **sizes}

    def begin(self) -> None:
        """Write ``about.json`` into the folder of embeddings, or compare it with the existing one.

        Raises:
            ValueError: the folder holds other files, or embeddings of another model, other data or other options.
        """
        there = read_about(self.folder)
        if not there:
            refuse_others(self.folder)
            write_about(self.folder, self.about)
            return
        differing = [key for key, value in self.about.items() if there.get(key) != value]
        if differing:
            changes = "; ".join(f"{key} {there.get(key)!r} there, {self.about[key]!r} now" for key in differing)
            raise ValueError(
                f"{self.folder} holds embeddings of another model, other data or other options, which are not mixed "
                f"({changes}): give a new folder to --output, or remove this one"
            )

    def missing(self) -> list[int]:
        """Return the numbers of the parts of the embeddings that are missing in the folder or cannot be read."""
        return [number for number in range(len(self.parts)) if not self.holds(number)]

    def holds(self, number: int) -> bool:
        """Return True if a part of the embeddings is in the folder and can be read."""
        files = {kind: part_path(self.folder, kind, number, len(self.parts)) for kind in (*self.kinds, METADATA)}
        if not files[METADATA].exists():
            return False
        try:
            read_part(files.get(IMAGES), files.get(TEXTS), files[METADATA])
        except (ValueError, OSError) as error:
            log.warning(f"part {number} is made again: {error}")
            return False
        return True

    @property
    def kinds(self) -> list[str]:
        """The names of the folders of features to write: "img_emb", "text_emb", or both."""
        return [kind for kind, wanted in ((IMAGES, self.samples.images), (TEXTS, self.samples.texts)) if wanted]

    def make(self, numbers: Sequence[int], workers: int = 0, advance: Callable[[int], object] = lambda _: None) -> None:
        """Embed the samples of some parts of the source, and write the parts into the folder.

        Args:
            numbers: the numbers of the parts.
            workers: the number of data worker processes; with 0, this process reads and decodes.
            advance: is called after each batch with the number of its samples.

        Raises:
            ValueError: a data worker died.
            DiskFullError: there is no space.
        """
        ranges = [_cut(self.parts[number], self.samples_at_once) for number in numbers]
        every = list(itertools.chain(*ranges))
        batches = _Batches(self.samples, self.encoder)
        with (
            made_by_workers(batches, every, min(workers, len(every))) as made,
            contextlib.closing(self._encoded(made)) as encoded,
        ):
            for number, own in zip(numbers, ranges, strict=True):
                done: list[_Batch] = []
                for places in own:
                    done.append(next(encoded))
                    advance(len(places))
                self._write(number, done)

    @functools.cached_property
    def samples_at_once(self) -> int:
        """The batch size of ``clipfast embed``: the given one, or one that suits the device and the image size."""
        if self.batch_size is not None:
            return self.batch_size
        if torch.device(self.encoder.device).type != "cpu":
            return GPU_BATCH
        if not self.samples.images:
            return CPU_BATCH
        height, width = self.encoder.blank.shape[-2:]
        return max(CPU_BATCH, min(SMALL_BATCH, CPU_PIXELS // (height * width)))

    @property
    def batch_bytes(self) -> int:
        """The bytes of shared memory that the images of a batch take while a data worker hands them over."""
        return self.samples_at_once * self.encoder.blank.nbytes if self.samples.images else 0

    def _encoded(self, batches: Iterable[_Batch]) -> Generator[_Batch]:
        """Encode batches of samples by the model, on a CPU several at a time, and yield them in order."""
        if torch.device(self.encoder.device).type != "cpu":
            yield from map(self._encode, batches)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                yield from _in_order(pool, self._encode, map(_unshared, batches), threads + 1)
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def _encode(self, batch: _Batch) -> _Batch:
        """Compute the features of a batch of samples by the model, and return the batch with them."""
        if batch.pixels is not None:
            batch.features[IMAGES] = self.encoder.images(batch.pixels)
            batch.pixels = None
        if self.samples.texts and batch.rows:
            encoder = self.encoder
            batch.features[TEXTS] = encode_texts(encoder.model, encoder.tokenizer, batch.texts, encoder.device)
        batch.features = {kind: x.to("cpu", PRECISIONS[self.precision]) for kind, x in batch.features.items()}
        return batch

    def _write(self, number: int, done: Sequence[_Batch]) -> None:
        """Write the features and metadata of a part of the embeddings, from its encoded batches."""
        rows = [row for batch in done for row in batch.rows]
        skipped = [(place, *reason) for batch in done for place, reason in batch.skipped]
        table = table_of(rows, self.samples.images).replace_schema_metadata({SKIPPED: json.dumps(skipped)})
        features: dict[str, Tensor] = {}
        for kind in self.kinds:
            found = [batch.features[kind] for batch in done if kind in batch.features]
            found = found or [torch.empty(0, self.width, dtype=PRECISIONS[self.precision])]
            features[kind] = torch.cat(found)
        write_part(self.folder, Part(features.get(IMAGES), features.get(TEXTS), table), number, len(self.parts))

    @property
    def width(self) -> int:
        """The width D of the model's features."""
        return int(self.encoder.texts([""]).shape[1])

    def finish(self) -> tuple[int, list[tuple[int, Skipped]]]:
        """Check all parts and write the list of skipped samples; return the number of embedded items, and that list.

        Raises:
            ValueError: a part is missing or damaged, or no sample can be used.
        """
        from pyarrow import parquet

        parts = read_parts(self.folder, len(self.parts))
        skipped: list[tuple[int, Skipped]] = []
        for number in range(len(parts)):
            noted = parquet.read_schema(part_path(self.folder, METADATA, number, len(parts))).metadata or {}
            skipped += [(place, Skipped(*reason)) for place, *reason in json.loads(noted.get(SKIPPED.encode(), b"[]"))]
        lines: list[Sequence[Any]] = [["number", "name", "kind", "reason"]]
        lines += [[place, *reason] for place, reason in skipped]
        text = "".join("\t".join(" ".join(str(cell).split()) for cell in line) + "\n" for line in lines)
        replace_text(self.folder / SKIPPED_FILE, text.encode("utf-8", "replace").decode())
        rows = sum(map(len, parts))
        if not rows:
            raise ValueError(
                f"not one of the {len(skipped)} samples of {self.samples.data} can be used; first: {skipped[0][1]}"
            )
        return rows, skipped


def _unshared(batch: _Batch) -> _Batch:
    """Copy a batch's images out of shared memory, which is scarce, since several batches wait here to be encoded."""
    batch.pixels = tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_shared() else x, batch.pixels)
    return batch


def refuse_others(folder: Path) -> None:
    """Raise ValueError if a folder for embeddings holds something other than embeddings."""
    if folder.is_dir() and not read_about(folder):
        left = {f".{name}.tmp" for name in (LOCK_NAME, ABOUT)}  # temporary files of a process that was killed
        others = {path.name for path in folder.iterdir()} - {LOCK_NAME, *left}
        if others:
            raise ValueError(f"{folder} holds something else ({min(others)}): give a new folder to --output")


def _cut(places: range, size: int) -> list[range]:
    """Cut a range of positions of samples to embed into ranges of ``size``, the last of which may be shorter."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], values: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """Call ``function``, which encodes a batch, for each value in a pool of threads; yield the results in order.

    At most ``ahead`` calls have been submitted whose results have not been asked for.
    """
    pending: collections.deque[Future[Any]] = collections.deque()
    try:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
