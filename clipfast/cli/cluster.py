"""``clipfast cluster``: divide the pictures or the texts of an embedded folder into clusters of similar ones."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import COUNT, OR_ZERO, SEED, add_output
from .eval_arguments import read_texts, write_results
from .search_arguments import add_encoder_arguments, add_folder_argument, add_result_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ..search.clusters import Clusters
    from ..search.embeddings import Embeddings
    from ..search.gallery import Item
    from .search_arguments import Pictures

EXAMPLES = 12  # number of pictures of each cluster on the page
SHOWN = 60  # the table cuts the name of a cluster to this many characters


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast cluster``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "cluster",
        description="Divide the items of an embedded folder into clusters by spherical k-means. A cluster is called by "
        "the text of DIR that is most like its centre, by the caption of its nearest item where texts are not "
        "embedded, by the most frequent value of --label-by, or by the line of --names that is most like its centre.",
        epilog="Example: clipfast cluster embedded --k 50 --html clusters.html",
    )
    add = parser.add_argument
    add_folder_argument(parser)
    add("--k", type=COUNT, default=50, help="how many clusters (default: 50)")
    add("--kind", choices=("image", "text"), default="image", help="cluster images or texts (default: image)")
    add("--seed", type=SEED, default=0, help="seed of the first centres (default: 0)")
    add("--rounds", type=OR_ZERO, default=100, help="most rounds of k-means (default: 100)")
    add("--label-by", metavar="COLUMN", help="call each cluster by its most frequent value of this column")
    named = "call each cluster by the line of this text file that the model finds most like its centre"
    add("--names", type=Path, help=named)
    written = "write the cluster of each item as a Parquet file (.parquet)"
    add_output(parser, "--output", "--write", dest="write", ends=[".parquet"], help=written)
    add_encoder_arguments(parser)
    add_result_arguments(parser, "the pictures that are nearest to the centre of each cluster")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast cluster``: cluster, show the clusters, and return the exit code."""
    from ..distributed.world import resolve_device
    from ..search.clusters import spherical_k_means
    from ..search.embeddings import Embeddings
    from .search_arguments import Pictures, encoder_of, features_of, write_gallery

    embeddings = Embeddings.open(args.folder)
    features = features_of(embeddings, args.kind, "cluster")
    if args.label_by is not None and args.label_by not in embeddings.metadata.column_names:
        there = ", ".join(embeddings.metadata.column_names)
        raise ValueError(f"--label-by: there is no column {args.label_by!r}; there are: {there}")
    if not 1 <= args.k <= len(features):
        raise ValueError(f"--k must be from 1 to the number of items, {len(features):,}, got {args.k}")
    if args.names is not None and args.label_by is not None:
        raise ValueError("give either --label-by or --names")
    names = None if args.names is None else read_texts(args.names, "--names")
    pictures = Pictures(embeddings) if args.html else None
    texts = None if names is None else encoder_of(args, embeddings).texts(list(names))
    device = resolve_device(args.device)
    found = spherical_k_means(features, args.k, seed=args.seed, rounds=args.rounds, device=device)
    called = _names(embeddings, found, args.label_by) if texts is None else _nearest(found, texts, names or ())
    results = _results(args, embeddings, found, called)
    if args.write:
        _write(args.write, embeddings, found)
    if pictures is not None:
        about = (
            f"{len(features):,} items in {args.k} clusters, the largest first, and of each the items nearest to its "
            "centre. Scores: cosine with the centre."
        )
        write_gallery(args.html, f"Clusters of {args.folder}", _items(pictures, found, results["clusters"]), about)
    write_results(args, results, _table, shown=args.html)
    return 0


def _nearest(found: Clusters, texts: Tensor, names: Sequence[str]) -> list[str]:
    """Return a name for each cluster of ``clipfast cluster``: the line of ``--names`` that is nearest to its centre."""
    from ..kernels import top_k

    return [names[place] for place in top_k(found.centres, texts.float().cpu(), 1)[1][:, 0].tolist()]


