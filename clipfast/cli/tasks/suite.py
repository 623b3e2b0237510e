"""``clipfast eval suite``: evaluate several models on all sets of a folder in CLIP_benchmark's offline layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import COUNT, SEED, add_output
from ..eval_arguments import (
    add_model_arguments,
    add_run_arguments,
    add_watch_arguments,
    check_unwatched,
    load_encoder,
    named_models,
    write_results,
)

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ...distributed.world import World
    from ...evaluate.offline_layout import Layout, OfflineSet, Problem
    from ...evaluate.store import FeatureStore
    from ...evaluate.suite import ResultFolder, Settings

LINES = "suite.jsonl"  # the file in a run's folder to which --watch writes results
# Options that cannot be used with --watch.
NOT_WATCHED = ("model", "pretrained", "cache_dir", "image_seq_len", "output", "features", "json", "html", "table")
EPILOG = """\
exit code: 0 if every wanted result is there; 1 if a set or a task had to be left out, which stderr and the results
name; 2 if nothing could be done

example:
  clipfast eval suite --root benchmark --model local-dir:runs/demo ViT-B-32,openai --output results --table"""


def add_parser(tasks: Any) -> None:
    """Add the parser of ``clipfast eval suite``. Files and names are checked when the command runs."""
    parser = tasks.add_parser(
        "suite",
        help="all sets of a folder in CLIP_benchmark's layout, by several models",
        description="Evaluate models on every set that a folder holds in CLIP_benchmark's offline layout "
        "(wds_NAME/test/0.tar, ...): zero-shot classification or retrieval, by the kind of the set, and linear probes. "
        "Each result is a file, and is not computed again while model, data and settings stay equal. torchrun shares "
        "the work between processes.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, metavar="FOLDER", help="folder of the folders wds_NAME")
    add_model_arguments(parser, several=True)
    add_watch_arguments(parser, LINES)
    add("--output", type=Path, metavar="FOLDER", help="folder of the results, a file for each set, model and task")
    sets = "names of sets (vtab/cifar10), or vtab, vtab+, retrieval, imagenet_robustness (default: all in --root)"
    add("--sets", nargs="+", default=[], metavar="NAME", help=sets)
    add("--split", default="test", metavar="NAME", help="the split to evaluate on (default: test)")
    k = "the numbers of results in which a right one is looked for, in retrieval (default: 5)"
    add("--k", nargs="+", type=COUNT, default=[5], help=k)
    add("--probe", action="store_true", help="also train a linear probe where a set has a split 'train'")
    solver = "library that fits the probe (default: scikit-learn on a CPU if it is installed, torch otherwise)"
    add("--solver", choices=("auto", "scikit-learn", "torch"), default="auto", help=solver)
    add("--seed", type=SEED, default=0, help="seed of the split that replaces a missing 'val' (default: 0)")
    add_run_arguments(parser)
    add_output(parser, "--html", help="write a page with all results and a picture to this file")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast eval suite``: evaluate the models on the sets, print the results, and return the exit code."""
    if args.watch is not None:
        return watch(args)
    models = _check(args)
    from ...distributed.world import joined
    from ...evaluate.offline_layout import find_sets
    from ...evaluate.probe_fit import chosen_solver
    from ...evaluate.store import FeatureStore
    from ...evaluate.suite import ResultFolder

    with joined(args.device, args.dist_timeout) as world:
        layout = world.on_main(lambda: find_sets(args.root, args.sets, args.split))
        if world.is_main:
            _tell(layout)
        encoders = [load_encoder(args, name, weights or None, world) for name, weights in models]
        settings = _settings(args, chosen_solver(args.solver, encoders[0].device))
        folder = ResultFolder(args.output, models, encoders, settings)
        world.on_main(lambda: args.output.mkdir(exist_ok=True))
        store = None if args.features is None else FeatureStore(args.features)
        problems = [*layout.problems, *_evaluate(layout.sets, folder, store, world)]
        if not world.is_main:
            return 0
        results = _summary(args, layout, folder, problems)
    if args.html:
        from ...evaluate.pages import SORT, suite_page
        from ...io.page import write_page

        body = suite_page(results, rows_of(results), rows_of(results, every=True))
        write_page(args.html, "clipfast eval suite", body, script=SORT)
    if args.plot:
        from ...evaluate.plots import suite_figure
        from ...io.files import save_figure

        save_figure(suite_figure(results, rows_of(results)), args.plot)
    write_results(args, results, table)
    return 1 if problems or (args.sets and layout.missing) else 0


