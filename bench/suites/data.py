"""The data pipeline and each of its stages, from shards of photographs to batches on the device, against OpenCLIP's.

A stage takes the output of the stage before it, which lies in memory. Data workers are processes of one thread each, so
the CPU time of one thread is measured; only the copy to the device is timed by the wall clock.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from clipfast import Tokenizer
from clipfast.data import Batch, CroppedImages, IndexCache, ShardSource, open_shards
from clipfast.data.loader import stacked
from clipfast.models.tokenizer import CONTEXT_LENGTH, trim_padding
from clipfast.train.step import Upload

from ..case import OURS, AnyFunction, Candidate, Case, MissingError, Sizes
from ..machine import cpu_seconds, one_thread
from . import pairs, peers
from .pipelines import BATCH, OpenClipBatches, OurBatches, denormalized, open_clip_data, padded

if TYPE_CHECKING:  # the functions below import Pillow where they use it, so that other suites run without Pillow
    from PIL import Image

# Factors on the usual limit of the errors. A coarsely decoded photograph differs by 3% (more than 35 dB) from one that
# is decoded whole; their means hardly differ.
PIXELS, MEANS = 20.0, 5.0
THEIRS = "OpenCLIP"
Make = Callable[[], AnyFunction]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The implementations of a stage, ours first, a note on ours, and the factor by which results may differ."""

    make: Mapping[str, Make]
    note: str = ""
    slack: float = 1.0
    unit: str = "images"


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The pairs of a data benchmark: photographs of one size in pixels with captions, and the crops of the images."""

    count: int
    width: int
    height: int
    size: int

    @property
    def files(self) -> list[bytes]:
        """Return the images of the data benchmark as JPEG files."""
        return pairs.jpegs(self.count, self.width, self.height)

    @property
    def shards(self) -> list[str]:
        """Return the names of the tar files that the data benchmark reads."""
        return pairs.shards(self.count, self.width, self.height)

    @property
    def crops(self) -> CroppedImages:
        """Return our crops of the data benchmark's images."""
        return CroppedImages(self.size)

    def source(self) -> ShardSource:
        """Return the data benchmark's shards, indexed."""
        return open_shards(self.shards, index=IndexCache(Path(self.shards[0]).parent / "index"))

    def open_clip_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return OpenCLIP's transform for training, a crop, to compare it with ours in the data benchmark."""
        open_clip: Any = peers.need("open_clip", "open_clip_torch")
        return open_clip.image_transform(self.size, is_train=True)

    def of_each(self, function: Callable[[bytes], Any]) -> list[Any]:
        """Return the result of ``function`` for each file of the data benchmark, with its index as the random seed."""
        made = []
        for number, file in enumerate(self.files):
            torch.manual_seed(number)
            made.append(function(file))
        return made


class _Each:
    """A candidate of a stage that processes samples one by one, in a given order.

    Args:
        work: a function that processes the sample with a given number.
        seen: a function that extracts from a result the tensor on which all candidates must agree.
    """

    def __init__(self, work: Callable[[int], Any], seen: Callable[[Any], Tensor]) -> None:
        self.work, self.seen = work, seen

    def __call__(self, order: Tensor) -> Tensor:
        for number in order.tolist():
            self.work(number)
        return order

    def observe(self, order: Tensor) -> dict[str, Tensor]:
        """Return ``seen`` of each result of a stage in the data benchmark; each sample has a random seed of its own."""
        found = []
        for number in order.tolist():
            torch.manual_seed(number)
            found.append(self.seen(self.work(number)))
        return {"value": torch.stack(found)}


class _Joined:
    """A candidate of a stage that makes one tensor from all samples, in a given order."""

    def __init__(
        self, samples: Sequence[Any], join: Callable[[list[Any]], Tensor], seen: Callable[..., Tensor]
    ) -> None:
        self.samples, self.join, self.seen = samples, join, seen

    def __call__(self, order: Tensor) -> Tensor:
        return self.join([self.samples[number] for number in order.tolist()])

    def observe(self, order: Tensor) -> dict[str, Tensor]:
        """Return the tensor on which all candidates of a stage in the data benchmark must agree."""
        return {"value": self.seen(self(order))}


