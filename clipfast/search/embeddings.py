"""``Embeddings``: features with the metadata of each item, which are opened, appended, searched and saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..io.files import write_folder
from ..kernels import top_k
from .layout import DTYPES, Part, read_about, read_parts, write_about, write_part
from .where import rows_where

NAMES = ("key", "image_path", "caption")  # the metadata columns that identify an item

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

PART_SIZE = 10_000  # the default number of rows of a part
KINDS = ("image", "text")


class Found(NamedTuple):
    """The k best items for each of Q queries, best first. If fewer are found, the rest has score -inf and index -1."""

    scores: Tensor  # [Q, k]
    indices: Tensor  # [Q, k], int64


class Embeddings:
    """Features of images, of texts, or of both for each item, with a table of metadata.

    Args:
        features: the features of the images, [N, D] in float32 or float16; None if there are only texts.
        metadata: a table with a row for each item, or its columns by their names. Without it, there is one column,
            ``key``, with the number of each item.
        text_features: the features of the texts, [N, D] in the same dtype; None if there are only images.
        about: the model, the source and the options that made the features, as plain values.

    Raises:
        ValueError: shapes, dtypes or numbers of rows do not fit together.
    """

    def __init__(
        self, features: Tensor | None = None, metadata: pyarrow.Table | Mapping[str, Sequence[Any]] | None = None, *,
        text_features: Tensor | None = None, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.about = dict(about or {})
        self._parts = [_checked_part(features, text_features, metadata)]
        self._folder: Path | None = None
        self._saved = 0  # the number of parts that are in the folder
        self._joined: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Embeddings:
        """Open a folder that ``clipfast embed``, :meth:`save` or clip-retrieval wrote.

        Features are memory-mapped: only the rows that are used are read from the disk.

        Raises:
            ValueError: the folder holds no embeddings, is not finished, or is damaged.
        """
        folder = Path(folder)
        about = read_about(folder)
        found = cls.__new__(cls)
        found._parts = read_parts(folder, about.pop("parts", None))
        found.about, found._folder, found._saved, found._joined = about, folder.resolve(), len(found._parts), {}
        return found

    def __len__(self) -> int:
        """Return the number of embedded items."""
        return sum(map(len, self._parts))

    def __repr__(self) -> str:
        held = [f"{kind} features" for kind in self.kinds]
        return f"<Embeddings of {len(self)} items: {' and '.join(held)}, {', '.join(self.metadata.column_names)}>"

    @property
    def features(self) -> Tensor | None:
        """Embeddings of the images [N, D], or None. Those of a folder with several parts are read into memory."""
        return self.of_kind("image")

    @property
    def text_features(self) -> Tensor | None:
        """Embeddings of the texts [N, D], or None. Those of a folder with several parts are read into memory."""
        return self.of_kind("text")

    @property
    def metadata(self) -> pyarrow.Table:
        """The metadata of the embeddings as an Arrow table with a row for each item."""
        if "metadata" not in self._joined:
            self._joined["metadata"] = _joined_tables([part.metadata for part in self._parts])
        return self._joined["metadata"]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features that the embeddings have: "image", "text", or both."""
        return tuple(kind for kind in KINDS if self._parts[0].of_kind(kind) is not None)

    def feature(self, number: int, kind: str = "image") -> Tensor:
        """Return the embedding [D] of one item, without reading those of others.

        Raises:
            ValueError: the item does not exist, or the embeddings have no features of this kind.
        """
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self):
            raise ValueError(f"there is no item {number!r}; there are {len(self)}, from 0 on")
        place = number
        for part in self._parts:
            if place < len(part):
                break
            place -= len(part)
        return _existing_features(part, kind)[place]

    def of_kind(self, kind: str) -> Tensor | None:
        """Return the embeddings of one kind, "image" or "text": :attr:`features` or :attr:`text_features`."""
        if kind not in self._joined:
            parts = [part.of_kind(kind) for part in self._parts]
            there = [part for part in parts if part is not None]
            self._joined[kind] = (there[0] if len(there) == 1 else torch.cat(there)) if there else None
        found: Tensor | None = self._joined[kind]
        return found

    def to(self, device: str | torch.device) -> Embeddings:
        """Return the embeddings with the features on another device, on which they are then searched."""

        def moved(features: Tensor | None) -> Tensor | None:
            """Return the features of embeddings on the device; None for None."""
            return None if features is None else features.to(device)

        found = copy.copy(self)
        found._parts = [Part(moved(part.images), moved(part.texts), part.source) for part in self._parts]
        found._joined = {}
        return found

    def append(
        self, features: Tensor | None = None, metadata: pyarrow.Table | Mapping[str, Sequence[Any]] | None = None, *,
        text_features: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Append items to the embeddings; the arguments are those of the constructor.

        Columns that only some of the items have are null for the others.

        Raises:
            ValueError: the new features do not fit together, or do not fit the existing ones.
        """
        part = _checked_part(features, text_features, metadata, first=len(self))
        for kind in KINDS:
            old, new = self._parts[0].of_kind(kind), part.of_kind(kind)
            was, is_ = (None if x is None else (x.shape[1], x.dtype, x.device) for x in (old, new))
            if was != is_:
                raise ValueError(f"{kind} features to append are {_words(is_)}, but there are {_words(was)}")
        self._parts.append(part)
        self._joined.clear()

    def save(self, folder: str | Path, *, part_size: int = PART_SIZE) -> None:
        """Write the embeddings to a folder in clip-retrieval's layout; the folder they came from gets only new items.

        If the process is killed, a new folder is complete or absent, and so are new items in an existing folder.

        Args:
            folder: a path where nothing exists, or the folder from which these embeddings were opened or to which they
                were saved.
            part_size: the number of items of a part.

        Raises:
            ValueError: the part size is below 1.
            FileExistsError: ``folder`` exists, and these embeddings do not belong to it.
            DiskFullError: there is no space.
        """
        if part_size < 1:
            raise ValueError(f"part size must be at least 1, got {part_size}")
        folder = Path(folder)
        if folder.resolve() == self._folder:
            self._write(folder, self._saved, part_size)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, lambda path: self._write(path, 0, part_size))
        self._folder = folder.resolve()

    def _write(self, folder: Path, first: int, part_size: int) -> None:
        """Write the parts from number ``first`` on into a folder, cut to ``part_size`` items, and ``about.json``."""
        new = [
            part.slice(start, part_size)
            for part in self._parts[first:]
            for start in range(0, max(1, len(part)), part_size)
        ]
        count = first + len(new)
        for number, part in enumerate(new, first):
            write_part(folder, part, number, count)
        write_about(folder, {**self.about, "parts": count})
        self._parts[first:] = new
        self._saved = count

    def search(
        self, query: Tensor, k: int = 10, *, where: str | Tensor | NDArray[np.bool_] | Sequence[bool] | None = None,
        kind: str = "image",
    ) -> Found:  # fmt: skip
        """Find the k best items for each query by the inner product of features. The search is exact, part by part.

        Args:
            query: the features of the queries [Q, D], or of one query [D]. They are converted to the dtype and device
                of the items' features.
            k: the number of items to find.
            where: a filter for the items: an expression on the metadata, such as ``"width >= 256 and caption contains
                cat"``, or a bool for each item.
            kind: search the features of "image" or of "text".

        Returns:
            Scores and indices [Q, k]; Q is 1 for a query [D].

        Raises:
            ValueError: shapes, ``k``, ``where`` or ``kind`` do not fit.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        first = _existing_features(self._parts[0], kind)
        if query.ndim == 1:
            query = query[None]
        query = query.detach().to(first)
        allowed = None if where is None else torch.from_numpy(self.mask(where)).to(first.device)
        scores = query.new_full((len(query), k), float("-inf"), dtype=torch.float32)
        indices = torch.full((len(query), k), -1, device=first.device)
        begin = 0
        for part in self._parts:
            rows = slice(begin, begin + len(part))
            best = top_k(query, _existing_features(part, kind), k, allowed=None if allowed is None else allowed[rows])
            scores, indices = _merge_found(Found(scores, indices), best, begin)
            begin = rows.stop
        return Found(scores, indices)

    def mask(self, where: str | Tensor | NDArray[np.bool_] | Sequence[bool]) -> NDArray[np.bool_]:
        """Return a filter as a bool for each item; it is given as an expression on the metadata, or as bools already.

        Raises:
            ValueError: the expression cannot be read, or the number of bools differs from the number of items.
        """
        if isinstance(where, str):
            chosen: NDArray[Any] = rows_where(self.metadata, where).to_numpy(zero_copy_only=False)
        else:
            chosen = where.cpu().numpy() if isinstance(where, Tensor) else np.array(where)
        if chosen.dtype != np.bool_ or chosen.shape != (len(self),):
            raise ValueError(
                f"where must be an expression or {len(self)} bools, one for each item; got {chosen.dtype} "
                f"{chosen.shape}"
            )
        return chosen


def _existing_features(part: Part, kind: str) -> Tensor:
    """Return the features of one kind ("image" or "text") of a part of the embeddings.

    Raises:
        ValueError: the embeddings have no features of this kind.
    """
    found = part.of_kind(kind)
    if found is None:
        raise ValueError(f"there are no {kind} features")
    return found


def _merge_found(best: Found, more: tuple[Tensor, Tensor], begin: int) -> Found:
    """Return the k best of the items found so far and those found in the part whose first item is number ``begin``."""
    scores, indices = more
    indices = torch.where(indices < 0, indices, indices + begin)
    scores, order = torch.cat([best.scores, scores], 1).sort(dim=1, descending=True, stable=True)
    k = best.scores.shape[1]
    return Found(scores[:, :k], torch.cat([best.indices, indices], 1).gather(1, order[:, :k]))


def _words(about: tuple[int, torch.dtype, torch.device] | None) -> str:
    """Return a text with width, dtype and device of embeddings for an error message, or "absent"."""
    return "absent" if about is None else f"{about[0]} wide in {about[1]} on {about[2]}"


def _checked_part(
    images: Tensor | None, texts: Tensor | None, metadata: pyarrow.Table | Mapping[str, Sequence[Any]] | None,
    first: int = 0,
) -> Part:  # fmt: skip
    """Check features and their metadata, and return them as a part of the embeddings.

    ``first`` is the number of its first item, from which the column ``key`` counts if there are no metadata.
    """
    import pyarrow

    given = [features for features in (images, texts) if features is not None]
    if not given:
        raise ValueError("embeddings need features of images, of texts, or of both")
    for features in given:
        if features.ndim != 2 or features.dtype not in DTYPES:
            raise ValueError(
                f"features must be [N, D] in float32 or float16, got {tuple(features.shape)} in {features.dtype}"
            )
    rows = len(given[0])
    if metadata is None:
        metadata = {"key": [str(first + row) for row in range(rows)]}
    table = metadata if isinstance(metadata, pyarrow.Table) else pyarrow.table(dict(metadata))
    counts = {"images": images, "texts": texts, "metadata": table}
    lengths = {name: len(value) for name, value in counts.items() if value is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"there must be one row of each for an item, got {lengths}")
    images, texts = (None if features is None else features.detach() for features in (images, texts))
    return Part(images, texts, table)


def _joined_tables(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """Concatenate tables of embeddings' metadata; a column becomes text if its types cannot be joined."""
    import pyarrow

    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException:
        kinds: dict[str, set[Any]] = {}
        for table in tables:
            for field in table.schema:
                kinds.setdefault(field.name, set()).add(field.type)
        mixed = {name for name, found in kinds.items() if len(found) > 1}
        return pyarrow.concat_tables([_as_text(table, mixed) for table in tables], promote_options="permissive")


def _as_text(table: pyarrow.Table, names: set[str]) -> pyarrow.Table:
    """Return a table of embeddings' metadata whose columns ``names`` are converted to text."""
    import pyarrow

    for number, field in enumerate(table.schema):
        if field.name in names:
            texts = [None if value is None else str(value) for value in table.column(number).to_pylist()]
            table = table.set_column(number, field.name, pyarrow.array(texts, pyarrow.string()))
    return table


def names_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that identify an embedded item: key, path and caption, as far as it has them."""
    return {name: row[name] for name in NAMES if row.get(name) is not None}


def row_of(embeddings: Embeddings, place: int) -> dict[str, Any]:
    """Return the metadata of the embedded item with index ``place`` as a dict by column."""
    found: dict[str, Any] = embeddings.metadata.slice(place, 1).to_pylist()[0]
    return found