def _check(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Check the arguments of ``clipfast eval suite``; return name and weights of each model.

    Raises:
        ValueError: numbers are out of range, or arguments do not fit together.
    """
    check_unwatched(args)
    if args.output is None:
        raise ValueError("--output is needed: the folder for the results")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file, not a folder")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"no folder {args.output.parent} to make {args.output.name} in")
    if args.json and args.json.absolute().parent == args.output.absolute():
        raise ValueError(
            f"--json {args.json}: clip_benchmark build takes every .json in {args.output} for a result of one set, so "
            "that the summary must be elsewhere"
        )
    return named_models(args.model, args.pretrained)


def _settings(args: argparse.Namespace, solver: str) -> Settings:
    """Return the settings of ``clipfast eval suite`` from its arguments."""
    from ...evaluate.suite import Settings

    return Settings(args.split, tuple(args.k), args.probe, solver, args.seed, args.batch_size, args.workers)


def _tell(layout: Layout) -> None:
    """Print the missing and incomplete sets of ``clipfast eval suite`` on stderr."""
    if layout.missing:
        print(f"clipfast eval: {len(layout.missing)} sets are not there: {', '.join(layout.missing)}", file=sys.stderr)
    for problem in layout.problems:
        report(problem)


def report(problem: Problem) -> None:
    """Print why ``clipfast eval suite`` left out a set, on stderr."""
    print(f"clipfast eval: left out {problem.name}: {problem.reason}", file=sys.stderr)


def _evaluate(
    sets: Sequence[OfflineSet], folder: ResultFolder, store: FeatureStore | None, world: World
) -> list[Problem]:
    """Evaluate the sets that lack results of ``clipfast eval suite``, and write the results.

    On rank 0, return the problems, each with its set and its reason.
    """
    from ...evaluate.offline_layout import Problem
    from ...evaluate.suite import evaluate_set, problems_of

    problems: list[Problem] = []
    for one in sets:
        found, done = [], []
        try:  # if rank 0 raises an error, all ranks do, and take the same branch
            wanted = world.on_main(lambda one=one: folder.wanted(one))  # type: ignore[misc]
        except ValueError as error:
            wanted, found = {}, [Problem(one.name, str(error))]
        if wanted:
            if world.is_main:
                print(f"clipfast eval: {one.name}: {', '.join(wanted)}", file=sys.stderr)
            done = evaluate_set(one, folder.encoders, wanted, folder.settings, store, world)
        for result in done:
            if result.score is not None:
                folder.write(one, result, result.score)
        found += problems_of(one, done, folder.models)
        for problem in found if world.is_main else ():
            report(problem)
        problems += found
    return problems


def _summary(
    args: argparse.Namespace, layout: Layout, folder: ResultFolder, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Return all results in the folder of ``clipfast eval suite --output``, their means, and the missing sets."""
    from ...evaluate.suite import means

    kept = (
        folder.read(one, task, number)
        for one in layout.sets
        for task in folder.settings.tasks_of(one)
        for number in range(len(folder.models))
    )
    results = [result for result in kept if result is not None]
    return {
        "root": str(args.root), "split": args.split,
        "models": [{"model": name, "pretrained": weights} for name, weights in folder.models],
        "means": means(results, folder.models), "results": results,
        "problems": [problem._asdict() for problem in problems], "missing": layout.missing,
    }  # fmt: skip


def rows_of(results: dict[str, Any], *, every: bool = False) -> list[dict[str, Any]]:
    """Return a row of ``clipfast eval suite`` for each metric of each set, with (value, interval) or None by model.

    Args:
        results: results of the command.
        every: return all metrics, in place of the main metrics of each task.
    """
    from ...evaluate.suite_scores import headlines

    models = [(model["model"], model["pretrained"]) for model in results["models"]]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results["results"]:
        for metric in result["intervals"] if every else headlines(result["task"], result["metrics"]):
            row = {"set": result["dataset"].removeprefix("wds/"), "task": result["task"], "metric": metric}
            row |= {"images": result["images"], "values": [None] * len(models)}
            values = rows.setdefault((row["set"], metric), row)["values"]
            figure = (result["metrics"][metric], result["intervals"][metric])
            values[models.index((result["model"], result["pretrained"]))] = figure
    return list(rows.values())


def table(results: dict[str, Any]) -> str:
    """Format the results of ``clipfast eval suite``: sets by models, then means by task, and missing results."""
    from ...evaluate.intervals import percent
    from ...evaluate.suite import label
    from ...io.text import align

    names = [label(model["model"], model["pretrained"]) for model in results["models"]]
    rows = [["set", "images", "metric", *names]]
    for row in rows_of(results):
        cells = [percent(*value) if value else "-" for value in row["values"]]
        rows.append([row["set"], f"{row['images']:,}", row["metric"], *cells])
    for mean in results["means"]:
        rows.append([f"mean of {mean['sets']}", "", mean["metric"], *(f"{value:.1%}" for value in mean["values"])])
    parts = [align(rows, right=(1,)), "95% intervals in brackets"]
    parts += [f"left out {problem['name']}: {problem['reason']}" for problem in results["problems"]]
    return "\n".join(parts)


def watch(args: argparse.Namespace) -> int:
    """Evaluate each new checkpoint of a run for ``clipfast eval suite --watch``, and print a line for each."""
    from ...distributed.world import resolve_device
    from ...evaluate.offline_layout import find_sets
    from ...evaluate.probe_fit import chosen_solver
    from ...evaluate.suite import SuiteEvaluator, chief_figures, digest, made_of, words
    from ...evaluate.watch import CheckpointModel, Shown, Watch, follow
    from ..eval_arguments import check_watch

    interval = check_watch(args, NOT_WATCHED)
    layout = find_sets(args.root, args.sets, args.split)
    _tell(layout)
    device = resolve_device(args.device)
    settings = _settings(args, chosen_solver(args.solver, device))
    evaluator = SuiteEvaluator(layout.sets, settings, CheckpointModel(device, args.backend, args.tokenizer))
    about = {
        "data": str(args.root), "sets": [one.name for one in layout.sets], "split": args.split,
        "k": sorted(set(args.k)), "probe": args.probe, "seed": args.seed,
        "stamp": digest([made_of(one, task, settings) for one in layout.sets for task in settings.tasks_of(one)]),
    }  # fmt: skip
    shown = Shown(chief_figures, chief_figures, words)
    watching = Watch(args.watch, evaluator, about, average=not args.raw, name=LINES, shown=shown)
    follow(watching, interval, f"{args.watch} on {args.root}", args.plot)
    return 1 if layout.problems or (args.sets and layout.missing) else 0
