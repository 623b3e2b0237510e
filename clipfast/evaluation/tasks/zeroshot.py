"""``clipfast eval zeroshot``: classification by prompts, without training on the task."""

import argparse
from typing import Any

from ...arguments import OR_ZERO, add_output
from ..arguments import (
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
    steps_drawer,
    write_results,
)
from ..watch_arguments import add_watch_arguments, check_unwatched, check_watch

COMPARED = ("plain", "simple", "openai")  # 1, 7 and 80 templates
NOT_WATCHED = ("model", "pretrained", "cache_dir", "json", "features", "html", "compare_templates", "table")


def add_parser(tasks: Any) -> None:
    """Add the task. Files and names are checked when it runs."""
    parser = tasks.add_parser(
        "zeroshot",
        help="zero-shot accuracy and image-text retrieval",
        description="Compute zero-shot accuracy and retrieval on a folder with one sub-folder of images per class, or "
        "on pairs as --train-data of clipfast train takes them. torchrun shares the work between processes.",
        epilog="Example: clipfast eval zeroshot --model local-dir:runs/demo --data bundled:emoji/fluent",
    )
    add = parser.add_argument
    add_watch_arguments(parser, "evaluations.jsonl")
    add_model_arguments(parser, required=False)
    add_data_arguments(parser)
    add_prompt_arguments(parser)
    add("--compare-templates", action="store_true", help="also give the figures of 1, 7 and 80 templates, side by side")
    add("--leave-out", nargs="*", default=[], metavar="GROUP", help="groups to leave out of a second overall accuracy")
    add(
        "--worst",
        type=OR_ZERO,
        default=10,
        metavar="INT",
        help="how many of the worst classes to name (default: 10)",
    )
    add_run_arguments(parser)
    page = "write a page with pictures of the worst classes, and what they were taken for, to this file"
    add_output(parser, "--html", help=page)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate the checkpoint, print the results, and return the exit code."""
    if args.watch is not None:
        return watch(args)
    check_unwatched(args)
    templates, classnames = {args.templates: read_templates(args.templates)}, read_classnames(args.classnames)
    if args.compare_templates:
        templates = {**{name: read_templates(name) for name in COMPARED}, **templates}
    images = labelled_set(args)
    from ..classification import classify
    from ..evaluate import distinct_captions, figures, names_of

    with session(args) as at:
        found = encoded(args, at, images)
        names = at.world.on_main(lambda: names_of(found.classnames, classnames))
        classifiers = {key: at.encoder.classifier(names, given, at.store, at.world) for key, given in templates.items()}
        texts = at.encoder.texts(distinct_captions(found), at.store, at.world)
        if not at.world.is_main:
            return 0
        found.features = found.features.to(at.encoder.device)
        classified = {
            key: classify(found.features, found.labels, found.classnames, weights)
            for key, weights in classifiers.items()
        }
        chosen = classified[args.templates]
        evaluation = figures(found, chosen.best, texts, leave_out=args.leave_out, skipped=len(found.left_out))
    results = _results(args, templates, classified, evaluation.results)
    if args.html:
        from ...page import write_page
        from ..page import worst_page

        write_page(args.html, "clipfast eval zeroshot", worst_page(results, images, found, chosen))
    if args.plot:
        from ..pictures import zero_shot_plot

        zero_shot_plot(results, chosen, args.plot)
    write_results(args, results, _table)
    return 0


def _results(
    args: argparse.Namespace, templates: dict[str, Any], classified: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    from ..classification import intervals, metrics, worst_classes

    all_figures: dict[str, dict[str, Any]] = {
        key: {"templates": len(templates[key]), "metrics": metrics(found), "intervals": intervals(found)}
        for key, found in classified.items()
    }
    chosen = all_figures[args.templates]
    more = {"by_templates": all_figures} if args.compare_templates else {}
    return result_of(
        args, "zeroshot_classification", chosen["metrics"], intervals=chosen["intervals"], data=args.data,
        templates=args.templates, **figures, **more,
        worst_classes=worst_classes(classified[args.templates], args.worst),
    )  # fmt: skip


def _table(results: dict[str, Any]) -> str:
    """Return the results for people: the figures of each set of templates, of each group, and the worst classes."""
    from ...columns import align
    from ..intervals import of_share, percent
    from ..page import rows_of

    counts = f"{results['images']:,} images, {results['classes']:,} classes (chance: {1 / results['classes']:.2%})"
    text = f"{counts}; 95% intervals in brackets\n\n{align(rows_of(results))}"
    if "by_group" in results:
        without = results.get("without", {})
        others = {f"without {', '.join(without['groups'])}": without["zero_shot"]} if without else {}
        groups = {**results["by_group"], "all": results["zero_shot"], **others}
        rows = [["group", "images", "top-1", "top-5"]]
        for name, one in groups.items():
            rows.append(
                [
                    name,
                    f"{one['images']:,}",
                    percent(one["top1"], of_share(one["top1"], one["images"])),
                    f"{one['top5']:.1%}",
                ]
            )
        text = f"{text}\n\n{align(rows, right=(1,))}"
    if results["images"] <= results["classes"]:  # each class has one image, which is right or wrong
        return text
    worst: list[list[str]] = [["worst classes", "images", "acc1", "taken for"]]
    for row in results["worst_classes"]:
        taken = ", ".join(f"{name} ({count})" for name, count in row["taken_for"].items())
        worst.append([row["class"], f"{row['images']:,}", f"{row['recall']:.1%}", taken])
    return text if len(worst) == 1 else f"{text}\n\n{align(worst, right=(1, 2))}"


def watch(args: argparse.Namespace) -> int:
    """Evaluate the checkpoints of a run until it is finished, or Ctrl-C; print a line for each."""
    from ...factory import resolve_device
    from ...training.reports import evaluation_metrics
    from ...training.run import RunFolder
    from ...training.status import WANTED, metrics_text
    from ..suite import digest
    from ..watch import CheckpointModel, Evaluator, Watch, follow

    interval = check_watch(args, NOT_WATCHED)
    options, images = vars(args), labelled_set(args)
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    evaluator = Evaluator(
        images, templates, classnames=classnames,
        leave_out=args.leave_out, batch_size=args.batch_size, workers=args.workers,
        model=CheckpointModel(resolve_device(args.device), args.backend, args.tokenizer),
    )  # fmt: skip
    names = ("data", "templates", "classnames", "label_by", "group_by", "leave_out")
    settings = {**{name: options[name] for name in names}, "stamp": digest([images.digest(), templates, classnames])}
    watching = Watch(RunFolder(args.watch), evaluator, settings, average=not args.raw)

    def named(results: Any) -> dict[str, float]:
        found = evaluation_metrics(results)
        return {name: found[key] for name, key in WANTED if key in found} | {"chance of top-1": 1 / results["classes"]}

    draw = steps_drawer(args.plot, f"{args.watch} on {args.data}", named)
    follow(watching, interval, lambda results: metrics_text(evaluation_metrics(results)), draw)
    return 0
