"""``clipfast eval overlap``: near duplicates between training and test data, and accuracy with and without them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...io.text import DELIMITERS, align, write_rows
from ..arguments import COUNT, OR_ZERO, add_output
from ..eval_arguments import (
    add_data_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_run_arguments,
    encoded_by,
    labelled_set,
    read_classnames,
    read_templates,
    result_of,
    session,
    write_results,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...evaluate.features import LabelledFeatures
    from ...evaluate.labelled import LabelledSet
    from ...evaluate.overlap_pairs import Pairs

EPILOG = """\
example:
  clipfast eval overlap --model local-dir:runs/demo --train-data bundled:emoji/noto::bundled:emoji/twemoji \\
      --data bundled:emoji/fluent --by pixels --plant 500 --html pairs.html --table"""


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval overlap``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "overlap",
        help="near duplicates between training and test data, and accuracy with and without them",
        description="Find the training image that is most similar to each test image, and compute zero-shot accuracy "
        "on the test images that are near duplicates of a training image, and on the others.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--train-data", required=True, metavar="DATA", help="training data of the model, named as --data is")
    add_data_arguments(parser)
    by = "compare features of the model, or thumbnails of 16 x 16 pixels (default: model)"
    add("--by", choices=("model", "pixels"), default="model", help=by)
    threshold = "similarity from which on a test image is a near duplicate (default: 0.95)"
    add("--threshold", type=float, default=0.95, help=threshold)
    plant = "also measure how many near duplicates are found: edit this many test images in seven ways (default: 0)"
    add("--plant", type=OR_ZERO, default=0, help=plant)
    add_prompt_arguments(parser)
    add_run_arguments(parser)
    add_output(parser, "--html", help="write a page with pairs of pictures, the most similar first")
    add("--pairs", type=COUNT, default=100, help="how many pairs --html shows (default: 100)")
    pairs = "write the most similar training image of each test image, the most similar pair first"
    add_output(parser, "--output", "--write", dest="write", ends=DELIMITERS, help=f"{pairs} (.csv or .tsv)")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval overlap``: compare the sets, print the results, and return the exit code."""
    if not -1 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be from -1 to 1, got {args.threshold:g}")
    if args.train_data == args.data:
        raise ValueError(f"--train-data and --data are both {args.data}: each image would be a duplicate of itself")
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    images = labelled_set(args)
    # Labels and groups of the training images are not used, and their data may lack the keys of the test data.
    known = dataclasses.replace(labelled_set(args, args.train_data), label_by=None, group_by=None)
    from ...evaluate.classification import classify
    from ...evaluate.encoder import PixelEncoder
    from ...evaluate.evaluate import names_of
    from ...evaluate.overlap_pairs import THRESHOLDS, pair, planted
    from ...io.progress import each

    with session(args) as at:
        detectors = [PixelEncoder(at.encoder.device)] if args.by == "pixels" else []
        found = encoded_by(args, at, [at.encoder, *detectors], images)
        test, compared, detector = found[0], found[-1], [at.encoder, *detectors][-1]
        (train,) = encoded_by(args, at, [detector], known)
        names = at.world.on_main(lambda: names_of(test.classnames, classnames))
        classifier = at.encoder.classifier(names, templates, at.store, at.world)
        if not at.world.is_main:
            return 0
        right = classify(test.features, test.labels, test.classnames, classifier.cpu()).right
        pairs = pair(compared, train, at.encoder.device, lambda blocks: each(blocks, "neighbours", "blocks"))
        thresholds = sorted({*THRESHOLDS, args.threshold})
        edits = planted(detector, images, compared, pairs, thresholds, args.plant, args.workers) if args.plant else []
    results = _results(args, test, train, pairs, right, thresholds, edits)
    if args.write:
        _write_pairs(args.write, images, known, test, train, pairs)
    if args.html:
        from ...evaluate.pages import overlap_page
        from ...io.page import write_page

        body = overlap_page(results, (images, test), (known, train), pairs, args.pairs)
        write_page(args.html, "clipfast eval overlap", body)
    if args.plot:
        from ...evaluate.plots import overlap_plot

        overlap_plot(results, pairs, args.plot)
    write_results(args, results, _table)
    return 0


