"""Read the pictures and texts of any data source by their positions, with their metadata, to embed or copy them."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import IndexCache, Keys, Skipped, Source, decode_image, expand_shards, metadata, open_sources
from ..data.folders import others_in
from ..data.keys import DEFAULT_KEYS, IMAGE_EXTENSIONS, read_separator
from ..data.names import PIPE, is_folder
from ..data.samples import RawSample, captions, sample_name
from ..io.files import sync, write_folder
from ..io.progress import progress
from ..kernels.common import slices
from ..models.images import SampleError

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

SHARD_SIZE = 10_000  # the number of samples in each shard that is written
LOOKED_AT = 64  # by default, texts are embedded if one of this many first samples of the source has a caption
# Metadata columns that clipfast makes for every source, with their Arrow types. A column of the source that has one of
# these names is left out.
OWN = {
    "number": "int64",
    "key": "string",
    "image_path": "string",
    "caption": "string",
    "width": "int64",
    "height": "int64",
}
OF_IMAGES = ("image_path", "width", "height")  # the columns of OWN that exist only if images are embedded


@dataclasses.dataclass
class Sample:
    """A sample to embed or to show, decoded, with its metadata.

    Attributes:
        image: the image in RGB, or None if images are not wanted.
        caption: the first caption, or None.
        row: the metadata: ``number``, the position in the source; ``key``; ``image_path``, which is a path, or a shard
            and its member; ``caption``; ``width`` and ``height`` of the image; and the sample's json or further
            columns.
    """

    image: Image.Image | None
    caption: str | None
    row: dict[str, Any]


@dataclasses.dataclass
class Samples:
    """The samples of a data source, to embed, show or copy them.

    Attributes:
        data: the source, as :func:`clipfast.data.expand_shards` takes it; a folder of images needs no captions.
        images, texts: whether a sample without an image, or without a text, is skipped. Images are decoded only if
            ``images`` is True.
        keys: the names under which a sample has its image and its caption.
        separator: the separator of CSV files, as :class:`clipfast.data.IndexCache` takes it.
        columns: the keys of a sample's JSON, or the columns of a table, that become metadata; None for all.

    Raises:
        ValueError: the source cannot be read.
    """

    data: str
    images: bool = True
    texts: bool = False
    keys: Keys = DEFAULT_KEYS
    separator: str | None = None
    columns: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.sources = open_sources(expand_shards(self.data), index=IndexCache(separator=self.separator))
        self.first = list(itertools.accumulate(map(len, self.sources), initial=0))

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Samples:
        """Open the source from which embeddings were made, as their ``about.json`` describes it.

        Raises:
            ValueError: the description is missing, or the source cannot be read, has changed, or is the output of a
                command. Embeddings may come from somebody else, and opening them must not run a command.
        """
        try:
            given = {name: about[name] for name in ("data", "images", "texts", "separator", "columns")}
            keys = Keys.from_dict(about["keys"])
        except KeyError as error:
            raise ValueError(f"the embeddings do not say what they were made from: there is no {error}") from None
        if not isinstance(given["data"], str) or not all(isinstance(name, str) for name in given["columns"] or ()):
            raise ValueError(f"the embeddings do not say what they were made from, but {given}")
        read_separator(given["separator"])
        command = next((shard for shard in expand_shards(given["data"]) if shard.startswith(PIPE)), None)
        if command is not None:
            raise ValueError(
                f"the embeddings were made from the output of a command, which is not run again: {command}"
            )
        found = cls(**given, keys=keys)
        if found.about()["stamp"] != about.get("stamp"):
            raise ValueError(f"{found.data} has changed since it was embedded: embed it again")
        return found

    def about(self) -> dict[str, Any]:
        """Return the entries of ``about.json`` about the data: the source, a hash of its files, and the options."""
        told = {name: getattr(self, name) for name in ("data", "images", "texts", "separator")}
        columns = None if self.columns is None else list(self.columns)
        keys = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self.keys).items()}
        files = [(shard.name, shard.stamp) for source in self.sources for shard in source.shards]
        stamp = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()
        return {**told, "columns": columns, "keys": keys, "stamp": stamp, "samples": len(self)}

    def __len__(self) -> int:
        """Return the number of samples of the source, usable or not."""
        return self.first[-1]

    def losses(self) -> list[str]:
        """Return a message about each damaged part of the source's shards that has been met while reading so far."""
        return [loss for source in self.sources for shard in source.shards for loss in shard.losses()]

    def others(self) -> list[str]:
        """Return a message about each folder to embed that also holds files which are no images."""
        folders = [shard.name for source in self.sources for shard in source.shards if is_folder(shard.name)]
        return [
            f"in {folder} these files were not taken: {others} (images are {', '.join(IMAGE_EXTENSIONS)})"
            for folder in folders
            if (others := others_in(folder, self.keys))
        ]

    def have_captions(self) -> bool:
        """Return True if one of the first samples of the source has a caption."""
        keys = dataclasses.replace(self.keys, images=())  # without names of images, only captions are read
        for number in range(min(LOOKED_AT, len(self))):
            source, within = self._place(number)
            with contextlib.suppress(SampleError):
                return bool(captions(source.read(within, keys), keys=keys))
        return False

    def read(self, number: int) -> Sample | Skipped:
        """Read and decode the sample at a position of the source; return it, or the reason why it cannot be used."""
        keys = self.keys if self.images else dataclasses.replace(self.keys, images=())
        name = f"number {number!r:.80}"
        try:
            source, within = self._place(number)
            name = source.name(within)
            raw = source.read(within, keys)
            name = sample_name(raw)
            texts = self._captions(raw)
            image = decode_image(raw, keys) if self.images else None
        except SampleError as error:
            return Skipped(name, error.kind, str(error))
        return Sample(image, texts[0] if texts else None, self._row(number, raw, texts, image))

    def files(self, number: int) -> dict[str, bytes]:
        """Return the bytes of the files of an embedded sample by extension, to copy them.

        Raises:
            SampleError: the sample cannot be read.
        """
        source, within = self._place(number)
        found = source.read(within, self.keys)
        return {name: data for name, data in found.items() if not name.startswith("__") and isinstance(data, bytes)}

    def _place(self, number: int) -> tuple[Source, int]:
        """Return the data source that has the embedded sample ``number``, and the position of the sample in it.

        Raises:
            SampleError: there is no such sample. The number may come from somebody else's metadata.
        """
        if not isinstance(number, int) or not 0 <= number < len(self):
            raise SampleError(f"there is no sample {number!r:.80} in {self.data}, which has {len(self)}", "no sample")
        place = bisect.bisect_right(self.first, number) - 1
        return self.sources[place], number - self.first[place]

    def _captions(self, raw: RawSample) -> list[str]:
        """Return the captions of a sample to embed; if they cannot be read, [] or, if texts are needed, an error."""
        try:
            return captions(raw, keys=self.keys)
        except SampleError:
            if self.texts:
                raise
            return []

    def _row(self, number: int, raw: RawSample, texts: Sequence[str], image: Image.Image | None) -> dict[str, Any]:
        """Return the metadata of a sample to embed, by column."""
        row: dict[str, Any] = {"number": number, "key": raw["__key__"], "caption": texts[0] if texts else None}
        if image is not None:
            member = next(key for key in self.keys.images if key in raw)
            path = raw.get("__path__") or f"{raw['__url__']}/{raw['__key__']}.{member}"
            row |= {"image_path": path, "width": image.width, "height": image.height}
        with contextlib.suppress(SampleError):  # a sample whose JSON cannot be read is used without it
            found = metadata(raw)
            wanted = found if self.columns is None else self.columns
            row |= {name: found.get(name) for name in wanted if name not in OWN}
        return row


