"""``clipfast eval robustness``: zero-shot accuracy on shifted versions of a set, and effective robustness."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import DRAWN, SEED, add_output
from ..eval_arguments import (
    Session,
    add_data_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_run_arguments,
    encoded_by,
    labelled_set,
    named_models,
    read_classnames,
    read_templates,
    session,
    write_results,
)

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from torch import Tensor

    from ...evaluate.classification import Classified
    from ...evaluate.labelled import LabelledSet
    from ...evaluate.shifted_sets import ShiftedSet
    from ...evaluate.shifts import Shift

EPILOG = """\
examples:
  clipfast eval robustness --model local-dir:runs/demo --data bundled:emoji/noto --label-by label \\
      --shift fluent=bundled:emoji/fluent --synthetic --plot robustness.png --examples shifts.png
  clipfast eval robustness --model ViT-B-32 --pretrained laion2b_s34b_b79k --data imagenet/val --classnames imagenet \\
      --templates openai --shift imagenet-v2=v2 --shift imagenet-r=imagenet-r --baseline resnets.csv --table"""
NAMED = "imagenet-v2, -a, -r, -sketch and objectnet find their folders and classes"
# A pass over the base set computes several synthetic shifts at once, as long as transformed images and features of all
# shifts and models take at most this many bytes.
AT_ONCE = 1 << 30


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval robustness``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "robustness",
        help="zero-shot accuracy under natural and synthetic shifts",
        description="Compute zero-shot accuracy on a base set and on shifted versions of it, over the classes that "
        "both have, and effective robustness: accuracy under a shift beyond what baseline models let one expect.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add_model_arguments(parser, several=True)
    add_data_arguments(parser)
    shift = f"a shifted version of --data, named as --data is; may be given more than once; {NAMED}"
    add("--shift", action="append", default=[], metavar="NAME=DATA", help=shift)
    given = "JSON that maps labels of the shift to labels of --data (default: the same); an empty list leaves one out"
    add("--class-map", action="append", default=[], metavar="NAME=FILE", help=given)
    synthetic = (
        "also shift --data itself, in five strengths: blur, noise, jpeg, hue, rotation, occlusion (default: all)"
    )
    add("--synthetic", nargs="*", metavar="NAME", help=synthetic)
    add("--seed", type=SEED, default=0, help="seed of the synthetic shifts (default: 0)")
    points = "accuracies of baseline models: CSV or JSON with model, base, shift and set, or results of this task"
    add("--baseline", nargs="+", type=Path, default=[], help=points)
    models = "models to evaluate for the baseline, such as the checkpoints of a run, named as --model is"
    add("--baseline-model", nargs="+", default=[], metavar="MODEL", help=models)
    add_prompt_arguments(parser)
    add_run_arguments(parser)
    add_output(parser, "--examples", ends=DRAWN, help="also draw example images of the synthetic shifts")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval robustness``: evaluate the models, print the results, and return the exit code."""
    _check(args)
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    base, shifts, synthetic = labelled_set(args), _shifted_sets(args), _synthetic(args)
    from ...evaluate.class_subsets import ClassSubset, match_classes
    from ...evaluate.encoder import PreparedEncoder
    from ...evaluate.evaluate import names_of
    from .robustness_results import judge, lines_of, read_baselines, results_of, table

    baselines = read_baselines(args.baseline, [shift.name for shift in shifts], synthetic)
    # Too few baseline models are an error before images are encoded; --baseline-model adds models only after that.
    if not args.baseline_model:
        lines_of(baselines)
    named = named_models([*args.model, *args.baseline_model], args.pretrained)
    with session(args, named) as at:
        found = encoded_by(args, at, at.encoders, base)
        shifted, subsets = {}, {}
        for shift in shifts:
            change = shift.change
            prepared = [PreparedEncoder.of(one, change) for one in at.encoders] if change else at.encoders
            shifted[shift.name] = encoded_by(args, at, prepared, shift.images)

        def prepare() -> list[str]:
            """Find the shared classes for ``clipfast eval robustness``, and return the class names for prompts."""
            labels = found[0].classnames
            for shift in shifts:
                own = match_classes(labels, shifted[shift.name][0].classnames, shift.class_map, shift.name)
                subsets[shift.name] = ClassSubset.of(labels, own, shift.name)
            return names_of(labels, classnames)

        prompted = at.world.on_main(prepare)
        classifiers = [encoder.classifier(prompted, templates, at.store, at.world) for encoder in at.encoders]
        kept = 2 * sum(features.features.nbytes for features in found)  # features exist twice while blocks are joined
        drawn = _on_synthetic(args, at, classifiers, base, synthetic, kept)
        if not at.world.is_main:
            return 0
        models = []
        for number, classifier in enumerate(classifiers):
            own = {name: (subsets[name], features[number]) for name, features in shifted.items()}
            models.append(judge(named[number], found[number], own, drawn[number], classifier))
    sources = {shift.name: shift.images.data for shift in shifts}
    results = results_of(args, models[: len(args.model)], models[len(args.model) :], baselines, sources)
    if args.plot:
        from ...evaluate.robustness_plots import robustness_plot

        robustness_plot(results, args.plot)
    if args.examples:
        from ...evaluate.robustness_plots import examples_sheet

        examples_sheet(base, results, args.examples)
    write_results(args, results, table)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the arguments of ``clipfast eval robustness`` before anything is read.

    Raises:
        ValueError: there is no shift, or arguments do not fit together.
    """
    if not args.shift and args.synthetic is None:
        raise ValueError("--shift or --synthetic is needed: shifted images to compare with --data")
    if args.examples and args.synthetic is None:
        raise ValueError("--examples draws synthetic shifts: give --synthetic")
    if not args.model:
        raise ValueError("--model is needed: the model to evaluate")


def _pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    """Parse the values NAME=VALUE of an option of ``clipfast eval robustness`` to a dict.

    Raises:
        ValueError: a name is missing or occurs twice.
    """
    found: dict[str, str] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{flag} must be a name and a source, such as {flag} imagenet-r=FOLDER, got {word!r}")
        if name in found:
            raise ValueError(f"{flag} {name} is given twice")
        found[name] = value
    return found


def _shifted_sets(args: argparse.Namespace) -> list[ShiftedSet]:
    """Open the shifted sets of ``clipfast eval robustness --shift``, with their class maps."""
    from ...evaluate.class_subsets import read_class_map
    from ...evaluate.effective_robustness import AVERAGE, SYNTHETIC
    from ...evaluate.shifted_sets import shifted_set
    from ...evaluate.shifts import SHIFTS

    sources, maps = _pairs("--shift", args.shift), _pairs("--class-map", args.class_map)
    for name in sources:
        if name in (*SHIFTS, AVERAGE, SYNTHETIC):
            raise ValueError(f"--shift {name}: results have that name for something else, give another one")
    for name in maps:
        if name not in sources:
            raise ValueError(f"--class-map {name} has no --shift of that name")
    read = {name: read_class_map(Path(path)) for name, path in maps.items()}
    return [
        shifted_set(name, source, lambda data: labelled_set(args, data), read.get(name))
        for name, source in sources.items()
    ]


def _synthetic(args: argparse.Namespace) -> list[Shift]:
    """Return the synthetic shifts of ``clipfast eval robustness --synthetic``, each in five strengths."""
    from ...evaluate.shifts import SHIFTS, STRENGTHS, Shift

    if args.synthetic is None:
        return []
    names = SHIFTS if not args.synthetic or "all" in args.synthetic else tuple(dict.fromkeys(args.synthetic))
    return [Shift(name, strength, args.seed) for name in names for strength in STRENGTHS]


def _on_synthetic(
    args: argparse.Namespace, at: Session, classifiers: Sequence[Tensor], base: LabelledSet, shifts: Sequence[Shift],
    kept: int,
) -> list[dict[Shift, Classified]]:  # fmt: skip
    """Classify the base set of ``clipfast eval robustness`` under each synthetic shift by each model, on rank 0.

    Each pass over the base set computes as many shifts as ``AT_ONCE`` allows, and frees their features after the
    classification.

    Args:
        args, at: arguments and session of the task.
        classifiers: the classifier weights of each model for the classes of the base set.
        base: the base set.
        shifts: the synthetic changes of its images.
        kept: bytes that the features of all models under one shift take on rank 0.
    """
    from ...data import PREFETCH
    from ...evaluate.encoder import PreparedEncoder
    from .robustness_results import all_classes

    distinct = {encoder.transform: encoder for encoder in at.encoders}
    size = sum(encoder.blank.nbytes for encoder in distinct.values())
    of_block = size * args.batch_size * max(1, PREFETCH * args.workers)
    count = at.world.on_main(lambda: max(1, AT_ONCE // (of_block + kept)))
    found: list[dict[Shift, Classified]] = [{} for _ in at.encoders]
    for start in range(0, len(shifts), count):
        some = shifts[start : start + count]
        prepared = [PreparedEncoder.of(encoder, shift) for encoder in at.encoders for shift in some]
        features = encoded_by(args, at, prepared, base, report=False)
        for own, classifier in zip(found, classifiers if at.world.is_main else (), strict=False):
            own |= {shift: all_classes(features.pop(0), classifier) for shift in some}
        del features
    return found
