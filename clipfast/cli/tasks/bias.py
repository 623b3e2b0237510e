"""``clipfast eval bias``: how accuracy, labels and search results differ between groups of images."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import COUNT
from ..eval_arguments import (
    add_data_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_run_arguments,
    encoded,
    labelled_set,
    read_classnames,
    read_templates,
    read_texts,
    result_of,
    session,
    write_results,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...evaluate.bias_scores import Assigned, Grouping
    from ...evaluate.features import LabelledFeatures

SHOWN = 10  # a table lists at most this many labels, or queries, those with the largest differences
EPILOG = """\
example:
  clipfast eval bias --model ViT-B-32 --pretrained laion2b_s34b_b79k --data fairface_label_val.csv \\
      --image-key file --text-key gender --group-by race age race+gender --added-labels labels.tsv \\
      --threshold 0.005 0.04 --queries queries.txt --table
  where labels.tsv has lines such as "non-human<TAB>animal", and queries.txt texts such as "a photo of a doctor\""""


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval bias``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "bias",
        help="how accuracy, labels and search results differ between groups of images",
        description="Compute for groups of images how often the class is right, how often they get labels of other "
        "categories, and how uneven they are among the first results of texts. Labels, groups and texts are yours: "
        "they decide what is found.",
        epilog=EPILOG,
        conflict_handler="resolve",
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add_data_arguments(parser)
    group = "columns or json keys that name the groups of an image; KEY+KEY crosses them"
    add("--group-by", nargs="+", required=True, metavar="KEY", help=group)
    smallest = "images that a group needs to be compared with others (default: 30)"
    add("--min-count", type=COUNT, default=30, help=smallest)
    added = "labels beside the classes: a file with lines of a category, a tab and a label"
    add("--added-labels", type=Path, help=added)
    threshold = "also count the images whose probability of a label is above this, such as 0.005 0.04"
    add("--threshold", type=float, nargs="+", default=[], help=threshold)
    add("--queries", type=Path, help="texts that images are searched by, one in each line")
    add("--k", type=COUNT, nargs="+", default=[100], help="first results of --queries (default: 100)")
    add_prompt_arguments(parser)
    add_run_arguments(parser)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval bias``: compare the groups, print the results, and return the exit code."""
    wrong = [threshold for threshold in args.threshold if not 0 < threshold < 1]
    if wrong:
        raise ValueError(f"--threshold must be between 0 and 1, got {wrong[0]:g}")
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    queries = () if args.queries is None else read_texts(args.queries)
    from ...evaluate.bias_scores import assign, groupings, keys_of, read_added_labels, retrieval_skew
    from ...evaluate.evaluate import names_of
    from ...evaluate.labelled import CROSSED_KEYS

    images = dataclasses.replace(labelled_set(args), group_by=CROSSED_KEYS.join(keys_of(args.group_by)))
    with session(args) as at:
        found = encoded(args, at, images)

        def prepare() -> tuple[list[str], dict[str, list[str]], list[Grouping]]:
            """Return class names, added labels by category, and the groups of ``clipfast eval bias``."""
            names = names_of(found.classnames, classnames)
            added = {} if args.added_labels is None else read_added_labels(args.added_labels, names)
            return names, added, groupings(found.groups, args.group_by, args.min_count)

        names, added, groups = at.world.on_main(prepare)
        labels = [*names, *(label for some in added.values() for label in some)]
        weights = at.encoder.classifier(labels, templates, at.store, at.world)
        texts = at.encoder.texts(queries, at.store, at.world)
        if not at.world.is_main:
            return 0
        features, scale = found.features.to(at.encoder.device), at.encoder.model.logit_scale.exp().item()
        numbers = {name: number for number, name in enumerate(found.classnames)}
        classes = [numbers[label] for label in found.labels]
        assigned = assign(features, weights, scale, classes, len(names), groups, args.threshold)
        by_key = {}
        for number, one in enumerate(groups):
            by_key[one.key] = _of_grouping(number, one, args.threshold, labels, len(names), added, assigned)
            if queries:
                by_key[one.key]["retrieval"] = retrieval_skew(queries, texts, features, one, args.k)
    results = _results(args, found, added, scale, assigned.right, by_key)
    if args.plot:
        from ...evaluate.plots import bias_plot

        bias_plot(results, args.plot)
    write_results(args, results, _table)
    return 0


def _of_grouping(
    number: int, one: Grouping, thresholds: list[float], labels: list[str], classes: int, added: dict[str, list[str]],
    assigned: Assigned,
) -> dict[str, Any]:  # fmt: skip
    """Return the results of ``clipfast eval bias`` for one ``--group-by``: accuracy, categories, labels by threshold.

    Args:
        number: the index of the grouping in ``assigned.above``.
        one: the grouping.
        thresholds: the values of ``--threshold``.
        labels: all labels, the classes first.
        classes: the number of classes.
        added: the added labels of each category.
        assigned: the labels that the model gives to the images.
    """
    from ...evaluate.bias_scores import compare

    counts, categories, start = dict(zip(one.names, one.counts.tolist(), strict=True)), {}, classes
    for name, some in added.items():
        marks = (assigned.best >= start) & (assigned.best < start + len(some))
        categories[name] = compare(one.hits(marks), one)
        start += len(some)
    figures: dict[str, Any] = {
        "images": counts,
        "not_compared": [name for name, count in counts.items() if count < one.min_count],
        "without_group": int((one.members < 0).sum()),
        "acc1": compare(one.hits(assigned.right), one),
        "categories": categories,
    }
    for at, above in zip(thresholds, assigned.above, strict=True):
        compared = {label: compare(hits, one) for label, hits in zip(labels, above[number].T, strict=True)}
        figures.setdefault("thresholds", []).append({"threshold": at, "labels": compared})
    return figures


def _results(
    args: argparse.Namespace, found: LabelledFeatures, added: dict[str, list[str]], scale: float, right: Tensor,
    by_key: dict[str, dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Return the results of ``clipfast eval bias`` as plain values."""
    from ...evaluate.intervals import wilson

    metrics = {"acc1": right.double().mean().item()}
    for key, figures in by_key.items():
        for name, compared in {"acc1": figures["acc1"], **figures["categories"]}.items():
            metrics[f"{name}_gap_{key}"] = compared["gap"]
        for row in figures.get("retrieval", []):
            metrics[f"max_skew@{row['k']}_{key}"] = row["mean_max_skew"]
    return result_of(
        args, "bias", metrics, intervals={"acc1": wilson(int(right.sum()), len(right))}, data=args.data,
        templates=args.templates, images=len(right), skipped_images=len(found.left_out), classes=len(found.classnames),
        added_labels=added, logit_scale=scale, min_count=args.min_count, by_key=by_key,
    )  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval bias`` as text: a table of groups for each key, then labels and queries."""
    parts = [f"{results['images']:,} images; 95% intervals in brackets"]
    for key, figures in results["by_key"].items():
        parts.append(_groups_table(key, figures))
        for found in figures.get("thresholds", []):
            parts.append(_labels_table(key, found))
        for found in figures.get("retrieval", []):
            parts.append(_queries_table(key, found))
    parts.append(
        "gap: between the highest and the lowest group; ratio: the lowest share divided by the highest; p: of a\n"
        "permutation test that the share does not depend on the group. Of twenty p-values one is below 0.05 by chance."
    )
    return "\n\n".join(parts)


def _groups_table(key: str, figures: dict[str, Any]) -> str:
    """Return the text table of ``clipfast eval bias`` with accuracy and shares of categories for each group."""
    from ...evaluate.intervals import percent, shown
    from ...io.text import align

    columns = {"acc1": figures["acc1"], **figures["categories"]}
    rows = [[key, "images", *columns]]
    for name, count in figures["images"].items():
        shares = [
            percent(found["groups"][name]["share"], found["groups"][name]["interval"]) for found in columns.values()
        ]
        rows.append([name + (" (not compared)" if name in figures["not_compared"] else ""), f"{count:,}", *shares])
    rows.append(["gap", "", *(f"{100 * found['gap']:.1f} points" for found in columns.values())])
    rows.append(["ratio", "", *(shown(found["ratio"], ".2g") for found in columns.values())])
    rows.append(["p", "", *(shown(found["p_value"], ".2g") for found in columns.values())])
    return align(rows, right=(1,))


def _labels_table(key: str, found: dict[str, Any]) -> str:
    """Return the text table of ``clipfast eval bias`` with the labels of the largest gaps between groups."""
    from ...evaluate.intervals import shown
    from ...io.text import align

    rows = [[f"probability above {found['threshold']:g}, by {key}", "lowest", "highest", "gap", "p"]]
    largest = sorted(found["labels"].items(), key=lambda item: -item[1]["gap"])[:SHOWN]
    for label, figures in largest:
        ends = [f"{figures['groups'][figures[end]]['share']:.1%} {figures[end]}" for end in ("lowest", "highest")]
        rows.append([label, *ends, f"{100 * figures['gap']:.1f}", shown(figures["p_value"], ".2g")])
    return align(rows, right=(3, 4))


def _queries_table(key: str, found: dict[str, Any]) -> str:
    """Return the text table of ``clipfast eval bias`` with the queries whose results have the largest skew."""
    from ...evaluate.intervals import shown
    from ...io.text import align

    rows = [[f"first {found['k']} images, by {key}", "max skew", "of", "NDKL", "p"]]
    largest = sorted(found["queries"], key=lambda row: -row["max_skew"])[:SHOWN]
    for row in largest:
        skew = f"{row['max_skew']:.2f}"
        rows.append([row["query"], skew, row["max_skew_group"], f"{row['ndkl']:.3f}", shown(row["p_value"], ".2g")])
    rows.append(["mean of all queries", f"{found['mean_max_skew']:.2f}", "", f"{found['mean_ndkl']:.3f}", ""])
    rows.append(["mean by chance", f"{found['max_skew_by_chance']:.2f}", "", "", ""])
    return align(rows, right=(1, 3, 4))