def table_of(rows: Sequence[Mapping[str, Any]], with_images: bool = True) -> pyarrow.Table:
    """Return the metadata of samples as a table: first the columns of all sources, then others in order of occurrence.

    A column has integers, floats, or bools; any other column becomes text, with lists and objects as JSON.
    """
    import pyarrow

    own = {name: kind for name, kind in OWN.items() if with_images or name not in OF_IMAGES}
    others = dict.fromkeys(name for row in rows for name in row if name not in own)
    columns = {name: pyarrow.array([_plain(row[name]) for row in rows], kind) for name, kind in own.items()}
    return pyarrow.table(columns | {name: _column([row.get(name) for row in rows]) for name in others})


def _column(values: Sequence[Any]) -> pyarrow.Array:
    """Return a metadata column of embeddings as an Arrow array, of integers, floats or bools if possible, else text."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    with contextlib.suppress(OverflowError, pyarrow.ArrowException):  # raised by integers of more than 64 bits
        if kinds == {int, float}:
            return pyarrow.array([x if x is None else float(x) for x in values], "float64")
        if len(kinds) <= 1 and kinds <= {bool, int, float}:
            return pyarrow.array(values)
    texts = (json.dumps(x, ensure_ascii=False) if not isinstance(x, str | None) else x for x in values)
    return pyarrow.array([_plain(text) for text in texts], "string")


def _plain(value: Any) -> Any:
    """Return a metadata value of embeddings whose text Arrow accepts: bytes of file names may not be UTF-8."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def write_shards(folder: Path, samples: Samples, numbers: Sequence[int]) -> list[str]:
    """Copy samples of a source, without decoding them, to tar shards 00000.tar, 00001.tar, ... in a new folder.

    The key of a sample in the new shards is its number in the source, since keys of several shards may be equal. If the
    process is killed, the folder is complete or absent.

    Returns:
        A message about each sample that can no longer be read.

    Raises:
        FileExistsError: ``folder`` exists.
        DiskFullError: there is no space.
    """
    lost: list[str] = []

    def write(path: Path) -> None:
        """Write the tar shards into the folder ``path``, which is renamed when they are complete."""
        with progress(len(numbers), "copying", "samples") as advance:
            for shard, rows in enumerate(slices(len(numbers), SHARD_SIZE)):
                with tarfile.open(path / f"{shard:05}.tar", "w") as tar:
                    for number in numbers[rows]:
                        try:
                            _add(tar, number, samples.files(number))
                        except SampleError as error:
                            lost.append(f"sample {number}: {error}")
                        advance(1)
                sync(path / f"{shard:05}.tar")

    write_folder(folder, write)
    return lost


def _add(tar: tarfile.TarFile, number: int, files: dict[str, bytes]) -> None:
    """Add the files of a copied sample to a tar shard, named by its number and their extensions."""
    for extension, data in files.items():
        info = tarfile.TarInfo(f"{number:09}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