class _OpenClipRead:
    """OpenCLIP's reading of shards, which always goes from the beginning to the end."""

    def __init__(self, shards: list[str]) -> None:
        self.shards, self.data = shards, open_clip_data()

    def __call__(self, order: Tensor) -> Tensor:
        for _ in self._samples():
            pass
        return order

    def observe(self, order: Tensor) -> dict[str, Tensor]:
        """Return the lengths of the files of each sample, by which the data benchmark compares readers."""
        found = {int(sample["__key__"]): _lengths(sample) for sample in self._samples()}
        return {"value": torch.stack([found[number] for number in order.tolist()])}

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of all shards as OpenCLIP reads them in the data benchmark."""
        return self.data.tarfile_to_samples_nothrow({"url": shard} for shard in self.shards)


def _lengths(sample: Mapping[str, Any]) -> Tensor:
    """Return the lengths of a sample's files, by which the data benchmark compares readers."""
    return torch.tensor([len(sample["jpg"]), len(sample["txt"])], dtype=torch.float64)


def _pil(file: bytes) -> Image.Image:
    """Decode an image file with Pillow, OpenCLIP's way in the data benchmark."""
    from PIL import Image

    return Image.open(io.BytesIO(file)).convert("RGB")


def _thumbnail(image: Image.Image) -> Tensor:
    """Shrink an image, so that the data benchmark can compare different decoders."""
    from PIL import Image

    return torch.from_numpy(np.array(image.resize((8, 8), Image.Resampling.BOX))).double()


def _read(photographs: Photographs, _: torch.device) -> Stage:
    """Return the data benchmark's stage that reads pairs from shards."""
    make: dict[str, Make] = {
        OURS: lambda: _Each(photographs.source().read, _lengths),
        THEIRS: lambda: _OpenClipRead(photographs.shards),
    }
    return Stage(make, note="in any order", unit="pairs")


def _decode(photographs: Photographs, _: torch.device) -> Stage:
    """Return the data benchmark's stage that decodes JPEG files."""
    files = photographs.files
    make: dict[str, Make] = {
        OURS: lambda: _Each(lambda n: photographs.crops.decoded(files[n]), lambda found: _thumbnail(found[0])),
        THEIRS: lambda: _Each(lambda n: _pil(files[n]), _thumbnail),
    }
    return Stage(make, note="as finely as the crop needs", slack=MEANS)


def _resize(photographs: Photographs, _: torch.device) -> Stage:
    """Return the data benchmark's stage that crops and resizes images."""

    def resized(decode: Callable[[bytes], Any], resize: Callable[[Any], Tensor]) -> AnyFunction:
        """Make a function for the data benchmark's stage "resize", after an image was decoded."""
        decoded = photographs.of_each(decode)
        return _Each(lambda number: resize(decoded[number]), denormalized)

    crops = photographs.crops
    make: dict[str, Make] = {
        OURS: lambda: resized(crops.decoded, lambda found: crops.resized(*found)),
        THEIRS: lambda: resized(_pil, photographs.open_clip_transform()),
    }
    return Stage(make, note="bytes, of a coarser image", slack=PIXELS)


def _collate(photographs: Photographs, _: torch.device) -> Stage:
    """Return the data benchmark's stage that joins crops to a batch."""

    def ours() -> AnyFunction:
        """Make our function for the data benchmark's stage "collate"."""
        images = photographs.of_each(photographs.crops)
        return _Joined(images, lambda batch: stacked(batch, len(batch)), denormalized)

    def theirs() -> AnyFunction:
        """Make OpenCLIP's function for the data benchmark's stage "collate"."""
        transform = photographs.open_clip_transform()
        return _Joined(photographs.of_each(lambda file: transform(_pil(file))), default_collate, denormalized)

    return Stage({OURS: ours, THEIRS: theirs}, note="bytes", slack=PIXELS)


def _tokenize(photographs: Photographs, _: torch.device) -> Stage:
    """Return the data benchmark's stage that tokenizes captions."""
    texts = pairs.captions(photographs.count)

    def ours() -> AnyFunction:
        """Make our function for the data benchmark's stage "tokenize"."""
        tokenizer = Tokenizer()
        return _Joined(texts, lambda batch: trim_padding(tokenizer(batch)), padded)

    def theirs() -> AnyFunction:
        """Make OpenCLIP's function for the data benchmark's stage "tokenize"."""
        tokenizer = peers.need("open_clip", "open_clip_torch").SimpleTokenizer()
        return _Joined(texts, lambda batch: default_collate([tokenizer(text)[0] for text in batch]), padded)

    return Stage({OURS: ours, THEIRS: theirs}, note="a batch at a time", unit="captions")


