"""``clipfast search``: the pictures of an embedded folder that are most like words, a picture, or both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import COUNT
from .eval_arguments import read_texts, write_results
from .search_arguments import add_encoder_arguments, add_folder_argument, add_result_arguments, check_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluate.encoder import Encoder
    from ..search.embeddings import Embeddings, Found


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast search``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "search",
        description="Find the items of an embedded folder that are most like words, a picture, or both, exactly. The "
        "model is the one that made DIR, unless --model says where else it is.",
        epilog="Example: clipfast search embedded --text 'a red flower' --where 'width >= 256' --html found.html",
    )
    add = parser.add_argument
    add_folder_argument(parser)
    add("--text", nargs="+", default=[], metavar="WORDS", help="texts to search by, each in quotes")
    add("--queries", type=Path, help="texts to search by, one a line")
    add("--image", nargs="+", default=[], type=Path, help="pictures to search by")
    itself = "also find the picture itself that is given to --image, if DIR has it by this path"
    add("--include-itself", action="store_true", help=itself)
    weight = "with texts and pictures: the share of the picture in a query, from 0 to 1 (default: 0.5)"
    add("--weight", type=float, help=weight)
    add("--k", type=COUNT, default=10, help="how many items to find for each query (default: 10)")
    where = 'find only items whose metadata fulfil this expression, such as "width >= 256 and caption contains cat"'
    add("--where", metavar="EXPR", help=where)
    add("--kind", choices=("image", "text"), default="image", help="search images or texts (default: image)")
    index = "exact, or faiss for an approximate index, which is kept in the cache (pip install 'clipfast[search]')"
    add("--index", choices=("exact", "faiss"), default="exact", help=f"{index} (default: exact)")
    add_encoder_arguments(parser)
    add_result_arguments(parser, "the found items")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast search``: search, show the items that were found, and return the exit code."""
    texts = [*args.text, *(read_texts(args.queries) if args.queries else [])]
    _check(args, texts)
    from ..search.embeddings import Embeddings
    from .search_arguments import Pictures, encoder_of, features_of, write_gallery

    embeddings = Embeddings.open(args.folder)
    args.k = min(args.k, len(embeddings))
    features_of(embeddings, args.kind, f"search --kind {args.kind}")
    mask = None if args.where is None else embeddings.mask(args.where)
    if mask is not None and not mask.any():
        raise ValueError(f"--where {args.where!r} holds for none of the {len(embeddings):,} items")
    pictures = Pictures(embeddings) if args.html else None
    encoder = encoder_of(args, embeddings)
    names, queries = query_features(encoder, texts, args.image, 0.5 if args.weight is None else args.weight)
    left_out = [set() if args.include_itself else _places(embeddings, path) for path in args.image]
    most = args.k + max(map(len, left_out), default=0)
    if args.index == "faiss":
        from ..search.approximate import search

        found, index = search(embeddings, args.folder, queries.cpu(), most, mask, args.kind)
    else:
        found, index = embeddings.search(queries.cpu(), most, where=mask, kind=args.kind), None
    # A single picture is combined with each text, so the picture is left out of the results of every query.
    left_out *= len(names) // max(1, len(left_out))
    results = _results(args, embeddings, names, found, index, left_out or [set()] * len(names))
    if pictures is not None:
        items = (
            pictures.item(one["place"], one["score"], query["query"] if len(names) > 1 else "")
            for query in results["queries"]
            for one in query["found"]
        )
        each = " for each query" if len(names) > 1 else ""
        among = f" where {args.where}" if args.where else ""
        about = f"The {args.k} best{each} of {results['items']:,} items in {args.folder}{among}, by {encoder.name}. "
        about += "Scores: cosine."
        write_gallery(args.html, f"Search: {'; '.join(names)}"[:200], items, about)
    write_results(args, results, _table, shown=args.html)
    return 0