def _names(embeddings: Embeddings, found: Clusters, label_by: str | None) -> list[str]:
    """Return a name for each cluster of ``clipfast cluster`` from the metadata; "" if there is none.

    A cluster's name is the most frequent value of the metadata column ``label_by``. Without ``label_by``, it is the
    caption whose text features are nearest to the centre, or, without text features, the caption of the nearest item.
    """
    from ..kernels import top_k

    k = len(found.centres)
    if label_by is not None:
        labels = embeddings.metadata.column(label_by).to_pylist()
        counts: list[Counter[str]] = [Counter() for _ in range(k)]
        for group, label in zip(found.groups.tolist(), labels, strict=True):
            if label is not None:
                counts[group][str(label)] += 1
        return [next((label for label, _ in count.most_common(1)), "") for count in counts]
    if "caption" not in embeddings.metadata.column_names:
        return [""] * k
    texts = embeddings.text_features
    if texts is not None:
        places = top_k(found.centres.to(texts.dtype), texts, 1)[1][:, 0].tolist()
    else:
        places = [next(iter(found.nearest(group, 1)), None) for group in range(k)]
    captions = embeddings.metadata.column("caption")
    return ["" if place is None else captions[place].as_py() or "" for place in places]


def _results(args: argparse.Namespace, embeddings: Embeddings, found: Clusters, names: list[str]) -> dict[str, Any]:
    """Return the results of ``clipfast cluster`` as plain values."""
    from ..search.embeddings import names_of, row_of

    clusters = []
    for group, (name, size) in enumerate(zip(names, found.sizes.tolist(), strict=True)):
        members = found.similarity[found.groups == group]
        mean = float(members.double().mean()) if size else None
        nearest = [names_of(row_of(embeddings, place)) for place in found.nearest(group, 3)]
        clusters.append({"cluster": group, "name": name, "size": size, "similarity": mean, "nearest": nearest})
    return {
        "data": str(args.folder), "items": len(embeddings), "k": args.k, "kind": args.kind, "seed": args.seed,
        "rounds": found.rounds, "is_settled": found.is_settled,
        "similarity": float(found.similarity.double().mean()), "clusters": clusters,
    }  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Return the text table of ``clipfast cluster``: a line about all clusters, then a row for each."""
    from ..io.text import align, without_empty

    rows = [["cluster", "size", "similarity", "name"]]
    for one in results["clusters"]:
        mean = "-" if one["similarity"] is None else f"{one['similarity']:.4f}"
        rows.append([str(one["cluster"]), f"{one['size']:,}", mean, one["name"][:SHOWN]])
    end = "" if results["is_settled"] else ", which is the most: --rounds allows more"
    return (
        f"{results['items']:,} items; mean cosine with the centres: {results['similarity']:.4f}; rounds: "
        f"{results['rounds']}{end}\n\n{align(without_empty(rows), right=(0, 1, 2))}"
    )


def _items(pictures: Pictures, found: Clusters, clusters: list[dict[str, Any]]) -> Iterator[Item]:
    """Yield the pictures of each cluster that are nearest to its centre, for the page of ``clipfast cluster``."""
    for one in clusters:
        label = f": {one['name']}" if one["name"] else ""
        name = f"cluster {one['cluster']}{label} ({one['size']:,} in all)"
        for place in found.nearest(one["cluster"], EXAMPLES):
            yield pictures.item(place, float(found.similarity[place]), name)


def _write(path: Path, embeddings: Embeddings, found: Clusters) -> None:
    """Write number, key, cluster and similarity of each item to a Parquet file (``clipfast cluster --write``)."""
    import pyarrow
    from pyarrow import parquet

    from ..io.files import replace_file

    there = embeddings.metadata
    columns = {name: there.column(name) for name in ("number", "key") if name in there.column_names}
    table = pyarrow.table({**columns, "cluster": found.groups.numpy(), "similarity": found.similarity.numpy()})
    replace_file(path, lambda temporary: parquet.write_table(table, temporary), table.nbytes)
