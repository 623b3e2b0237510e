"""The folder of embeddings, in the layout of clip-retrieval: numbered parts of features and metadata.

Part 3 consists of ``img_emb/img_emb_0003.npy``, ``text_emb/text_emb_0003.npy`` and
``metadata/metadata_0003.parquet``. Either ``img_emb`` or ``text_emb`` may be missing altogether. ``about.json``, which
clip-retrieval does not need, describes the model and source of the features, and has the number of parts.

The metadata of a part are written last: a part with metadata is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..io.files import open_regular, read_json, replace_file, replace_text

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

ABOUT = "about.json"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
SUFFIXES = {IMAGES: ".npy", TEXTS: ".npy", METADATA: ".parquet"}
DIGITS = 4  # part numbers in file names have at least this many digits
MAX_FOOTER = 1 << 26  # a Parquet file whose footer has more bytes is not read
MAX_TABLE = 1 << 30  # the most memory for the metadata of a part, in bytes
SMALLER = "write it anew, in smaller parts, if you trust it"
ROWS = 256  # the number of rows of metadata that are read at once
DTYPES = (torch.float32, torch.float16)


# The entries of about.json that clipfast reads, and their types. Each of them is optional.
KINDS: dict[str, type] = {
    **dict.fromkeys(("model", "pretrained", "digest", "data", "separator", "stamp"), str), "images": bool,
    "texts": bool, "keys": dict, "columns": list,
}  # fmt: skip


@dataclasses.dataclass
class Part:
    """A part of embeddings: consecutive items, whose features and metadata are stored in files of their own.

    Attributes:
        images, texts: features [N, D]; either of them may be None.
        source: the table of metadata, or the Parquet file from which it is read on first use.
    """

    images: Tensor | None
    texts: Tensor | None
    source: pyarrow.Table | Path

    def __len__(self) -> int:
        features = self.texts if self.images is None else self.images
        return 0 if features is None else len(features)

    @functools.cached_property
    def metadata(self) -> pyarrow.Table:
        """The metadata of this part's items as an Arrow table, with a row for each item."""
        if not isinstance(self.source, Path):
            return self.source
        return read_table(self.source)

    def of_kind(self, kind: str) -> Tensor | None:
        """Return the features [N, D] of one kind, "image" or "text", of this part of the embeddings, or None."""
        return {"image": self.images, "text": self.texts}.get(kind)

    def slice(self, first: int, size: int) -> Part:
        """Return a part of embeddings with at most ``size`` items of this one, from number ``first`` on."""
        images, texts = (None if x is None else x[first : first + size] for x in (self.images, self.texts))
        return Part(images, texts, self.metadata.slice(first, size))


def part_path(folder: Path, kind: str, number: int, count: int = 0) -> Path:
    """Return the path of one file of a part of embeddings.

    Args:
        folder: the folder of the embeddings.
        kind: ``IMAGES``, ``TEXTS`` or ``METADATA``.
        number: the number of the part.
        count: the number of parts. Part numbers are padded with zeros to equal lengths, since clip-retrieval sorts the
            files by name.
    """
    digits = max(DIGITS, len(str(count - 1)))
    return folder / kind / f"{kind}_{number:0{digits}}{SUFFIXES[kind]}"


def write_part(folder: Path, part: Part, number: int, count: int = 0) -> None:
    """Write a part of embeddings. Each file is complete or absent, and the metadata are written last.

    Raises:
        DiskFullError: there is no space.
        ValueError: the metadata are larger than :func:`read_table` accepts.
    """
    from pyarrow import parquet

    size = part.metadata.nbytes
    if size > MAX_TABLE:
        raise ValueError(
            f"the metadata of part {number} have {size:,} bytes, and at most {MAX_TABLE:,} are read again: make "
            "smaller parts, or keep less metadata"
        )
    for kind, features in ((IMAGES, part.images), (TEXTS, part.texts)):
        if features is not None:
            (folder / kind).mkdir(exist_ok=True)
            array = features.cpu().numpy()
            replace_file(part_path(folder, kind, number, count), functools.partial(_save, array), array.nbytes)
    (folder / METADATA).mkdir(exist_ok=True)
    write = functools.partial(parquet.write_table, part.metadata)
    replace_file(part_path(folder, METADATA, number, count), write, size)


def _save(array: np.ndarray[Any, Any], path: Path) -> None:
    """Write an array of embeddings to a file in NumPy's format; the name of the file is used as it is."""
    with path.open("wb") as file:  # given a path instead of a file, NumPy would append ".npy"
        np.save(file, array)


