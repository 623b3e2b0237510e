"""``clipfast eval compositional``: whether a model tells a right caption from a wrong one of almost the same words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import COUNT, add_output
from ..eval_arguments import (
    Session,
    add_model_arguments,
    add_reading_arguments,
    add_run_arguments,
    encoded,
    labelled_set,
    result_of,
    session,
    write_results,
)

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ...evaluate.compositional_scores import Case, Judged
    from ...evaluate.compositional_sets import CaseSet
    from ...evaluate.features import LabelledFeatures

FORMATS = ("auto", "aro", "sugarcrepe", "winoground", "order", "pairs", "shapes")
NAMED = 20  # a message names at most this many cases that were left out
ATTRIBUTES, FEWEST = "attributes", 25  # ARO takes the mean over the attributes with at least FEWEST cases
EPILOG = """\
examples:
  clipfast eval compositional --model local-dir:runs/shapes --data shapes --table --html shapes.html
  clipfast eval compositional --model ViT-B-32 --pretrained openai --data aro/visual_genome_relation.json
  clipfast eval compositional --model ViT-B-32 --pretrained openai --data sugar-crepe/data --images coco/val2017"""


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval compositional``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "compositional",
        help="right captions against wrong ones of almost the same words",
        description="Compute how often an image is closer to its caption than to a wrong one: ARO, SugarCrepe, "
        "Winoground, your own pairs, captions with their words in another order, or generated scenes of shapes. "
        "torchrun shares the work between processes.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    data = (
        "'shapes' (or shapes:N, shapes:N@SEED) are generated scenes; others are a file of ARO, SugarCrepe or "
        "Winoground, a folder with such files, or pairs as --train-data of clipfast train takes them, with a "
        "negative_caption in their json or columns"
    )
    add("--data", required=True, help=data)
    add("--format", default="auto", choices=FORMATS, help="format of --data (default: by the keys of its records)")
    beside = "images or val2017 beside the file, or else its own folder"
    add("--images", metavar="FOLDER", help=f"folder of the images that a file names (default: {beside})")
    add_reading_arguments(parser)
    add_run_arguments(parser)
    page = "write a page with the figures, and pictures with their captions and scores, to this file"
    add_output(parser, "--html", help=page)
    add("--per-group", type=COUNT, default=6, help="pictures of each group on the page (default: 6)")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval compositional``: evaluate the checkpoint, print the results, and return the exit code."""
    images = labelled_set(args)
    from ...evaluate.compositional_sets import format_of, open_cases

    with session(args) as at:
        form = args.format if args.format != "auto" else at.world.on_main(lambda: format_of(images))
        with at.world.local_first():
            case_set = open_cases(images, form, args.images)
        found = encoded(args, at, case_set.images)
        judged, left_out = _judged(at, case_set, found)
        if not at.world.is_main:
            return 0
    results = _results(args, case_set, judged, left_out, len(found.left_out))
    if args.html:
        from ...evaluate.pages import compositional_page
        from ...io.page import write_page

        body = compositional_page(results, case_set.images, judged, args.per_group)
        write_page(args.html, "clipfast eval compositional", body, style="figure { width: 9rem }")
    if args.plot:
        from ...evaluate.plots import compositional_plot

        compositional_plot(results, args.plot)
    write_results(args, results, _table)
    return 0


def _judged(at: Session, case_set: CaseSet, found: LabelledFeatures) -> tuple[list[Judged], int]:
    """Score the cases of ``clipfast eval compositional``; return them, and how many lack a usable image."""
    from ...evaluate.compositional_scores import judge

    rows = {number: row for row, number in enumerate(found.numbers)}

    def usable() -> tuple[list[Case], list[Case]]:
        """Return the cases of ``clipfast eval compositional`` whose images can all be used, and the other cases."""
        usable: list[Case] = []
        left_out: list[Case] = []
        for case in case_set.cases(found):
            (usable if all(image in rows for image in case.images) else left_out).append(case)
        if not usable:
            raise ValueError(f"not one case can be made of {case_set.images.data}")
        return usable, left_out

    cases, left_out = at.world.on_main(usable)
    texts = list(dict.fromkeys(text for case in cases for text in case.captions))
    captions = at.encoder.texts(texts, at.store, at.world)
    if not at.world.is_main:
        return [], 0
    if left_out:
        named = ", ".join(case.name for case in left_out[:NAMED]) + ", ..." * (len(left_out) > NAMED)
        print(f"clipfast eval: left out {len(left_out)} cases whose images cannot be used: {named}", file=sys.stderr)
    numbers = {text: number for number, text in enumerate(texts)}
    return judge(cases, found.features.to(captions.device), rows, numbers, captions), len(left_out)


def _results(
    args: argparse.Namespace, case_set: CaseSet, judged: Sequence[Judged], left_out: int, skipped: int
) -> dict[str, Any]:
    """Return the results of ``clipfast eval compositional`` as plain values."""
    from ...evaluate.compositional_scores import MEAN, by_group, by_wrong, figures, mean_of_groups

    overall = figures(judged)
    metrics, intervals, chance = (overall[name] for name in ("metrics", "intervals", "chance"))
    divisions = {name: found for name in case_set.divisions if (found := by_group(judged, name))}
    if wrong := by_wrong(judged):
        divisions["order of words"] = wrong
    elif divisions:
        first = next(iter(divisions))
        mean = mean_of_groups(divisions[first], FEWEST if first == ATTRIBUTES else 1)
        if mean is not None:
            metrics[MEAN], intervals[MEAN], chance[MEAN] = *mean, chance["acc"]
    return result_of(
        args, "image_caption_selection", metrics, intervals=intervals, chance=chance, data=args.data,
        format=case_set.form, cases=len(judged), left_out_cases=left_out, skipped_images=skipped, groups=divisions,
    )  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval compositional`` as text: the figures of each group beside chance."""
    from ...evaluate.intervals import percent
    from ...evaluate.pages import compositional_rows
    from ...io.text import align

    text = f"{results['format']}: {results['cases']:,} cases; 95% intervals in brackets\n\n"
    text += align(compositional_rows(results), right=(1,))
    if "mean_acc" in results["metrics"]:
        division = next(iter(results["groups"]))
        mean = percent(results["metrics"]["mean_acc"], results["intervals"]["mean_acc"])
        text += f"\n\nmean acc of the groups of {division}: {mean}"
    return text
