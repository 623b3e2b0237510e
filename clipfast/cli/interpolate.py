"""``clipfast interpolate``: evaluate and save models between two checkpoints."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..evaluate.results import report_left_out
from ..io.progress import each
from ..train.option_checks import SOURCE_OPTIONS, keys_of, separator_of
from .arguments import BATCH, CACHE_DIR, DRAWN, TOKENIZER, add_output
from .eval_arguments import (
    add_backend_argument,
    add_device_argument,
    add_prompt_arguments,
    read_classnames,
    read_templates,
)
from .options import add_arguments

EPILOG = """\
example:
  clipfast interpolate runs/before runs/finetuned --val-data old/ --val-data new/ --plot wise.png
  clipfast interpolate runs/before runs/finetuned --save 0.5 both    # create_model("local-dir:both")"""
FIGURES = ("top-1", "top-5", "t2i R@1")
ALPHAS = tuple(tenth / 10 for tenth in range(11))


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast interpolate``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "interpolate",
        description="Interpolate the weights of two checkpoints of one architecture, such as a model before and after "
        "finetuning (WiSE-FT), evaluate the models between them, and save one of them.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("first", metavar="A", help="file, folder, hf-hub:ORG/REPO or MODEL:TAG, as clipfast convert takes it; alpha 0")
    add("second", metavar="B", help="the other checkpoint; alpha 1")
    shares = "shares of B, from 0 to 1 (default: 0 0.1 ... 1)"
    add("--alpha", nargs="+", type=float, default=ALPHAS, help=shares)
    data = "image folder or pairs to evaluate on; may be given more than once"
    add("--val-data", action="append", default=[], metavar="DATA", help=data)
    add_arguments(parser, SOURCE_OPTIONS)
    add("--label-by", metavar="KEY", help="column or json key that names the class (default: the caption)")
    add_prompt_arguments(parser)
    add_output(parser, "--plot", ends=DRAWN, help="draw the accuracy on each set over alpha")
    add_output(parser, "--json", help="also write all results to this file")
    save = "write the model at this alpha to a new folder, which OpenCLIP and clipfast load as local-dir:FOLDER"
    add_output(parser, "--save", is_folder=True, nargs=2, metavar=("ALPHA", "FOLDER"), help=save)
    add("--model", metavar="NAME", help="the model of both checkpoints, if they do not say it: a name, or a JSON file")
    add("--activation", metavar="NAME", help="gelu or quick_gelu, if the checkpoints do not say it")
    add("--cache-dir", **CACHE_DIR)
    add("--tokenizer", **TOKENIZER)
    add("--batch-size", type=BATCH, default=256, help="images to encode at once (default: 256)")
    add_device_argument(parser)
    add_backend_argument(parser)
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast interpolate``: print a table of the models' accuracies, save one of them, return the exit code."""
    from ..distributed.world import resolve_device
    from ..evaluate.interpolation import Interpolation, evaluate_path
    from ..evaluate.labelled import LabelledSet
    from ..io.files import replace_text

    alphas, saved = sorted(set(args.alpha)), _saved(args.save)
    _check(args, [*alphas, *([] if saved is None else [saved[0]])])
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    models = Interpolation(
        args.first, args.second, model=args.model, activation=args.activation, cache_dir=args.cache_dir
    )
    keys, separator = keys_of(vars(args)), separator_of(vars(args))
    data = {name: LabelledSet(name, None, args.label_by, keys, separator) for name in args.val_data}
    path = evaluate_path(
        models, each(alphas, "alpha", "models"), data, templates, classnames=classnames, batch_size=args.batch_size,
        device=resolve_device(args.device), backend=args.backend, tokenizer=args.tokenizer,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for row in path if data else ():
        if not rows:
            print("\n".join(f"[{number}] {name}" for number, name in enumerate(data, 1)))
            heads = (f"[{number}] {figure}" for number in range(1, len(data) + 1) for figure in FIGURES)
            print(_line("alpha", *heads))
            skipped = [one for images in data.values() for one in images.skipped]
            report_left_out(skipped, "interpolate", most=len(skipped))
        rows.append(row)
        shares = []
        for found in row["results"].values():
            shares += [found["zero_shot"]["top1"], found["zero_shot"]["top5"]]
            shares.append(found["retrieval"]["text_to_image"]["R@1"])
        print(_line(f"{row['alpha']:g}", *(f"{share:.2%}" for share in shares)), flush=True)
    if args.json is not None:
        content = {"first": args.first, "second": args.second, "templates": args.templates, "path": rows}
        replace_text(args.json, json.dumps(content, indent=2) + "\n")
    if args.plot is not None:
        from ..evaluate.pictures import interpolation_plot

        interpolation_plot(rows, f"alpha: from {args.first} (0) to {args.second} (1)", args.plot)
    if saved is not None:
        models.save(*saved)
        print(f"wrote the model at alpha {saved[0]:g} to {saved[1]}: load it as local-dir:{saved[1]}")
    return 0


def _line(*words: str) -> str:
    """Return a line of the table of ``clipfast interpolate``, with the words in columns of equal width."""
    return "  ".join(f"{word:>11}" for word in words)


def _saved(words: Sequence[str] | None) -> tuple[float, Path] | None:
    """Parse the values of ``clipfast interpolate --save``, an alpha and a folder.

    Raises:
        ValueError: the alpha is not a number.
    """
    if words is None:
        return None
    try:
        alpha = float(words[0])
    except ValueError:
        raise ValueError(f"--save needs an alpha and a folder, got {words[0]!r} as the alpha") from None
    return alpha, Path(words[1])


def _check(args: argparse.Namespace, alphas: Iterable[float]) -> None:
    """Check the arguments of ``clipfast interpolate`` before anything is read.

    Raises:
        ValueError: neither ``--val-data`` nor ``--save`` is given, an alpha is out of range, or a set or a file cannot
            be used.
    """
    if not args.val_data and args.save is None:
        raise ValueError("--val-data or --save is needed: data to evaluate on, or a folder to write")
    if (args.plot or args.json) and not args.val_data:
        raise ValueError("--plot and --json need --val-data")
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong:
        raise ValueError(f"alpha must be from 0 (A) to 1 (B), got {wrong[0]}")
    twice = [name for name in args.val_data if args.val_data.count(name) > 1]
    if twice:
        raise ValueError(f"--val-data {twice[0]} is given more than once")