def _results(
    args: argparse.Namespace, test: LabelledFeatures, train: LabelledFeatures, pairs: Pairs, right: Tensor,
    thresholds: list[float], edits: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Return the results of ``clipfast eval overlap`` as plain values."""
    from ...evaluate.overlap_pairs import LEVEL, contamination

    chosen = contamination(right, pairs.overlap(args.threshold))
    others = [(at, contamination(right, pairs.overlap(at))) for at in thresholds]
    return result_of(
        args, "train_test_overlap", chosen["metrics"], intervals=chosen["intervals"],
        levels={name: LEVEL if name == "acc1_overlap" else 0.95 for name in chosen["intervals"]}, data=args.data,
        train_data=args.train_data, by=args.by, threshold=args.threshold, templates=args.templates,
        classes=len(test.classnames),
        images={"train": len(train.labels), **chosen["images"], "same_pixels": int(pairs.same.sum())},
        skipped_images={"train": len(train.left_out), "test": len(test.left_out)},
        by_threshold=[{"threshold": at, "images": one["images"]["overlap"], **one["metrics"]} for at, one in others],
        **({"planted": edits} if edits else {}),
    )  # fmt: skip


def _write_pairs(
    path: Path, images: LabelledSet, known: LabelledSet, test: LabelledFeatures, train: LabelledFeatures, pairs: Pairs
) -> None:
    """Write the table of ``clipfast eval overlap``: each test image and its most similar training image, by name."""
    order = pairs.similarity.argsort(descending=True, stable=True).tolist()
    of_test = images.names(test.numbers[place] for place in order)
    of_train = known.names(train.numbers[pairs.places[place]] for place in order)
    rows: list[list[object]] = [["test_image", "train_image", "similarity", "same_pixels"]]
    for place, name, nearest in zip(order, of_test, of_train, strict=True):
        rows.append([name, nearest, f"{pairs.similarity[place]:.4f}", int(pairs.same[place])])
    write_rows(path, rows)


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval overlap`` as text: accuracy on all, near duplicates and others."""
    from ...evaluate.intervals import percent, shown
    from ...evaluate.overlap_pairs import LEVEL

    images, metrics, intervals = results["images"], results["metrics"], results["intervals"]
    rows: list[list[str]] = [["images", "count", "acc1"]]
    for name, key in (("all", "acc1"), ("overlap", "acc1_overlap"), ("clean", "acc1_clean")):
        rows.append([name, f"{images[name]:,}", percent(metrics[key], intervals[key])])
    by = {"model": "features of the model", "pixels": "pixels"}[results["by"]]
    parts = [
        f"{images['all']:,} test images, each with the most similar of {images['train']:,} training images by {by}; "
        f"overlap: {results['threshold']:g} or more; {images['same_pixels']:,} have equal pixels\n"
        f"95% intervals in brackets, {LEVEL:.1%} for overlap",
        align(rows, right=(1,)),
    ]
    header = ["threshold", "overlap", "share", "acc1_overlap", "acc1_clean", "all - clean", "p"]
    rows = [header]
    for row in results["by_threshold"]:
        shares = [shown(row[key], ".1%") for key in ("overlap", "acc1_overlap", "acc1_clean")]
        gain = "-" if row["acc1_all_minus_clean"] is None else f"{100 * row['acc1_all_minus_clean']:+.2f}"
        rows.append([f"{row['threshold']:g}", f"{row['images']:,}", *shares, gain, shown(row["p_value"], ".2g")])
    parts.append(align(rows, right=range(1, 7)))
    if "planted" in results:
        parts.append(_planted_table(results["planted"]))
    return "\n\n".join(parts)


def _planted_table(planted: list[dict[str, Any]]) -> str:
    """Return the text table of ``clipfast eval overlap --plant``: how many edited copies are found as duplicates."""
    from ...evaluate.intervals import shown

    by_edit: dict[str, list[str]] = {}
    for row in planted:
        cell = f"{row['recall']:.1%} ({shown(row['precision'], '.1%')})"
        by_edit.setdefault(row["edit"], [row["edit"]]).append(cell)
    thresholds = list(dict.fromkeys(f"{row['threshold']:g}" for row in planted))
    table = align([["recall (precision)", *thresholds], *by_edit.values()], right=range(1, 1 + len(thresholds)))
    return f"{planted[0]['images']:,} test images that were edited and planted, at each threshold\n{table}"