def _check(args: argparse.Namespace, texts: list[str]) -> None:
    """Check the arguments of ``clipfast search`` before anything is read.

    Raises:
        ValueError: there is no query, texts and pictures do not make pairs, or a number is out of range.
    """
    if not texts and not args.image:
        raise ValueError("give a query to search for: --text, --queries or --image")
    if texts and args.image and 1 not in (len(texts), len(args.image)) and len(texts) != len(args.image):
        raise ValueError(
            f"{len(texts)} texts and {len(args.image)} pictures: give as many of both, or one of either, which is "
            "combined with each of the others"
        )
    if not 0 <= (args.weight or 0) <= 1:
        raise ValueError(f"--weight must be from 0 to 1, got {args.weight:g}")
    if args.weight is not None and not (texts and args.image):
        raise ValueError("--weight is the share of a picture beside a text: give both, with --image and --text")
    if any(not text.strip() for text in texts):
        raise ValueError("a text to search for is empty")
    check_pictures(args.image)


def query_features(
    encoder: Encoder, texts: list[str], images: list[Path], weight: float = 0.5
) -> tuple[list[str], Tensor]:
    """Encode the queries of ``clipfast search``: texts, pictures, or both; return their names and features [Q, D].

    Args:
        encoder: the model.
        texts, images: as many texts as images, or one of either for all of the other kind, or only one kind.
        weight: weight of the picture in a pair, from 0 to 1.

    Raises:
        ImageError: a picture cannot be used.
    """
    import torch.nn.functional as F

    if not images:
        return texts, encoder.texts(texts)
    by_image = image_features(encoder, images)
    if not texts:
        return [str(path) for path in images], by_image
    by_text = encoder.texts(texts)
    count = max(len(texts), len(images))
    pairs = zip(texts * (count // len(texts)), images * (count // len(images)), strict=True)
    return [f"{text} + {path}" for text, path in pairs], F.normalize(weight * by_image + (1 - weight) * by_text, dim=1)


def image_features(encoder: Encoder, images: list[Path]) -> Tensor:
    """Encode picture files of ``clipfast search`` or ``classify``; return their features [N, D] of unit length.

    Raises:
        ImageError: a picture cannot be used.
    """
    import torch

    from ..models.images import ImageError, open_image

    found = []
    for path in images:
        try:
            found.append(encoder.images(encoder.transform(open_image(path))[None]))
        except ImageError as error:
            raise ImageError(f"{path}: {error}", error.kind) from error
    return torch.cat(found)


def _places(embeddings: Embeddings, picture: Path) -> set[int]:
    """Return the indices of the items that were embedded from ``picture``, a file of ``clipfast search --image``."""
    import pyarrow.compute

    if "image_path" not in embeddings.metadata.column_names:
        return set()
    paths = embeddings.metadata.column("image_path").cast("string")  # a column of nulls has the type null, not string
    same_name = pyarrow.compute.ends_with(paths, picture.name).fill_null(False).to_numpy().nonzero()[0].tolist()
    return {place for place in same_name if (path := Path(paths[place].as_py())).is_file() and path.samefile(picture)}


def _results(
    args: argparse.Namespace, embeddings: Embeddings, names: list[str], found: Found, index: dict[str, Any] | None,
    left_out: list[set[int]],
) -> dict[str, Any]:  # fmt: skip
    """Return the results of ``clipfast search`` as plain values."""
    from ..search.embeddings import names_of, row_of

    queries = []
    for name, scores, places, own in zip(names, found.scores.tolist(), found.indices.tolist(), left_out, strict=True):
        best = [
            {"score": score, "place": place, **names_of(row_of(embeddings, place))}
            for score, place in zip(scores, places, strict=True)
            if place >= 0 and place not in own
        ]
        queries.append({"query": name, "found": best[: args.k]})
    about = {"data": str(args.folder), "items": len(embeddings), "model": embeddings.about.get("model", args.model)}
    return {**about, "where": args.where, "kind": args.kind, "index": index or "exact", "queries": queries}


def _table(results: dict[str, Any]) -> str:
    """Return the text table of ``clipfast search``: the items that were found for each query."""
    from ..io.text import align, printable, without_empty

    parts = []
    if results["index"] != "exact":
        index = results["index"]
        parts.append(
            f"index {index['factory']} with {index['probes']} of {index['lists']} lists: recall@{index['k']} "
            f"{index['recall']:.1%} of exact search, by {index['sample']} queries"
        )
    for query in results["queries"]:
        rows = [["score", "caption", "path"]]
        for one in query["found"]:
            rows.append([f"{one['score']:.4f}", one.get("caption", ""), one.get("image_path", one.get("key", ""))])
        parts.append(f"{printable(query['query'])}\n{align(without_empty(rows), right=(0,))}")
    return "\n\n".join(parts)