def read_parts(folder: Path, count: int | None = None) -> list[Part]:
    """Open the parts of a folder of embeddings in order. Features are memory-mapped; metadata are read on first use.

    Args:
        folder: the folder of the embeddings.
        count: the expected number of parts; None for all that are found.

    Raises:
        ValueError: parts are missing, damaged, or do not belong together.
    """
    files = {kind: _numbered(folder, kind) for kind in SUFFIXES}
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"{folder / ABOUT} says that there are {count!r:.80} parts: it must be a whole number from 1")
    numbers = sorted(files[METADATA]) if count is None else range(count)
    total = len(files[METADATA]) if count is None else count  # not ``len(numbers)``, which fails for a huge range
    if not numbers or not (files[IMAGES] or files[TEXTS]):
        raise ValueError(f"{folder} holds no embeddings; clipfast embed --output {folder} makes them")
    kinds = [found for kind, found in files.items() if found or kind == METADATA]
    there = {number for number in files[METADATA] if number in numbers and all(number in found for found in kinds)}
    if len(there) < total:
        first = next(number for number in numbers if number not in there)
        raise ValueError(
            f"{folder} lacks {total - len(there):,} of its {total:,} parts, the first of them number "
            f"{first}: give the command that makes them again, and it goes on from here"
        )
    parts = [read_part(files[IMAGES].get(n), files[TEXTS].get(n), files[METADATA][n]) for n in numbers]
    for part, number in zip(parts, numbers, strict=True):
        for features, others in ((part.images, parts[0].images), (part.texts, parts[0].texts)):
            own, first_one = (None if x is None else f"{x.shape[1]} wide in {x.dtype}" for x in (features, others))
            if own != first_one:
                raise ValueError(
                    f"the parts of {folder} do not belong together: the features of part {number} are {own}, and those "
                    f"of the first are {first_one}"
                )
    return parts


def read_part(images: Path | None, texts: Path | None, metadata: Path) -> Part:
    """Open a part of embeddings from its files.

    Raises:
        ValueError: a file is damaged, or the files have different numbers of rows.
    """
    found = [None if path is None else _mapped(path) for path in (images, texts)]
    with opened_metadata(metadata) as file:
        rows = int(file.metadata.num_rows)
    for path, features in zip((images, texts), found, strict=True):
        if features is not None and len(features) != rows:
            raise ValueError(f"{path} has {len(features)} rows, and {metadata} has {rows}")
    return Part(found[0], found[1], metadata)


def _mapped(path: Path) -> Tensor:
    """Map a file of embeddings [N, D] into memory; if it is damaged, raise ValueError."""
    try:
        open_regular(path).close()  # raises an error for a named pipe, on which NumPy would wait forever
        features = torch.from_numpy(np.load(path, mmap_mode="c"))  # copy-on-write: PyTorch warns of read-only memory
    except Exception as error:  # NumPy, which parses headers as Python, raises many kinds of errors
        raise ValueError(f"{path} cannot be read as features: {error}") from error
    if features.ndim != 2 or not features.shape[1] or features.dtype not in DTYPES:
        raise ValueError(
            f"{path} has shape {tuple(features.shape)} and {features.dtype}; features are [N, D], float32 or float16"
        )
    return features


@contextlib.contextmanager
def opened_metadata(path: Path) -> Iterator[parquet.ParquetFile]:
    """Open the Parquet file with the metadata of a part of the embeddings while the context is open.

    Raises:
        ValueError: the file cannot be read, or its footer is too large.
    """
    from pyarrow import ArrowException, parquet

    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            footer = int.from_bytes(file.read(4), "little")
            if footer > MAX_FOOTER:
                raise ValueError(f"its footer has {footer:,} bytes, and at most {MAX_FOOTER:,} are read; {SMALLER}")
            yield parquet.ParquetFile(file)
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as metadata: {error}") from error


def read_table(path: Path) -> pyarrow.Table:
    """Read the metadata of a part of embeddings from its Parquet file.

    Raises:
        ValueError: the file cannot be read, or takes too much memory.
    """
    import pyarrow

    with opened_metadata(path) as file:
        said = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        if said > MAX_TABLE:
            raise ValueError(f"its rows take {said:,} bytes, and at most {MAX_TABLE:,} are read; {SMALLER}")
        batches, taken = [], 0
        for batch in file.iter_batches(ROWS, use_threads=False):
            batches.append(batch)
            taken += batch.nbytes
            if taken > MAX_TABLE:  # a compressed file of a few bytes may expand to any number of rows
                raise ValueError(f"its rows take more than the {MAX_TABLE:,} bytes that are read; {SMALLER}")
        table = pyarrow.Table.from_batches(batches, file.schema_arrow)
    return table.combine_chunks().replace_schema_metadata(None)


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """Return the embeddings' files of one kind (``img_emb``, ``text_emb`` or ``metadata``) by their parts' numbers."""
    pattern = re.compile(rf"{kind}_([0-9]+)\{SUFFIXES[kind]}")
    found = [(pattern.fullmatch(path.name), path) for path in (folder / kind).glob(f"{kind}_*")]
    return {int(match[1]): path for match, path in found if match}


def read_about(folder: Path) -> dict[str, Any]:
    """Read ``about.json`` in a folder of embeddings; {} if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = read_json(folder / ABOUT)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder / ABOUT} is not an object")
    for name, kind in KINDS.items():
        if not isinstance(found.get(name), kind | None):
            raise ValueError(f"{folder / ABOUT}: {name} must be {kind.__name__}, got {found[name]!r:.80}")
    return found


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``about.json`` into a folder of embeddings."""
    replace_text(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
