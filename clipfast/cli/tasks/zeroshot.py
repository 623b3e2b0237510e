"""``clipfast eval zeroshot``: classification by prompts, without training on the task."""

import argparse
from typing import Any

from ..arguments import OR_ZERO, add_output
from ..eval_arguments import (
    add_data_arguments,
    add_model_arguments,
    add_prompt_arguments,
    add_run_arguments,
    add_watch_arguments,
    check_unwatched,
    encoded,
    labelled_set,
    read_classnames,
    read_templates,
    result_of,
    session,
    write_results,
)

COMPARED = ("plain", "simple", "openai")  # the sets of 1, 7 and 80 prompt templates for --compare-templates
# Options that cannot be used with --watch.
NOT_WATCHED = (
    "model",
    "pretrained",
    "cache_dir",
    "image_seq_len",
    "json",
    "features",
    "html",
    "compare_templates",
    "table",
)


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval zeroshot``. Files and names are checked when the command runs."""
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
    worst = "how many of the worst classes to name (default: 10)"
    add("--worst", type=OR_ZERO, default=10, help=worst)
    add_run_arguments(parser)
    page = "write a page with pictures of the worst classes, and the classes predicted for them, to this file"
    add_output(parser, "--html", help=page)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval zeroshot``: evaluate the checkpoint, print the results, and return the exit code."""
    if args.watch is not None:
        return watch(args)
    check_unwatched(args)
    templates, classnames = {args.templates: read_templates(args.templates)}, read_classnames(args.classnames)
    if args.compare_templates:
        templates = {**{name: read_templates(name) for name in COMPARED}, **templates}
    images = labelled_set(args)
    from ...evaluate.classification import classify
    from ...evaluate.evaluate import distinct_captions, figures, names_of

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
        from ...evaluate.pages import zeroshot_page
        from ...io.page import write_page

        body = zeroshot_page(results, _rows(results), images, found, chosen)
        write_page(args.html, "clipfast eval zeroshot", body)
    if args.plot:
        from ...evaluate.plots import zeroshot_plot

        zeroshot_plot(results, chosen, args.plot)
    write_results(args, results, _table)
    return 0


def _results(
    args: argparse.Namespace, templates: dict[str, Any], classified: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """Return the results of ``clipfast eval zeroshot`` as plain values."""
    from ...evaluate.classification import intervals, metrics, worst_classes

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


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the table of ``clipfast eval zeroshot``: titles, then a row of metrics for each set of templates."""
    from ...evaluate.intervals import percent

    names = list(results["metrics"])
    rows = [["templates", *names]]
    for key, found in results.get("by_templates", {results["templates"]: results}).items():
        rows.append([key, *(percent(found["metrics"][name], found["intervals"][name]) for name in names)])
    return rows


def _table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval zeroshot``: each set of templates, each group, and the worst classes."""
    from ...evaluate.intervals import of_share, percent
    from ...io.text import align

    counts = f"{results['images']:,} images, {results['classes']:,} classes (chance: {1 / results['classes']:.2%})"
    parts = [f"{counts}; 95% intervals in brackets", align(_rows(results))]
    if "by_group" in results:
        groups = {**results["by_group"], "all": results["zero_shot"]}
        if "without" in results:
            groups[f"without {', '.join(results['without']['groups'])}"] = results["without"]["zero_shot"]
        rows = [["group", "images", "top-1", "top-5"]]
        for name, one in groups.items():
            top1 = percent(one["top1"], of_share(one["top1"], one["images"]))
            rows.append([name, f"{one['images']:,}", top1, f"{one['top5']:.1%}"])
        parts.append(align(rows, right=(1,)))
    # With one image in each class, every recall is 0 or 1, so a table of the worst classes would say nothing.
    if results["images"] > results["classes"] and results["worst_classes"]:
        worst = [["worst classes", "images", "acc1", "taken for"]]
        for row in results["worst_classes"]:
            taken = ", ".join(f"{name} ({count})" for name, count in row["taken_for"].items())
            worst.append([row["class"], f"{row['images']:,}", f"{row['recall']:.1%}", taken])
        parts.append(align(worst, right=(1, 2)))
    return "\n\n".join(parts)


def watch(args: argparse.Namespace) -> int:
    """Evaluate each new checkpoint of a run for ``clipfast eval zeroshot --watch``, and print a line for each."""
    from ...distributed.world import resolve_device
    from ...evaluate.suite import digest
    from ...evaluate.watch import CheckpointModel, Evaluator, Watch, follow
    from ..eval_arguments import check_watch

    interval = check_watch(args, NOT_WATCHED)
    images, templates, classnames = labelled_set(args), read_templates(args.templates), read_classnames(args.classnames)
    model = CheckpointModel(resolve_device(args.device), args.backend, args.tokenizer)
    evaluator = Evaluator(images, templates, classnames, args.leave_out, args.batch_size, args.workers, model)
    names = ("data", "templates", "classnames", "label_by", "group_by", "leave_out")
    settings = {**{name: vars(args)[name] for name in names}, "stamp": digest([images.digest(), templates, classnames])}
    watching = Watch(args.watch, evaluator, settings, average=not args.raw)
    follow(watching, interval, f"{args.watch} on {args.data}", args.plot)
    return 0
