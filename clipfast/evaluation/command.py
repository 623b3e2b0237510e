"""``clipfast eval``: its arguments, and what it prints."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..training.arguments import add_arguments
from ..training.options import SOURCE_OPTIONS, keys_of, separator_of


def add_parser(commands: Any) -> None:
    """Add the subcommand with its one task. Files and names are checked when it runs."""
    parser = commands.add_parser("eval", description="Evaluate a checkpoint without training on the task.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    zero_shot = tasks.add_parser(
        "zeroshot",
        help="zero-shot accuracy and image-text retrieval",
        description="Compute zero-shot accuracy and retrieval on a folder with one sub-folder of images per class, or "
        "on pairs as --train-data of clipfast train takes them.",
        epilog="Example: clipfast eval zeroshot --model local-dir:runs/demo --data bundled:emoji/fluent",
    )
    add = zero_shot.add_argument
    watched = "evaluate each checkpoint of a run that is being trained, as it appears, until the run is finished"
    add("--watch", type=Path, metavar="RUN", help=f"in place of --model: {watched}; lines go to RUN/evaluations.jsonl")
    add("--interval", type=float, default=30.0, metavar="SECONDS", help="time between two looks at RUN (default: 30)")
    raw = "the weights themselves where a checkpoint of RUN also has their average (EMA)"
    add("--raw", action="store_true", help=f"evaluate {raw}")
    add(
        "--model",
        help="local-dir:FOLDER (a finished run), a run's checkpoint (.pt), a model name, or hf-hub:ORG/REPO",
    )
    add(
        "--pretrained",
        metavar="TAG",
        help="weights of a model name: a tag of clipfast list-pretrained, or a checkpoint (.pt, .bin, .safetensors)",
    )
    add("--cache-dir", metavar="FOLDER", help="cache of the hub (default: huggingface_hub's own, which HF_HOME moves)")
    add("--tokenizer", metavar="PATH", help="tokenizer.json of a SigLIP model, or its folder (default: the model's)")
    add(
        "--data",
        required=True,
        help="image folder, or pairs; 'bundled:emoji/fluent' ships with the package, 'synthetic:2048' is drawn",
    )
    add_arguments(zero_shot, SOURCE_OPTIONS)
    add("--label-by", metavar="KEY", help="column or json key that names the class (default: the caption does)")
    add("--classnames", metavar="FILE", help="'imagenet', or a text file with one name per class, in their order")
    templates = "prompts to average: plain, simple (7), openai (80), or a text file with one template per line"
    add("--templates", default="plain", metavar="NAME", help=f"{templates} (default: plain)")
    add("--group-by", metavar="KEY", help="column or json key; accuracy is also reported for each of its values")
    add("--leave-out", nargs="*", default=[], metavar="GROUP", help="groups to leave out of a second overall accuracy")
    add("--batch-size", type=int, default=256, metavar="INT", help="images to encode at once (default: 256)")
    add("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default: auto)")
    backends = ("auto", "triton", "torch")
    add("--backend", default="auto", choices=backends, help="implementation of the ops (default: auto)")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add("--traceback", action="store_true", help="show where an error was raised")
    zero_shot.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate the checkpoint, print the results as JSON, and return the exit code."""
    if args.watch is not None:
        return watch(args)
    if args.model is None:
        raise ValueError("--model or --watch is needed: what to evaluate")
    from tqdm import tqdm

    from ..factory import create_model, get_tokenizer, resolve_device, transform_of
    from ..files import check_target, replace_text
    from .evaluate import evaluate
    from .features import encode_labelled
    from .labelled import LabelledSet

    check_target(args.json)
    device = resolve_device(args.device)
    templates, classnames = read_templates(args.templates), read_classnames(args.classnames)
    model = create_model(
        args.model, args.pretrained, require_pretrained=True, device=device, backend=args.backend,
        cache_dir=args.cache_dir,
    ).eval()  # fmt: skip
    tokenizer = get_tokenizer(args.model, cache_dir=args.cache_dir, tokenizer_file=args.tokenizer)
    options = vars(args)
    images = LabelledSet(
        args.data, args.group_by, args.label_by, keys=keys_of(options), separator=separator_of(options)
    )
    progress = tqdm(images, desc="images", unit="image", disable=None)
    transform = transform_of(model, uint8=True)
    features = encode_labelled(model, progress, transform, args.batch_size, device)
    for skipped in images.skipped:
        print(f"clipfast eval: left out {skipped}", file=sys.stderr)
    results = evaluate(
        model, tokenizer, features, templates,
        classnames=classnames, leave_out=args.leave_out, skipped=len(images.skipped),
    ).results  # fmt: skip
    text = json.dumps({"model": args.model, "data": args.data, "templates": args.templates, **results}, indent=2)
    print(text)
    if args.json:
        replace_text(args.json, text + "\n")
    return 0


