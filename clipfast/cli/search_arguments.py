"""Functions that ``clipfast search`` and the other commands on a folder of embeddings share.

They add arguments to parsers, load the model that made the embeddings, and read pictures for HTML pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.units import BYTES, scaled
from .arguments import TABLE, add_output
from .eval_arguments import add_backend_argument, add_device_argument, add_model_arguments, load_encoder

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..evaluate.encoder import Encoder
    from ..search.embeddings import Embeddings
    from ..search.gallery import Item


def add_folder_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument DIR, the folder of embeddings."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="embeddings, as clipfast embed writes them")


def add_encoder_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add ``--model`` and other options for the model that embeds queries, and for the device."""
    add_model_arguments(parser, required=required)
    add_device_argument(parser)
    add_backend_argument(parser)


def add_result_arguments(parser: argparse.ArgumentParser, page: str) -> None:
    """Add ``--html``, ``--json`` and ``--table``; ``page`` says in the help text what is on the HTML page."""
    add = parser.add_argument
    add_output(parser, "--html", help=f"write a page with {page} to this file, and print no JSON")
    add_output(parser, "--json", help="also write the results to this file")
    add("--table", **TABLE)


def check_pictures(paths: Iterable[Path]) -> None:
    """Check before a model is loaded that the pictures on the command line are files.

    Raises:
        ValueError: a path is a folder, or does not exist.
    """
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the pictures in it, as in {path}/*.jpg")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such picture")


def encoder_of(args: argparse.Namespace, embeddings: Embeddings) -> Encoder:
    """Load the model that made the embeddings, as the arguments of a command or else ``about.json`` name it.

    Raises:
        ValueError: the embeddings do not name their model, it cannot be loaded, or the arguments name another model.
    """
    from ..distributed.world import ALONE

    about = embeddings.about
    model, pretrained = args.model, args.pretrained
    if model is None:
        if "model" not in about:
            raise ValueError(f"{args.folder} does not say which model made it: give it to --model")
        model, pretrained = about["model"], pretrained or about.get("pretrained")
        args.image_seq_len = args.image_seq_len or about.get("image_seq_len")
    encoder = load_encoder(args, model, pretrained, ALONE)
    if about.get("digest", encoder.digest) != encoder.digest:
        raise ValueError(
            f"{args.folder} was embedded with {about.get('model')}, and {model} has other weights or prepares images "
            "and texts in another way: their features cannot be compared. Give that model to --model, or embed again"
        )
    return encoder


def features_of(embeddings: Embeddings, kind: str, use: str) -> Any:
    """Return the features [N, D] of one kind, "image" or "text", which a command (``use``) needs.

    Raises:
        ValueError: the folder has no features of this kind, or no items.
    """
    found = embeddings.of_kind(kind)
    if found is None:
        how = " pictures that have captions, such as beach.txt beside beach.jpg," if kind == "text" else ""
        raise ValueError(
            f"{use} needs {kind} features, and there are none: embed{how} with --images --texts to another folder"
        )
    if not len(found):
        raise ValueError("the embeddings have no items")
    return found


class Pictures:
    """Reads the pictures of embedded items from the source that was embedded, for the page of a command.

    Raises:
        ValueError: the source cannot be read, or has changed since it was embedded.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        from ..search.source_samples import Samples

        self.embeddings = embeddings
        self.samples: Samples | None = None
        if embeddings.about.get("images") and "keys" in embeddings.about:
            self.samples = Samples.of(embeddings.about)

    def item(self, place: int, score: float | None = None, group: str = "", mark: str = "", **more: Any) -> Item:
        """Return the embedded item with index ``place`` for a command's page, with its picture if it can be read."""
        from ..search.embeddings import NAMES, row_of
        from ..search.gallery import Item

        row = row_of(self.embeddings, place)
        path = str(row.get("image_path") or row.get("key") or "")
        others = {name: value for name, value in row.items() if name not in NAMES}
        caption = str(row.get("caption") or "")
        return Item(self._image(row, path), caption, score, path, group, {**more, **others}, mark)

    def _image(self, row: Mapping[str, Any], path: str) -> Any:
        """Return the picture of an item for a command's page, decoded or as a path; None if it cannot be read."""
        if self.samples is None:
            return Path(path) if Path(path).is_file() else None
        return getattr(self.samples.read(row.get("number", -1)), "image", None)  # a ``Skipped`` has no image


def write_gallery(path: Path, title: str, items: Iterable[Item], about: str, **options: Any) -> None:
    """Write the gallery of a command, an HTML page of pictures, and print its path and size on stderr.

    Raises:
        DiskFullError: there is no space.
    """
    from ..search.gallery import gallery

    size = gallery(path, title, items, about=about, **options)
    print(f"wrote {path}, {scaled(size, BYTES)}", file=sys.stderr)


def write_keys(path: Path, embeddings: Embeddings, places: Iterable[int]) -> None:
    """Write the keys of the embedded items at these ``places`` to the file of ``--write-keys``, one a line.

    Raises:
        ValueError: the metadata of the embeddings have no keys.
        DiskFullError: there is no space.
    """
    from ..io.files import replace_text

    if "key" not in embeddings.metadata.column_names:
        raise ValueError("the metadata have no column 'key'")
    keys = embeddings.metadata.column("key").to_pylist()
    replace_text(path, "".join(f"{keys[place]}\n" for place in places))
