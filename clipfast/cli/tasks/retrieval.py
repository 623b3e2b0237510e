"""``clipfast eval retrieval``: images by caption and captions by image, with any number of captions for each image."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import COUNT
from ..eval_arguments import (
    add_data_arguments,
    add_model_arguments,
    add_run_arguments,
    encoded,
    labelled_set,
    result_of,
    session,
    write_results,
)

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from torch import Tensor

    from ...evaluate.features import LabelledFeatures

DIRECTIONS = ("image_retrieval", "text_retrieval")


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval retrieval``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "retrieval",
        help="recall@k of images by caption and of captions by image",
        description="Compute recall@k of images by caption and of captions by image, on pairs as --train-data of "
        "clipfast train takes them. An image has one caption or several: a list in its json or column. torchrun shares "
        "the work between processes.",
        epilog="Example: clipfast eval retrieval --model local-dir:runs/demo --data bundled:emoji/fluent",
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    k = "the numbers of results in which a right one is looked for (default: 1 5 10)"
    parser.add_argument("--k", nargs="+", type=COUNT, default=[1, 5, 10], help=k)
    add_run_arguments(parser)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval retrieval``: evaluate the checkpoint, print the results, and return the exit code."""
    images = labelled_set(args)

    with session(args) as at:
        found = encoded(args, at, images)
        captions = [text for texts in found.captions for text in texts]
        texts = at.encoder.texts(captions, at.store, at.world)
        if not at.world.is_main:
            return 0
        results = _results(args, found, captions, found.features.to(at.encoder.device), texts)
    if args.plot:
        from ...evaluate.plots import retrieval_plot

        retrieval_plot(results, args.plot)
    write_results(args, results, _table)
    return 0


def _results(
    args: argparse.Namespace, found: "LabelledFeatures", captions: Sequence[str], features: "Tensor", texts: "Tensor"
) -> dict[str, Any]:
    """Compute recall from the features of images and captions; return the results of ``clipfast eval retrieval``."""
    from ...evaluate.retrieval import caption_recalls

    counts = [len(texts) for texts in found.captions]
    metrics, intervals = caption_recalls(features, texts, counts, args.k)
    repeated = {"captions": len(captions) - len(set(captions)), "images": len(counts) - len(set(found.twins))}
    if any(repeated.values()):
        print(
            f"clipfast eval: {repeated['captions']} captions and {repeated['images']} images are there before: each is "
            "right for its own pair only, and a tie counts as wrong",
            file=sys.stderr,
        )
    return result_of(
        args, "zeroshot_retrieval", metrics, intervals=intervals, data=args.data, images=len(counts),
        captions=len(captions), skipped_images=len(found.left_out), repeated=repeated,
    )  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval retrieval`` as text: recall by k, in both directions."""
    from ...evaluate.intervals import percent
    from ...io.text import align

    rows = [["k", *(f"{direction}_recall@k" for direction in DIRECTIONS)]]
    for k in sorted({int(key.rpartition("@")[2]) for key in results["metrics"]}):
        names = [f"{direction}_recall@{k}" for direction in DIRECTIONS]
        rows.append([str(k), *(percent(results["metrics"][name], results["intervals"][name]) for name in names)])
    counts = f"{results['images']:,} images, {results['captions']:,} captions"
    return f"{counts}; 95% intervals in brackets\n\n{align(rows, right=(0,))}"
