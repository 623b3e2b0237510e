"""``clipfast filter``: choose the pairs of an embedded folder whose image and text fit together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluate.results import report_left_out
from .arguments import DRAWN, add_output
from .eval_arguments import write_results
from .search_arguments import add_folder_argument, add_result_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ..search.embeddings import Embeddings
    from ..search.gallery import Item
    from .search_arguments import Pictures

SHOWN = 24  # the page shows at most this many pictures in each section
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # the results have these quantiles of the scores


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast filter``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "filter",
        description="Score each pair by the cosine of its image and its text, and keep those with a least score, or "
        "the share with the highest scores (0.3 in DataComp's baseline).",
        epilog="Example: clipfast filter embedded --top 0.3 --write-shards kept --html around.html",
    )
    add = parser.add_argument
    add_folder_argument(parser)
    add("--min-score", type=float, help="keep pairs with at least this score, such as 0.28")
    add("--top", type=float, help="keep this share of the pairs, those of the highest scores")
    add_output(parser, "--write-keys", help="write the keys of the pairs that are kept, one a line")
    shards = "copy the pairs that are kept to tar shards of 10,000 in this folder, which must not exist"
    add_output(parser, "--write-shards", is_folder=True, metavar="FOLDER", help=shards)
    plot = "draw the distribution of scores, in the format that the name ends in, such as .png, .svg or .pdf"
    add_output(parser, "--plot", ends=DRAWN, help=plot)
    add_result_arguments(parser, "pairs of the highest and lowest scores, and around the threshold")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast filter``: score and filter the pairs, print how many are kept, and return the exit code."""
    _check(args)
    from ..search.embeddings import Embeddings
    from ..search.similar import check_features, cosines
    from .search_arguments import Pictures, features_of, write_gallery, write_keys

    embeddings = Embeddings.open(args.folder)
    images, texts = (features_of(embeddings, kind, "filter") for kind in ("image", "text"))
    check_features(images)
    check_features(texts)
    scores = cosines(images, texts)
    kept = scores >= args.min_score if args.top is None else best_share(scores, args.top)
    pictures = Pictures(embeddings) if args.html or args.write_shards else None
    results = _results(args, scores, kept)
    if args.write_keys:
        write_keys(args.write_keys, embeddings, kept.nonzero().squeeze(1).tolist())
    if pictures is not None and args.write_shards:
        _write_shards(args.write_shards, pictures, embeddings, kept)
    if args.plot:
        _plot(args.plot, scores, results)
    if pictures is not None and args.html:
        title = f"Image-text scores in {args.folder}"
        write_gallery(args.html, title, _items(pictures, scores, kept), _table(results))
    write_results(args, results, _table, shown=args.html)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the options of ``clipfast filter`` before anything is read.

    Raises:
        ValueError: no criterion or more than one is given, or a value is out of range.
    """
    if (args.min_score is None) == (args.top is None):
        raise ValueError("give either --min-score or --top")
    if args.top is not None and not 0 < args.top <= 1:
        raise ValueError(f"--top must be more than 0 and at most 1, got {args.top:g}")
    if args.min_score is not None and not -1 <= args.min_score <= 1:
        raise ValueError(f"--min-score must be from -1 to 1, got {args.min_score:g}")


def best_share(scores: Tensor, top: float) -> Tensor:
    """Return a mask [N] of the pairs with the highest scores, for ``clipfast filter``.

    ``top`` is their share of all N pairs; their number is rounded up. Of equal scores, the first pairs are taken.
    """
    import torch

    count = math.ceil(round(top * len(scores), 6))  # rounded first, as 0.07 * 100 is a little more than 7 in float64
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def _results(args: argparse.Namespace, scores: Tensor, kept: Tensor) -> dict[str, Any]:
    """Return the results of ``clipfast filter`` as plain values."""
    import numpy as np

    values = np.quantile(scores.numpy(), SHARES)  # torch.quantile takes at most 16 million values
    least = float(scores[kept].min()) if kept.any() else None
    return {
        "data": str(args.folder), "pairs": len(scores), "kept": int(kept.sum()), "min_score": args.min_score,
        "top": args.top, "least_kept": least, "mean": float(scores.mean()),
        "quantiles": {f"{share:g}": float(value) for share, value in zip(SHARES, values, strict=True)},
    }  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Return the results of ``clipfast filter`` as text."""
    share = results["kept"] / results["pairs"]
    least = "" if results["least_kept"] is None else f", with scores from {results['least_kept']:.4f} on"
    values = ", ".join(f"{float(key):.0%} {value:.4f}" for key, value in results["quantiles"].items())
    return (
        f"{results['kept']:,} of {results['pairs']:,} pairs ({share:.1%}) are kept{least}; mean {results['mean']:.4f}, "
        f"quantiles {values}"
    )


def _items(pictures: Pictures, scores: Tensor, kept: Tensor) -> Iterator[Item]:
    """Yield pairs for the page of ``clipfast filter``: the best, those just above and below the limit, the worst."""
    order = scores.sort(descending=True, stable=True).indices
    inside, outside = order[kept[order]].tolist(), order[~kept[order]].tolist()
    parts = {
        "highest scores": inside[:SHOWN],
        "just kept": inside[SHOWN:][-SHOWN:],
        "just left out": outside[:SHOWN],
        "lowest scores": outside[SHOWN:][-SHOWN:],
    }
    for name, places in parts.items():
        for place in places:
            yield pictures.item(place, float(scores[place]), name)


def _write_shards(folder: Path, pictures: Pictures, embeddings: Embeddings, kept: Tensor) -> None:
    """Copy the kept pairs of ``clipfast filter`` to tar shards, and print samples that can no longer be read."""
    from ..search.source_samples import write_shards

    if pictures.samples is None:
        raise ValueError("--write-shards needs the data that were embedded, and the embeddings do not name them")
    numbers = embeddings.metadata.column("number").to_pylist()
    lost = write_shards(folder, pictures.samples, [numbers[place] for place in kept.nonzero().squeeze(1).tolist()])
    report_left_out(lost, "filter", most=len(lost))


def _plot(path: Path, scores: Tensor, results: dict[str, Any]) -> None:
    """Draw the histogram of scores of ``clipfast filter``, with a line at the lowest kept score."""
    from matplotlib.figure import Figure

    from ..io.files import save_figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.hist(scores.numpy(), bins=100, color="tab:blue")
    axis.set(xlabel="cosine of image and text", ylabel="pairs", title=f"{results['data']}: {results['pairs']:,} pairs")
    if results["least_kept"] is not None:
        label = f"{results['kept']:,} are kept from {results['least_kept']:.4f} on"
        axis.axvline(results["least_kept"], color="tab:orange", label=label)
        axis.legend()
    save_figure(figure, path)
