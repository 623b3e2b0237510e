"""``clipfast eval probe``: a linear classifier on image features, trained on all or a few images of a training set."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from ..arguments import COUNT, SEED, Count
from ..eval_arguments import (
    add_data_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_run_arguments,
    encoded,
    labelled_set,
    read_classnames,
    read_templates,
    result_of,
    session,
    write_results,
)  # fmt: skip

if TYPE_CHECKING:
    from ...evaluate.classification import Classified
    from ...evaluate.probe_fit import Samples

EPILOG = """\
example:
  clipfast eval probe --model local-dir:runs/demo --train-data bundled:emoji/noto::bundled:emoji/twemoji \\
      --data bundled:emoji/fluent --label-by category --shots 1 2 4 8 16 --plot few-shot.png"""
SOLVERS = ("auto", "scikit-learn", "torch")


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval probe``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "probe",
        help="linear probe: train a linear classifier on the features of images",
        description="Fit a logistic regression to the features of a training set, with the strength of its penalty "
        "chosen on a validation set, and compute its accuracy on a test set.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--train-data", required=True, metavar="DATA", help="training data of the classifier, named as --data is")
    add("--val-data", metavar="DATA", help="data for the choice of C (default: a fifth of each training class)")
    add_data_arguments(parser)
    add("--C", type=float, help="inverse strength of the penalty (default: chosen from 1e-6 to 1e6)")
    solver = "library that fits the classifier (default: scikit-learn on a CPU if it is installed, torch otherwise)"
    add("--solver", choices=SOLVERS, default="auto", help=solver)
    add("--unnormalized", action="store_true", help="keep the lengths of features (default: divide by them)")
    shots = "also train on this many images of each class, and compare with zero-shot"
    add("--shots", type=COUNT, nargs="+", default=[], help=shots)
    add(
        "--seeds",
        type=Count(1, 1000),
        default=3,
        help="times that images are drawn for --shots (default: 3)",
    )
    add("--seed", type=SEED, default=0, help="seed of the first draw of images (default: 0)")
    add_prompt_arguments(parser)
    add_run_arguments(parser)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval probe``: fit and test linear probes, print the results, and return the exit code."""
    _check(args)
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    from ...evaluate.classification import classify
    from ...evaluate.evaluate import names_of
    from ...evaluate.probe_fit import chosen_solver, samples_of

    names = {"train": args.train_data, "val": args.val_data, "test": args.data}
    with session(args) as at:
        solver = chosen_solver(args.solver, at.encoder.device)
        own = at._replace(encoders=[dataclasses.replace(at.encoder, normalize=not args.unnormalized)])
        found = {key: encoded(args, own, labelled_set(args, data)) for key, data in names.items() if data}
        samples: dict[str, Samples] = {}

        def prepare() -> list[str]:
            """Fill ``samples`` for ``clipfast eval probe``, and return the class names for prompts."""
            labels = found["train"].classnames
            if len(labels) < 2:
                raise ValueError(
                    f"{args.train_data} has one class only, {labels[0]!r}: name the right key by --label-by"
                )
            samples.update({key: samples_of(images, labels, names[key]) for key, images in found.items()})
            return names_of(found["train"].classnames, classnames)

        prompted = at.world.on_main(prepare)
        zero_shot = at.encoder.classifier(prompted, templates, at.store, at.world) if args.shots else None
        if not at.world.is_main:
            return 0
        labels = found["train"].classnames
        test = found["test"]
        prompted_found = None if zero_shot is None else classify(test.features, test.labels, labels, zero_shot.cpu())
        results = _results(args, samples, labels, solver, at.encoder.device, prompted_found)
    if args.plot:
        from ...evaluate.plots import probe_plot

        probe_plot(results, args.plot)
    write_results(args, results, _table)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check the arguments of ``clipfast eval probe`` before anything is read.

    Raises:
        ValueError: numbers are out of range, or arguments do not fit together.
    """
    if args.C is not None and not 0 < args.C < float("inf"):
        raise ValueError(f"--C must be more than 0, and finite, got {args.C:g}")
    if args.C is not None and args.val_data is not None:
        raise ValueError("--val-data chooses C: give one of --C and --val-data")
    if args.plot and not args.shots:
        raise ValueError("--plot draws accuracy over --shots: give some, such as --shots 1 2 4 8 16")


def _results(
    args: argparse.Namespace, samples: dict[str, Samples], labels: list[str], solver: str, device: Any,
    zero_shot: Classified | None,
) -> dict[str, Any]:  # fmt: skip
    """Fit and test the linear probes, and return the results of ``clipfast eval probe`` as plain values.

    ``zero_shot`` has the zero-shot predictions for the test set, if ``--shots`` is given.
    """
    import torch

    from ...evaluate.classification import intervals, metrics
    from ...evaluate.probe_fit import curve, fit_probe

    probe, train, classifier, choice = fit_probe(samples, labels, solver, device, args.seed, args.C)
    held_out = 0 if probe.validation is None else len(probe.validation.classes)
    chosen = (
        f", with {choice.tried[choice.C]:.1%} of {held_out:,} validation images right" if held_out else ", as given"
    )
    print(f"clipfast eval: C = {choice.C:.4g}{chosen}", file=sys.stderr)
    if not classifier.converged:
        print(f"clipfast eval: {solver} stopped after {classifier.iterations} iterations", file=sys.stderr)
    few_shot: dict[str, Any] = {}
    if zero_shot is not None:
        shots = sorted(set(args.shots))
        images = torch.bincount(train.classes).tolist()
        for count in shots:
            fewer = [f"{name} ({has})" for name, has in zip(labels, images, strict=True) if has < count]
            if fewer:
                named = ", ".join(fewer[:5]) + ", ..." * (len(fewer) > 5)
                print(f"clipfast eval: {count} shots: {len(fewer)} classes have fewer images: {named}", file=sys.stderr)
        seeds = range(args.seed, args.seed + args.seeds)
        few_shot["few_shot"] = curve(probe, train, samples["test"], shots, seeds)
        few_shot["zero_shot"] = {"metrics": metrics(zero_shot), "intervals": intervals(zero_shot)}
    found = classifier.classify(samples["test"], labels)
    figures = {f"lp_{name}": value for name, value in metrics(found).items()}
    settings = {"C": choice.C, "seed": args.seed, "fewshot_k": -1, "normalized": not args.unnormalized}
    return result_of(
        args, "linear_probe", {**figures, **settings},
        intervals={f"lp_{name}": value for name, value in intervals(found).items()}, train_data=args.train_data,
        classes=len(labels),
        images={"train": len(train.classes), "validation": held_out, "test": len(found.classes)},
        solver=solver, iterations=classifier.iterations, converged=classifier.converged,
        tried=[{"C": C, "acc1": share} for C, share in choice.tried.items()], **few_shot,
    )  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval probe`` as text: zero-shot, few-shot and full-data accuracy."""
    from ...evaluate.intervals import percent
    from ...io.text import align

    names = ("acc1", "acc5", "mean_per_class_recall")
    rows: list[list[str]] = [["images per class", *names]]
    if "zero_shot" in results:
        found = results["zero_shot"]
        rows.append(["0 (zero-shot)", *(percent(found["metrics"][name], found["intervals"][name]) for name in names)])
    for found in results.get("few_shot", []):
        rows.append([str(found["fewshot_k"]), *(_mean(found[name]) for name in names)])
    probe = [(results["metrics"][f"lp_{name}"], results["intervals"][f"lp_{name}"]) for name in names]
    rows.append(["all", *(percent(*figures) for figures in probe)])
    images = results["images"]
    drawn = "; after ± the standard deviation over draws" if "few_shot" in results else ""
    return (
        f"linear probe: {images['train']:,} training, {images['validation']:,} validation and {images['test']:,} test "
        f"images, {results['classes']:,} classes; C = {results['metrics']['C']:.4g}\n"
        f"95% intervals in brackets{drawn}\n\n{align(rows)}"
    )


def _mean(found: dict[str, float | None] | None) -> str:
    """Format a mean and its deviation over draws for ``clipfast eval probe``; "-" if there is none."""
    if found is None:
        return "-"
    spread = "" if found["std"] is None else f" ± {100 * found['std']:.1f}"
    return f"{100 * (found['mean'] or 0):.1f}%{spread}"
