"""The command line, ``clipfast COMMAND``. Each subcommand imports what it needs when it runs."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. What the user got wrong is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="clipfast", description="Train and evaluate CLIP on Triton kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_verify(commands)
    _add_plan(commands)
    _add_inspect(commands)
    commands.add_parser("bench", help="time ops, steps and data against other implementations", add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from .bench.cli import main as bench

        return bench(arguments[1:], prog="clipfast bench")
    args = parser.parse_args(arguments)
    shown: Exception
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"clipfast {args.command}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        hint, shown = "; install what it needs: pip install 'clipfast[data,eval]'", error
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        hint, shown = "", error
    if args.traceback:
        raise shown
    print(f"clipfast {args.command}: error: {shown}{hint}", file=sys.stderr)
    return 2


def _add_train(commands: Any) -> None:
    from .training.config import add_arguments, list_recipes

    parser = commands.add_parser(
        "train",
        help="train a model on image-text shards",
        description="Train CLIP on WebDataset shards. Ctrl-C saves and stops; --resume goes on.",
        epilog="Example: clipfast train --recipe emoji --name demo\nTo go on: clipfast train --resume runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"options from a bundled recipe ({', '.join(list_recipes())}) or a TOML file; flags override it",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run, given as its folder or a checkpoint, with the options it was started with",
    )
    add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from .training import TrainConfig, read_recipe
    from .training.loop import train
    from .training.run import LATEST

    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in vars(args).items()
    }
    for key in ("command", "run", "traceback", "recipe", "resume"):
        given.pop(key)
    options: dict[str, Any] = {}
    resume = None
    if args.resume is not None:
        if args.resume == "latest":
            if "name" not in given:
                raise ValueError("--resume latest needs the run's --name; or give its folder: --resume runs/NAME")
            args.resume = Path(given.get("logs", "runs")) / given["name"]
        resume = Path(args.resume)
        resume = resume / "checkpoints" / LATEST if resume.is_dir() else resume
        options |= _trusted(_saved_options(resume), given, resume)
    if args.recipe is not None:
        options |= _trusted(read_recipe(args.recipe), given, args.recipe)
        if resume is None:
            options.setdefault("name", f"{Path(args.recipe).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}")
    folder, signum = train(TrainConfig(**(options | given)), resume)
    if signum is not None:
        return 128 + signum
    print((folder.path / "results.json").read_text())
    return 0


def _saved_options(checkpoint: Path) -> dict[str, Any]:
    from .checkpoint import read_checkpoint

    saved: dict[str, Any] = read_checkpoint(checkpoint).get("clipfast", {}).get("config", {})
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    path = checkpoint.resolve()
    if options and path.parent.name == "checkpoints":
        # The run goes on where its checkpoint lies, also if the folder was moved or renamed.
        options |= {"logs": str(path.parent.parent.parent), "name": path.parent.parent.name}
    return options


def _trusted(options: dict[str, Any], given: dict[str, Any], source: object) -> dict[str, Any]:
    """Refuse data that is not local, unless the user typed it: a file may come from anybody, and remote data is opened
    by a shell command that its name is part of.
    """
    from .data.samples import is_local

    for key in ("train_data", "val_data"):
        if key not in given and not is_local(str(options.get(key))):
            flag = "--" + key.replace("_", "-")
            raise ValueError(
                f"{source} names data that is not local, {options[key]!r}: to use it, give {flag} yourself"
            )
    return options


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval", help="evaluate a checkpoint", description="Evaluate a checkpoint without training on the task."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    zero_shot = tasks.add_parser(
        "zeroshot",
        help="zero-shot accuracy and image-text retrieval",
        description="Zero-shot accuracy and retrieval on a folder of images by class, or on WebDataset shards.",
        epilog="Example: clipfast eval zeroshot --model local-dir:runs/demo --data bundled:emoji/fluent",
    )
    zero_shot.add_argument(
        "--model", required=True, help="local-dir:FOLDER (a finished run), a checkpoint of a run (.pt), or a name"
    )
    zero_shot.add_argument("--pretrained", metavar="PATH", help="checkpoint with the weights (.pt, .bin, .safetensors)")
    zero_shot.add_argument("--data", required=True, help="image folder, or shards; 'bundled:emoji/fluent' ships inside")
    zero_shot.add_argument(
        "--label-by", metavar="KEY", help="key of the shards' json that names the class (default: the caption does)"
    )
    zero_shot.add_argument(
        "--classnames",
        metavar="FILE",
        help="'imagenet', or a text file with one name per class in the order of the classes",
    )
    zero_shot.add_argument(
        "--templates", default="plain", help="plain, simple (7), openai (80), or a text file with one template per line"
    )
    zero_shot.add_argument("--group-by", metavar="KEY", help="key of the shards' json to report accuracy by")
    zero_shot.add_argument(
        "--leave-out", nargs="*", default=[], metavar="GROUP", help="groups that a second accuracy does without"
    )
    zero_shot.add_argument("--batch-size", type=int, default=256)
    zero_shot.add_argument("--device", default="auto")
    zero_shot.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"))
    zero_shot.add_argument("--json", metavar="FILE", help="also write the results there")
    zero_shot.add_argument("--traceback", action="store_true", help="show where an error was raised")
    zero_shot.set_defaults(run=_eval_zeroshot)


def _eval_zeroshot(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .evaluation import encode_labelled, evaluate, read_labelled
    from .factory import create_model, get_tokenizer
    from .images import image_transform
    from .training.trainer import resolve_device

    if args.pretrained is None and not args.model.startswith("local-dir:") and not args.model.endswith(".pt"):
        raise ValueError(
            f"--model {args.model} has random weights: give its checkpoint with --pretrained, "
            "or a run's folder as --model local-dir:FOLDER"
        )
    device = resolve_device(args.device)
    templates, classnames = _templates(args.templates), _classnames(args.classnames)
    model = create_model(args.model, args.pretrained, device=device, backend=args.backend).eval()
    images = tqdm(read_labelled(args.data, args.group_by, args.label_by), desc="images", unit="image", disable=None)
    features = encode_labelled(
        model, images, image_transform(model.visual.image_size, uint8=True), args.batch_size, device
    )
    tokenizer = get_tokenizer(args.model)
    results = evaluate(model, tokenizer, features, templates, classnames=classnames, leave_out=args.leave_out).results
    text = json.dumps({"model": args.model, "data": args.data, "templates": args.templates, **results}, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")
    return 0


def _add_verify(commands: Any) -> None:
    from .verify.command import add_parser

    add_parser(commands)


def _add_plan(commands: Any) -> None:
    from .plan.command import add_parser

    add_parser(commands)


def _templates(name: str) -> tuple[str, ...]:
    from .evaluation import TEMPLATES

    if name in TEMPLATES:
        return TEMPLATES[name]
    templates = _lines(name, f"--templates must be one of {', '.join(TEMPLATES)} or a file")
    lacking = [template for template in templates if "{}" not in template]
    if lacking:
        raise ValueError(f"template {lacking[0]!r} in {name} has no {{}} for the class name")
    return templates


def _classnames(name: str | None) -> tuple[str, ...] | None:
    from .evaluation import IMAGENET_CLASSNAMES

    if name is None:
        return None
    return IMAGENET_CLASSNAMES if name == "imagenet" else _lines(name, "--classnames must be 'imagenet' or a file")


def _lines(path: str, otherwise: str) -> tuple[str, ...]:
    if not Path(path).is_file():
        raise ValueError(f"{otherwise}, got {path!r}")
    return tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())


def _add_inspect(commands: Any) -> None:
    from .bench.inspection.command import add_arguments, run
    from .bench.inspection.report import explain

    parser = commands.add_parser(
        "inspect",
        help="what the compiler made of every kernel, without a GPU",
        description=explain(),
        epilog="Example: clipfast inspect --arch 90 --case attention",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