def _transfer(photographs: Photographs, device: torch.device) -> Stage:
    """Return the data benchmark's stage that copies batches to the device."""

    def make(pixels: torch.dtype, *, pinned: bool) -> AnyFunction:
        """Make the data benchmark's function that copies batches of this pixel dtype to the device."""
        if device.type != "cuda":
            raise MissingError("nothing is copied to a CPU")
        shape = (photographs.count, 3, photographs.size, photographs.size)
        texts = torch.zeros(photographs.count, CONTEXT_LENGTH, dtype=torch.long)
        batch, upload = Batch(torch.zeros(shape, dtype=pixels), texts, []), Upload(device)
        batch = batch.pin_memory() if pinned else batch

        def copy(order: Tensor) -> Tensor:
            """Copy the data benchmark's batch to the device, and return its first pixels as floats."""
            images, _ = upload(batch)
            assert isinstance(images, Tensor)
            torch.cuda.synchronize(device)
            return images.flatten()[: len(order)].float()

        return copy

    made: dict[str, Make] = {
        OURS: functools.partial(make, torch.uint8, pinned=True),
        THEIRS: functools.partial(make, torch.float32, pinned=False),
    }
    return Stage(made, note="bytes, from pinned memory", unit="pairs")


def _pipeline(photographs: Photographs, _: torch.device) -> Stage:
    """Return the whole data pipeline as a stage of the data benchmark."""

    def ours(workers: int) -> AnyFunction:
        """Make our function for the data benchmark's stage "pipeline"."""
        return OurBatches(photographs.source(), photographs.crops, workers)

    def theirs(workers: int) -> AnyFunction:
        """Make OpenCLIP's function for the data benchmark's stage "pipeline"."""
        return OpenClipBatches(photographs.shards, photographs.count, photographs.open_clip_transform(), workers)

    made: dict[str, Make] = {
        OURS: lambda: ours(0), THEIRS: lambda: theirs(0),
        f"{OURS}, 1 worker": lambda: ours(1), f"{THEIRS}, 1 worker": lambda: theirs(1),
    }  # fmt: skip
    return Stage(made, note="with all stages but the copy to the device", slack=MEANS, unit="pairs")


STAGES: dict[str, Callable[[Photographs, torch.device], Stage]] = {
    "read": _read, "decode": _decode, "resize": _resize, "collate": _collate, "tokenize": _tokenize,
    "transfer": _transfer, "pipeline": _pipeline,
}  # fmt: skip
FIELDS: Sizes = {"stage": "pipeline", "images": 1024, "width": 512, "height": 512, "size": 224}
SMALLEST: Sizes = {"stage": "pipeline", "images": 4, "width": 64, "height": 48, "size": 32}
# Photographs of a size that is common on the web, resized to the size that most models take.
_DEFAULT: list[Sizes] = [{**FIELDS, "images": 1024 if stage == "pipeline" else 256, "stage": stage} for stage in STAGES]
SHAPES = {"cpu": _DEFAULT, "cuda": _DEFAULT}


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the benchmark case of one stage of the data pipeline, or of the whole pipeline."""
    name, count = shape["stage"], shape["images"]
    if name not in STAGES:
        raise ValueError(f"data: stage must be one of {', '.join(STAGES)}, got {name!r}")
    if name == "pipeline" and count % min(count, BATCH):
        raise ValueError(f"data: images must be a multiple of the batch of {BATCH}, got {count}")
    stage = STAGES[name](Photographs(count, shape["width"], shape["height"], shape["size"]), device)
    candidates = tuple(
        Candidate(who, make, note=stage.note if who == OURS else "", context=one_thread)
        for who, make in stage.make.items()
    )
    return Case(
        suite="data", op=f"data.{name}", shape=shape, dtype=dtype, device=device,
        inputs=lambda: {"order": torch.randperm(count)},
        candidates=candidates,
        reference=candidates[0],
        items=(count, stage.unit),
        slack={"value": stage.slack},
        graph=False,
        clock=time.perf_counter if name == "transfer" else cpu_seconds,
    )  # fmt: skip