def watch(args: argparse.Namespace) -> int:
    """Evaluate the checkpoints of a run until it is finished, or Ctrl-C; print a line for each."""
    from ..factory import resolve_device
    from ..training.history import is_run
    from ..training.reports import evaluation_metrics
    from ..training.run import RunFolder
    from ..training.status import metrics_text
    from .labelled import LabelledSet
    from .watch import Evaluator, Watch

    given = [flag for flag in ("model", "pretrained", "json") if getattr(args, flag) is not None]
    if given:
        raise ValueError(f"--watch cannot be used with --{given[0]}")
    if not is_run(args.watch):
        raise ValueError(f"--watch {args.watch}: there is no run in that folder")
    if not args.interval > 0:
        raise ValueError(f"--interval must be more than 0, got {args.interval}")
    options = vars(args)
    images = LabelledSet(
        args.data, args.group_by, args.label_by, keys=keys_of(options), separator=separator_of(options)
    )
    evaluator = Evaluator(
        images, read_templates(args.templates), classnames=read_classnames(args.classnames), leave_out=args.leave_out,
        batch_size=args.batch_size, device=resolve_device(args.device), backend=args.backend,
        tokenizer_file=args.tokenizer,
    )  # fmt: skip
    names = ("data", "templates", "classnames", "label_by", "group_by", "leave_out")
    watching = Watch(RunFolder(args.watch), evaluator, {name: options[name] for name in names}, average=not args.raw)
    try:
        for line in watching.run(args.interval):
            print(
                f"step {line['step']} ({line['checkpoint']}): {metrics_text(evaluation_metrics(line['eval']))}",
                flush=True,
            )
    except KeyboardInterrupt:
        pass  # the usual end
    finally:
        watching.close()
    return 0


def read_templates(name: str) -> tuple[str, ...]:
    """Return the prompt templates of ``name``, which may be a file.

    Raises:
        ValueError: there is no such file, it is empty, or a line has no place for the class name.
    """
    from .zero_shot import TEMPLATES

    if name in TEMPLATES:
        return TEMPLATES[name]
    templates = _lines(name, f"--templates must be one of {', '.join(TEMPLATES)} or a file")
    lacking = [template for template in templates if "{}" not in template]
    if lacking:
        raise ValueError(f"template {lacking[0]!r} in {name} has no {{}} for the class name")
    return templates


def read_classnames(name: str | None) -> tuple[str, ...] | None:
    """Return the class names that ``name`` stands for, which may be a file; None keeps the labels of the data.

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    from .zero_shot import IMAGENET_CLASSNAMES

    if name is None:
        return None
    return IMAGENET_CLASSNAMES if name == "imagenet" else _lines(name, "--classnames must be 'imagenet' or a file")


def _lines(path: str, otherwise: str) -> tuple[str, ...]:
    """Return the lines of a text file that are not empty; ``otherwise`` is the error if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{otherwise}, got {path!r}")
    lines = tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines
