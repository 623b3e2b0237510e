"""``clipfast train``: its arguments, and the options that a recipe or a checkpoint adds to them."""

import argparse
import time
from pathlib import Path
from typing import Any

from . import open_clip_flags
from .arguments import add_arguments
from .config import COOLDOWN_OPTIONS, REPLACED, TrainConfig
from .evaluation_only import evaluate, is_evaluation
from .options import flag_name
from .recipes import describe, list_recipes, read_recipe


def add_parser(commands: Any) -> None:
    """Add the subcommand. Values are checked when it runs, so that ``--help`` needs no PyTorch."""
    parser = commands.add_parser(
        "train",
        description="Train CLIP on image-text pairs. Ctrl-C saves and stops; --resume continues.",
        epilog="Example: clipfast train --recipe emoji --name demo\nTo continue: clipfast train --resume runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = f"take options from a bundled recipe ({', '.join(list_recipes())}) or a TOML file; flags override them"
    parser.add_argument("--recipe", metavar="NAME", help=recipe)
    resume = (
        "continue a run, given by its folder or a checkpoint, or 'latest' with the run's --name, which begins the run "
        "if it has no checkpoint yet; it keeps the options that it was started with unless flags change them"
    )
    parser.add_argument("--resume", metavar="RUN", help=resume)
    add_arguments(parser)
    open_clip_flags.add_arguments(parser)
    shown = "print every option with its value and where that is from (default, recipe, checkpoint or flag), and stop"
    parser.add_argument("--print-config", action="store_true", help=shown)
    parser.add_argument("--traceback", "--debug", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, print ``results.json``, and return the exit code: 128 plus the signal if one interrupted the run."""
    own = ("command", "run", "traceback", "recipe", "resume", "print_config")
    given = _tuples({key: value for key, value in vars(args).items() if key not in own})
    options: dict[str, Any] = {}
    origins: dict[str, str] = {}
    checkpoint = None
    if args.resume is not None:
        checkpoint = _checkpoint(args.resume, given)
    if checkpoint is not None:
        options |= _trusted(_saved_options(checkpoint), given, checkpoint)
        origins |= dict.fromkeys(options, f"checkpoint {checkpoint}")
    if args.recipe is not None:
        recipe = _trusted(read_recipe(args.recipe, given.get("model", options.get("model"))), given, args.recipe)
        options, origins = options | recipe, origins | dict.fromkeys(recipe, f"recipe {args.recipe}")
        if checkpoint is None:
            options = {"name": f"{Path(args.recipe).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}"} | options
            origins.setdefault("name", "recipe and time")
    given = open_clip_flags.translated(given, options, resuming=checkpoint is not None)
    replaced = {REPLACED[key] for key in given if key in REPLACED}
    if "lr_scheduler" in given:  # what only the earlier schedule used could not be left out otherwise
        replaced |= {key for key, users in COOLDOWN_OPTIONS.items() if given["lr_scheduler"] not in users}
    options = {key: value for key, value in options.items() if key not in replaced}
    origins = {key: origin for key, origin in origins.items() if key not in replaced}
    options, origins = options | given, origins | dict.fromkeys(given, "flag")
    if args.print_config:
        # What is printed need not be complete: most recipes name no data.
        complete = TrainConfig(**({"train_data": "(needed)"} | options))
        print(describe(complete, origins | ({} if "train_data" in options else {"train_data": "nowhere"})))
        return 0
    if is_evaluation(options):
        return evaluate({"model": TrainConfig.model} | options)
    from .loop import train
    from .world import joined

    config = TrainConfig(**options)
    with joined(config.device, config.dist_timeout, by_rank=config.set_device_rank) as world:
        folder, signum = train(config, checkpoint, origins, world)
    if signum is not None:
        return 128 + signum
    if world.is_main:
        print((folder.path / "results.json").read_text())
    return 0


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``options`` with tuples in place of lists, as ``TrainConfig`` wants them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _checkpoint(resume: str, given: dict[str, Any]) -> Path | None:
    """Return the checkpoint that ``--resume`` names: a file, the latest of a folder, or the latest of ``--name``.

    There may be none of ``--name`` yet: one command starts a run, and goes on with it however often it is stopped.
    """
    from .run import RunFolder

    path = Path(resume)
    if resume == "latest":
        if "name" not in given:
            raise ValueError("--resume latest needs the run's --name; or give its folder: --resume runs/NAME")
        kept = RunFolder(Path(given.get("logs", "runs")) / given["name"]).kept()
        return kept[0] if kept else None
    if not path.exists():
        raise ValueError(f"no run to resume at {path}: there is neither a folder nor a checkpoint")
    if not path.is_dir():
        return path
    kept = RunFolder(path).kept()
    if not kept:
        raise ValueError(f"{path} holds no checkpoint to resume from")
    return kept[0]


def _saved_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the run that wrote ``checkpoint``; none if OpenCLIP wrote it."""
    from ..checkpoint import CheckpointError, read_checkpoint
    from .run import RunFolder

    path = checkpoint.resolve()
    in_run = path.parent.name == "checkpoints"
    try:
        options = _tuples(read_checkpoint(checkpoint).get("clipfast", {}).get("config", {}))
    except CheckpointError as error:
        others = [str(other) for other in RunFolder(path.parent.parent).kept() if other != path] if in_run else []
        raise CheckpointError(f"{error}{f'; the one before is {others[0]}' if others else ''}") from error
    if options and in_run:
        # The run continues where its checkpoint lies, even if the folder was moved or renamed.
        options |= {"logs": str(path.parent.parent.parent), "name": path.parent.parent.name}
    return options


def _trusted(options: dict[str, Any], given: dict[str, Any], source: object) -> dict[str, Any]:
    """Refuse data that is not local, and an optimizer that is imported, unless the user typed it.

    A recipe or a checkpoint may come from anybody, data that is not local may be opened by a shell command that
    contains its name, and to import a module runs it.
    """
    from ..data.samples import is_local

    for key in ("train_data", "val_data"):
        if key not in given and not is_local(str(options.get(key))):
            raise ValueError(
                f"{source} names data that is not local, {options[key]!r}: to use it, give {flag_name(key)} yourself"
            )
    if "opt" not in given and ":" in str(options.get("opt")):
        raise ValueError(f"{source} imports {options['opt']!r}: to use it, give --opt yourself")
    return options
