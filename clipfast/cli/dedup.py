"""``clipfast dedup``: near duplicates among the pictures of an embedded folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.text import DELIMITERS, write_rows
from .arguments import add_output
from .eval_arguments import add_device_argument, write_results
from .search_arguments import add_folder_argument, add_result_arguments

if TYPE_CHECKING:
    from ..search.duplicates import Group
    from ..search.embeddings import Embeddings
    from ..search.gallery import Item
    from .search_arguments import Pictures

SHOWN = 200  # the page shows at most this many groups, the largest ones


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast dedup``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "dedup",
        description="Find all pairs of pictures whose features have a cosine of at least --threshold, and choose the "
        "pictures to keep. Pictures are visited in the order of --keep, and a picture is left out only if it is a near "
        "duplicate of a kept picture. Items with an equal column sha256 or md5 are duplicates too. Pictures that are "
        "linked by near duplicates are shown as a group. In a chain, whose ends are unlike, several are kept.",
        epilog="Example: clipfast dedup embedded --threshold 0.95 --keep largest --html duplicates.html",
    )
    add = parser.add_argument
    add_folder_argument(parser)
    threshold = "cosine from which on two pictures are near duplicates (default: 0.95)"
    add("--threshold", type=float, default=0.95, help=threshold)
    keep = "of near duplicates, keep the first, the largest by width x height, or the one that fits its caption best"
    add("--keep", choices=("first", "largest", "best"), default="first", help=f"{keep} (default: first)")
    add_output(
        parser, "--output", "--write", dest="write", ends=DELIMITERS, help="write the groups as a table (.csv or .tsv)"
    )
    add_output(parser, "--write-keys", help="write the keys of all items that are kept, one a line")
    add_device_argument(parser)
    add_result_arguments(parser, f"the groups, of which the {SHOWN} largest are shown")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast dedup``: find the duplicates, say how many there are, and return the exit code."""
    if not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be from -1 to 1, got {args.threshold:g}")
    from ..distributed.world import resolve_device
    from ..io.progress import each
    from ..search.duplicates import near_duplicates
    from ..search.embeddings import Embeddings
    from .search_arguments import Pictures, features_of, write_gallery, write_keys

    embeddings = Embeddings.open(args.folder)
    features_of(embeddings, "image", "dedup")
    pictures = Pictures(embeddings) if args.html else None
    groups = near_duplicates(
        embeddings, args.threshold, args.keep, device=resolve_device(args.device),
        progress=lambda blocks: each(blocks, "pairs", "blocks"),
    )  # fmt: skip
    dropped = {place for group in groups for place in group.dropped}
    results = {
        "data": str(args.folder), "items": len(embeddings), "threshold": args.threshold, "keep": args.keep,
        "groups": len(groups), "dropped": len(dropped), "kept": len(embeddings) - len(dropped),
        "largest_group": max(map(len, groups), default=0),
        "chains": sum(len(group.kept) > 1 for group in groups),
    }  # fmt: skip
    if args.write:
        _write(args.write, embeddings, groups)
    if args.write_keys:
        write_keys(args.write_keys, embeddings, (place for place in range(len(embeddings)) if place not in dropped))
    if pictures is not None:
        most = f" The {SHOWN} largest groups are shown." if len(groups) > SHOWN else ""
        about = f"{_sentence(results)}.{most} Scores: cosine with the kept picture that each is a duplicate of."
        write_gallery(args.html, f"Near duplicates in {args.folder}", _items(pictures, groups), about)
    write_results(args, results, _sentence, shown=args.html)
    return 0


def _sentence(results: dict[str, Any]) -> str:
    """Return the sentence in which ``clipfast dedup`` says how many pictures are kept."""
    return (
        f"Of {results['items']:,} pictures {results['kept']:,} are kept, and {results['dropped']:,} left out as near "
        f"duplicates of these (cosine of {results['threshold']:g} or more, or an equal digest). Of near duplicates, "
        f"the {results['keep']} one is kept. Groups: {results['groups']:,}, of which "
        f"{results['chains']:,} are chains; of a chain several are kept"
    )


def _items(pictures: Pictures, groups: list[Group]) -> Iterator[Item]:
    """Yield the largest groups for the page of ``clipfast dedup``: each kept picture, then its duplicates."""
    largest = sorted(groups, key=len, reverse=True)[:SHOWN]
    for number, group in enumerate(largest, 1):
        name = f"group {number}"
        for _, place, similarity, why in _rows(group):
            mark, said = ("kept", f"yes ({why})") if why else ("", "no")
            yield pictures.item(place, similarity, name, mark, kept=said)


def _rows(group: Group) -> list[tuple[int, int, float, str]]:
    """Return a row of ``clipfast dedup`` for each item of a group: kept item, item, cosine, why it is kept or ""."""
    rows = {kept: [(kept, kept, 1.0, why)] for kept, why in zip(group.kept, group.why, strict=True)}
    for place, of, similarity in zip(group.dropped, group.of, group.similarity, strict=True):
        rows[of].append((of, place, similarity, ""))
    return [row for some in rows.values() for row in some]


def _write(path: Path, embeddings: Embeddings, groups: list[Group]) -> None:
    """Write the table of ``clipfast dedup``, a line for each item of each group of duplicates."""
    from ..search.embeddings import NAMES, row_of

    lines: list[list[object]] = [["group", "kept", "similarity", "of", "why", "place", *NAMES]]
    for number, group in enumerate(groups, 1):
        for kept, place, similarity, why in _rows(group):
            row = row_of(embeddings, place)
            names = (row.get(name) for name in NAMES)
            lines.append([number, int(place == kept), f"{similarity:.6f}", kept, why, place, *names])
    write_rows(path, lines)
