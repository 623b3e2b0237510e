"""The requests of ``clipfast app``: each method of ``Desk`` takes the values of a form on the page and returns HTML.

Everything from the user, from files and from metadata is escaped and shown as text. Pictures are inside the HTML as
small JPEGs, so no URL of the page leads to a file.
"""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..data import Skipped
from ..data.names import is_local
from ..evaluate.encoder import Encoder
from ..evaluate.zero_shot import TEMPLATES
from ..io.page import thumbnail
from ..models.images import ImageError, open_image
from .embeddings import Embeddings, row_of
from .heatmap import heat_maps, limits_of, overlay, side_of, to_tensor
from .similar import probabilities
from .source_samples import Samples

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)
IMAGE_PATH, NUMBER = "image_path", "number"  # metadata columns: a picture's path, its position in the source
FOUND, MAX_FOUND = 24, 200  # the number of items that are shown, by default and at most
SAMPLES, TRIED = 4, 32  # number of captions offered as example queries, and number of captions that are tried for them
MAX_LABELS = 1000  # the most labels of one zero-shot classification
MAX_MAPS = 6  # the most texts, and so heat maps, of one request
MAX_RATIO = 5  # a picture's longer side divided by its shorter one, on which the time of its heat maps depends
MAX_TEXT = 10_000  # the most characters of a query, of an expression, or of all labels together
MAX_SAMPLE = 24  # the most characters of a caption that is offered as a query
SIDE, MAP_SIDE, LARGE_SIDE = 224, 448, 768  # longer sides in pixels of pictures in results, heat maps and details


class Pictures:
    """The pictures that the app may show: those of the embedded source, or files in the folders ``roots``.

    Args:
        roots: the folders. Symbolic links that lead out of them are not followed.
        samples: the source, from which pictures are read by their numbers.
    """

    def __init__(self, roots: Sequence[Path] = (), samples: Samples | None = None) -> None:
        self.roots, self.samples = roots, samples
        self._reading = threading.Lock()  # only one thread of the server may read ``samples`` at a time

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Pictures:
        """Return the pictures that an embedded set was made from, as its ``about.json`` describes them.

        Raises:
            ValueError: the description is missing; or the source is not on this machine, cannot be read, or has
                changed.
        """
        if not is_local(str(about.get("data"))):  # a name with a scheme may run a command (``pipe:``)
            raise ValueError(f"{about['data']} is not on this machine")
        return cls(samples=Samples.of(about))

    def open(self, metadata: Mapping[str, Any]) -> Image.Image:
        """Open and decode the picture of an embedded item, to be shown by the app.

        Args:
            metadata: the metadata of the item. Its ``number`` is the position in the source. Its ``image_path`` is
                absolute, or relative to the working folder or to one of ``roots``.

        Raises:
            ImageError: the picture does not exist, may not be shown, or cannot be decoded.
        """
        if self.samples is None:
            return open_image(self._file(metadata.get(IMAGE_PATH)))
        with self._reading:
            found = self.samples.read(metadata.get(NUMBER, -1))
        if isinstance(found, Skipped) or found.image is None:
            raise ImageError(str(found))
        return found.image

    def _file(self, path: Any) -> Path:
        """Return the file of a found picture inside the folders that the app may show."""
        if not self.roots:
            raise ImageError("no folder of pictures is known: name it with --pictures")
        try:
            # A resolved path has no symbolic links and no "..", so the file that is opened is inside the folder in
            # which the path is.
            for file in (Path(path).resolve(), *((root / path).resolve() for root in self.roots)):
                if any(file.is_relative_to(root.resolve()) for root in self.roots) and file.is_file():
                    return file
        except (OSError, ValueError, TypeError) as error:  # no file can have this path, such as one with a NUL
            raise ImageError(f"the path cannot be used: {error}") from error
        raise ImageError("no such file in the folders of pictures")


class Desk:
    """Answers the requests of the app's page with HTML, from embeddings and the model that made them.

    Args:
        embeddings: the embeddings that are searched.
        encoder: the model, which embeds queries.
        pictures: the pictures that may be shown.

    Raises:
        ValueError: there are no embeddings, or the width of their features is not the model's.
    """

    def __init__(self, embeddings: Embeddings, encoder: Encoder, pictures: Pictures) -> None:
        self.embeddings, self.encoder, self.pictures = embeddings, encoder, pictures
        if not len(embeddings):
            raise ValueError("the folder holds no items")
        self.kind = embeddings.kinds[0]
        width, own = len(embeddings.feature(0, self.kind)), encoder.texts([""]).shape[1]
        if width != own:
            raise ValueError(
                f"the features of the folder are {width} wide, those of --model {encoder.name} are {own}: "
                "name the model that embedded the pictures"
            )

    def columns(self) -> str:
        """Return the app's HTML with the names of the metadata columns that a filter expression can use."""
        table = self.embeddings.metadata
        there = (name for name in table.column_names if table.column(name).null_count < len(table))
        names = (f"<code>{html.escape(name)}</code>" for name in there)
        return f'<p class="quiet">Columns: {", ".join(names)}</p>'

    def start(self) -> str:
        """Return the app's HTML before the first query: items that are spread evenly over the embeddings."""
        count = len(self.embeddings)
        cards = [self._card(row) for row in range(0, count, -(-count // FOUND))]
        return _cards(f"{len(cards):,} of {count:,}, from all over the set", cards)

    def samples(self) -> str:
        """Return the app's HTML of example queries: short captions for which a search finds their own item first."""
        if "caption" not in self.embeddings.metadata.column_names:
            return ""
        captions, count = self.embeddings.metadata.column("caption"), len(self.embeddings)
        tried = [str(captions[row].as_py() or "") for row in range(0, count, max(1, count // TRIED))]
        tried = [words for words in dict.fromkeys(tried) if 0 < len(words) <= MAX_SAMPLE]
        if not tried:
            return ""
        found = self.embeddings.search(self.encoder.texts(tried), 1, kind=self.kind).indices[:, 0].tolist()
        known = [html.escape(words) for words, row in zip(tried, found, strict=True) if captions[row].as_py() == words]
        chips = " ".join(f'<button data-words="{words}">{words}</button>' for words in known[:SAMPLES])
        return f'<p class="samples">{chips}</p>'

    def search(self, words: str, picture: str | None, weight: float | None, where: str, k: float | None) -> str:
        """Return the app's HTML of the items that are most similar to a text, a picture, or both.

        Args:
            words: the query, or "".
            picture: the path of the uploaded picture, or None.
            weight: with words and a picture, the weight of the picture's features, from 0 to 1; the features of the
                words have the weight ``1 - weight``.
            where: a filter expression on the metadata, or "".
            k: the number of items to find.

        Raises:
            ValueError: text and picture are both missing, the picture or the expression cannot be used, or a number is
                out of range.
        """
        words = _checked(words, "words").strip()
        if not words and not picture:
            raise ValueError("type some words, drop a picture, or do both")
        found = []
        if words:
            found.append(self.encoder.texts([words])[0])
        if picture:
            found.append(self._seen(picture))
        if len(found) == 2:
            if weight is None or not 0 <= weight <= 1:
                raise ValueError(f"the weight of the picture must be from 0 to 1, got {weight}")
            found = [F.normalize(weight * found[1] + (1 - weight) * found[0], dim=0)]
        return self._found(found[0], where, k)

    def similar(self, row: int, where: str, k: float | None) -> str:
        """Return the app's HTML of the items that are most similar to an item of the set, without the item itself.

        Raises:
            ValueError: the item does not exist, the expression cannot be used, or ``k`` is out of range.
        """
        return self._found(self.embeddings.feature(row, self.kind), where, k, without=row)

    def detail(self, row: int) -> str:
        """Return the app's details of an item: a large picture and all its metadata.

        Raises:
            ValueError: the item does not exist.
        """
        self.embeddings.feature(row, self.kind)  # raises ValueError if there is no such row
        metadata = row_of(self.embeddings, row)
        cells = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in metadata.items()
            if value is not None
        )
        similar = f'<button class="similar" data-similar="{row}">Find similar ones</button>'
        return f'<div class="detail">{self._picture(metadata, LARGE_SIDE)}<div>{similar}<dl>{cells}</dl></div></div>'

    def classify(self, picture: str | None, labels: str, templates: str) -> str:
        """Classify a picture zero-shot; return the app's HTML table of each label's probability, the highest first.

        Args:
            picture: the path of the uploaded picture, or None.
            labels: the labels, one in each line.
            templates: the name of the prompt templates, over which features are averaged.

        Raises:
            ValueError: a value is missing, unknown, or too long.
        """
        picture, names = _dropped(picture), _lines(labels, "labels", MAX_LABELS)
        if templates not in TEMPLATES:
            raise ValueError(f"templates must be one of {', '.join(TEMPLATES)}, got {templates!r}")
        seen, classifier = self._seen(picture)[None], self.encoder.classifier(names, TEMPLATES[templates])
        similarities, shares = (seen @ classifier)[0], probabilities(self.encoder, seen, classifier)[0]
        rows = [
            f'<tr><th scope="row">{html.escape(names[place])}</th><td><meter value="{shares[place]:.4f}"></meter> '
            f"{shares[place]:.1%}</td><td>{similarities[place]:.4f}</td></tr>"
            for place in similarities.argsort(descending=True, stable=True).tolist()
        ]
        head = "<tr><th>label</th><th>probability</th><th>similarity</th></tr>"
        return f'<table class="labels" role="status"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'

    def heat_map(self, picture: str | None, texts: str) -> str:
        """Return the app's HTML with a picture once for each text, overlaid with the heat map of the text.

        Args:
            picture: the path of the uploaded picture, or None.
            texts: the texts, one in each line.

        Raises:
            ValueError: a value is missing or too long, the picture cannot be used, or the model is not one of clipfast.
        """
        from PIL import ImageOps

        picture, lines = _dropped(picture), _lines(texts, "texts", MAX_MAPS)
        side, image = side_of(self.encoder.model), open_image(picture)
        if max(image.size) > MAX_RATIO * min(image.size):
            width, height = image.size
            raise ValueError(
                f"a side of the picture may be at most {MAX_RATIO} times the other one, got {width} x {height}"
            )
        pixels = to_tensor(image, side).to(self.encoder.device)
        maps = heat_maps(self.encoder.model, pixels, self.encoder.texts(lines))
        limits = limits_of(maps)
        shown = ImageOps.contain(image, (MAP_SIDE, MAP_SIDE))
        figures = [
            f'<li><figure><img src="{thumbnail(overlay(shown, heat, limits), MAP_SIDE)}" alt="">'
            f"<figcaption>{html.escape(text)}"
            f'<span class="quiet">{heat.min():.4f} to {heat.max():.4f}</span></figcaption></figure></li>'
            for text, heat in zip(lines, maps, strict=True)
        ]
        legend = "Bright is where a text fits best, by cosine similarity; all maps share one scale."
        return f'<p class="quiet" role="status">{legend}</p><ul class="cards maps">{"".join(figures)}</ul>'

    def _seen(self, picture: str) -> Tensor:
        """Return the features [D] of a picture that the user uploaded to the app."""
        return self.encoder.images(self.encoder.transform(open_image(picture))[None])[0]

    def _found(self, query: Tensor, where: str, k: float | None, without: int | None = None) -> str:
        """Return the app's HTML of the ``k`` items most similar to a query's features [D], which fulfil the filter."""
        if k is None or not (float(k).is_integer() and 1 <= k <= MAX_FOUND):
            raise ValueError(f"the number of results must be a whole number from 1 to {MAX_FOUND}, got {k}")
        where = _checked(where, "filter").strip()
        mask = self.embeddings.mask(where) if where else np.ones(len(self.embeddings), bool)
        if without is not None:
            mask[without] = False
        scores, indices = self.embeddings.search(query, int(k), where=mask, kind=self.kind)
        rows = [row for row in indices[0].tolist() if row >= 0]
        cards = [self._card(row, score) for row, score in zip(rows, scores[0].tolist(), strict=False)]
        return _cards(f"{len(cards):,} of {len(self.embeddings):,}" if cards else "No item fulfils the filter.", cards)

    def _card(self, row: int, score: float | None = None) -> str:
        """Return the app's HTML of one item: its picture, caption and file name, and its score if there is one."""
        metadata = row_of(self.embeddings, row)
        name = Path(str(metadata.get(IMAGE_PATH) or metadata.get("key") or "")).name
        said = html.escape(str(metadata.get("caption") or ""))
        line = said if score is None else f"<b>{score:.4f}</b> {said}"
        return (
            f'<li><button class="card" data-row="{row}">{self._picture(metadata, SIDE)}'
            f'<span class="line">{line}</span><span class="name">{html.escape(name)}</span></button></li>'
        )

    def _picture(self, metadata: dict[str, Any], side: int) -> str:
        """Return the app's HTML of an item's picture, or of a message in its place."""
        if IMAGE_PATH not in metadata:
            return '<span class="none">no picture</span>'
        try:
            image = self.pictures.open(metadata)
        except ImageError as error:
            return f'<span class="none">{html.escape(str(error))}</span>'
        label = html.escape(str(metadata.get("caption") or metadata[IMAGE_PATH]))
        return f'<img src="{thumbnail(image, side)}" alt="{label}">'


def _cards(count: str, cards: Sequence[str]) -> str:
    """Return the app's HTML of a list of items (``cards``) below a text about their number (``count``)."""
    return f'<p class="quiet" role="status">{count}</p><ul class="cards">{"".join(cards)}</ul>'


def answer(function: Callable[..., str], *given: Any) -> str:
    """Call a method of :class:`Desk` and return its HTML; if it raises, return the HTML of an error message."""
    try:
        found = function(*given)
    except ValueError as error:
        found = message(str(error))
    except Exception as error:  # an error in one request must not end the server
        log.exception("a request failed")
        found = message(f"this failed: {error}")
    return found.encode("utf-8", "replace").decode()  # replaces lone surrogates of a request, which UTF-8 cannot encode


def message(text: str) -> str:
    """Return the HTML of an error message on the app's page."""
    return f'<p class="message" role="alert">{html.escape(text)}</p>'


def _checked(text: str | None, name: str) -> str:
    """Return the text of a field in the app's form, "" for None.

    Raises:
        ValueError: the text is too long.
    """
    if len(text or "") > MAX_TEXT:
        raise ValueError(f"{name}: at most {MAX_TEXT:,} characters, got {len(text or ''):,}")
    return text or ""


def _dropped(picture: str | None) -> str:
    """Return the path of the picture that the user dropped on the app's page; without one, raise ValueError."""
    if not picture:
        raise ValueError("drop a picture")
    return picture


def _lines(text: str | None, name: str, most: int) -> list[str]:
    """Return the distinct non-empty lines of the text of a field in the app's form.

    Raises:
        ValueError: the text is too long, or has no lines or too many.
    """
    lines = list(dict.fromkeys(line.strip() for line in _checked(text, name).splitlines() if line.strip()))
    if not 1 <= len(lines) <= most:
        raise ValueError(f"type 1 to {most} {name}, one in each line; there are {len(lines)}")
    return lines
