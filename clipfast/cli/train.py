"""``clipfast train``: combine its flags with the options of a recipe or a checkpoint, and train.

OpenCLIP's training command only evaluates if it is given no training data. ``clipfast train`` then calls
``clipfast eval``.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..io.files import local_path
from ..train.naflex_options import NaFlexOptions
from ..train.option_checks import flag_name
from ..train.recipes import describe, list_recipes, read_recipe
from ..train.train_config import COOLDOWN_OPTIONS, FP8_OPTIONS, REPLACED, TrainConfig
from . import open_clip_flags
from .options import add_arguments

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..checkpoints.of_run import Found

BY_TIME = "recipe and time"  # the origin of the run's name in ``params.txt`` if the user did not give one


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast train``. Values are checked when the command runs."""
    parser = commands.add_parser(
        "train",
        description="Train CLIP on image-text pairs. Ctrl-C saves and stops; --resume continues.",
        epilog="Example: clipfast train --recipe emoji --name demo\nTo continue: clipfast train --resume runs/demo",
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
    shown = "print every option with its value and its origin (default, recipe, checkpoint or flag), and stop"
    parser.add_argument("--print-config", action="store_true", help=shown)
    parser.runs(run, "--debug")


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast train``: train, print ``results.json``, and return the exit code; after a signal it is 0."""
    own = ("command", "run", "traceback", "recipe", "resume", "print_config")
    given = _tuples({key: value for key, value in vars(args).items() if key not in own})
    start = _start(args, given)
    options, origins = start.options, start.origins
    if args.print_config:
        # ``TrainConfig`` raises an error without training data, which most recipes do not name.
        complete = TrainConfig(**({"train_data": "(needed)"} | options))
        print(describe(complete, origins | ({} if "train_data" in options else {"train_data": "nowhere"})))
        return 0
    if is_evaluation(options):
        weights = {} if start.checkpoint is None else {"pretrained": str(start.checkpoint)}
        return evaluate({"model": TrainConfig.model} | options | weights)
    from ..distributed.world import INDEXING, joined, restarts
    from ..train.loop import train

    config = TrainConfig(**options)
    with joined(config.device, config.dist_timeout, by_rank=config.set_device_rank) as world:
        is_restart = world.sum([restarts()]) != [0]  # torchrun may have restarted the processes of some machines only
        is_copied = bool(config.remote_sync) and (is_restart or args.resume == "latest")
        downloaded = world.on_main(lambda: _restore(config), INDEXING) if is_copied else []
        if is_restart or is_copied:
            start = _start(args, given, is_restart=is_restart)
            start.warnings[:0] = downloaded
            config = TrainConfig(**start.options)
        folder, signum = train(config, start.checkpoint, start.origins, world, start.warnings)
    if world.is_main and signum is None:
        print((folder.path / "results.json").read_text())
    return 0


class _Start(NamedTuple):
    """All that starts a training run: options, their origins, the checkpoint to resume from, and warnings to log."""

    options: dict[str, Any]
    origins: dict[str, str]
    checkpoint: Path | None
    warnings: list[str]


def _start(args: argparse.Namespace, given: dict[str, Any], *, is_restart: bool = False) -> _Start:
    """Find checkpoint and options of ``clipfast train``; a restart by torchrun takes the newest checkpoint."""
    found = _named(args.resume, given)
    start = _composed(args, given, found)
    if is_restart and "name" in start.options:
        newest = _newest(_run_folder(start.options), or_remote=bool(start.options.get("remote_sync")))
        if newest.path is not None:
            start = _composed(args, given, newest)
    if start.origins.get("name", BY_TIME) == BY_TIME and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError(
            "torchrun --max-restarts runs the same command again, which must find the run; the default name contains "
            "the time, and would be of another run: give --name"
        )
    return start


def _composed(args: argparse.Namespace, given: dict[str, Any], found: "Found") -> _Start:
    """Combine the options of ``clipfast train``: a recipe's options replace a checkpoint's, and flags replace both.

    ``given`` are the flags, and ``found`` the checkpoint to resume from, if any.
    """
    options: dict[str, Any] = {}
    origins: dict[str, str] = {}
    checkpoint = found.path
    if checkpoint is not None:
        options |= _trusted(_saved_options(checkpoint, found.content), given, checkpoint)
        origins |= dict.fromkeys(options, f"checkpoint {checkpoint}")
    if args.recipe is not None:
        recipe = _trusted(read_recipe(args.recipe, given.get("model", options.get("model"))), given, args.recipe)
        options, origins = options | recipe, origins | dict.fromkeys(recipe, f"recipe {args.recipe}")
        if checkpoint is None:
            options = {"name": f"{Path(args.recipe).stem}-{time.strftime('%Y_%m_%d-%H_%M_%S')}"} | options
            origins.setdefault("name", BY_TIME)
    given = open_clip_flags.translated(given, options, resuming=checkpoint is not None)
    replaced = {REPLACED[key] for key in given if key in REPLACED}
    if "lr_scheduler" in given:  # options of the recipe or checkpoint for another schedule are dropped
        replaced |= {key for key, users in COOLDOWN_OPTIONS.items() if given["lr_scheduler"] not in users}
    if given.get("precision", "amp_fp8") != "amp_fp8":
        replaced |= {*FP8_OPTIONS}
    if given.get("use_naflex") is False:
        replaced |= {field.name for field in dataclasses.fields(NaFlexOptions)}
    options = {key: value for key, value in options.items() if key not in replaced}
    origins = {key: origin for key, origin in origins.items() if key not in replaced}
    damaged = [f"{line}; the run goes on from {checkpoint}" if checkpoint else line for line in found.damaged]
    return _Start(options | given, origins | dict.fromkeys(given, "flag"), checkpoint, damaged)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of training options with tuples in place of lists, as ``TrainConfig`` requires."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _run_folder(options: dict[str, Any]) -> Path:
    """Return the folder of a run, LOGS/NAME, from the options of ``clipfast train``."""
    return Path(options.get("logs", TrainConfig.logs)) / options["name"]


def _restore(config: TrainConfig) -> list[str]:
    """Download the newest checkpoint from ``--remote-sync`` if no local checkpoint is as new; return log lines."""
    from ..runs.folder import RunFolder
    from ..train.remote_sync import RemoteCopy

    return RemoteCopy(RunFolder(_run_folder(vars(config))), config.remote_sync or "").restore()


def _named(resume: str | None, given: dict[str, Any]) -> "Found":
    """Return the checkpoint that ``--resume`` names: a file, or the newest complete one of a run.

    With "latest", the run is that of ``--name``, which may have no checkpoint yet. Therefore the same command can begin
    a run, and resume it when it is repeated.
    """
    from ..checkpoints.checkpoint import CheckpointError
    from ..checkpoints.of_run import Found, read_saved
    from ..runs.folder import RunFolder

    if resume is None:
        return Found(None, {}, [])
    if resume == "latest":
        if "name" not in given:
            raise ValueError("--resume latest needs the run's --name; or give its folder: --resume runs/NAME")
        found = _newest(_run_folder(given), or_remote=bool(given.get("remote_sync")))
        return found if found.path else Found(None, {}, [f"{_run_folder(given)} has no checkpoint yet: the run begins"])
    path = local_path(resume)
    if path.name == "checkpoints" and not (path / path.name).is_dir():
        path = path.parent
    if not path.exists():
        raise ValueError(f"no run to resume at {path}: there is neither a folder nor a checkpoint")
    if path.is_dir() and not _is_in_parts(path):
        found = _newest(path)
        if found.path is None:
            raise ValueError(f"{path} holds no checkpoint to resume from")
        return found
    try:
        return Found(path, read_saved(path, tensors=False), [])
    except CheckpointError as error:
        kept = RunFolder(path.resolve().parent.parent).kept() if _is_in_run(path) else []
        others = [str(other) for other in kept if not other.samefile(path)]
        raise CheckpointError(f"{error}{f'; the one before is {others[0]}' if others else ''}") from error


def _newest(folder: Path, *, or_remote: bool = False) -> "Found":
    """Return the newest complete checkpoint of a run for ``--resume``; if there is none, ``or_remote`` avoids an error.

    A run with a remote copy may have its checkpoints only there.
    """
    from ..checkpoints.checkpoint import CheckpointError
    from ..checkpoints.of_run import Checkpoints, Found
    from ..runs.folder import RunFolder

    try:
        return Checkpoints(RunFolder(folder).checkpoints).newest_whole()
    except CheckpointError:
        if not or_remote:
            raise
        return Found(None, {}, [])


def _is_in_parts(folder: Path) -> bool:
    """Return True if a folder given to ``--resume`` is a sharded checkpoint (``step_N``), and not a run's folder."""
    from ..checkpoints.of_run import STEP

    return STEP.fullmatch(folder.resolve().name) is not None and not (folder / "checkpoints").exists()


def _is_in_run(checkpoint: Path) -> bool:
    """Return True if the checkpoint that ``clipfast train`` resumes is in the folder ``checkpoints`` of a run."""
    return checkpoint.resolve().parent.name == "checkpoints"


def _saved_options(checkpoint: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the options for ``clipfast train`` that a checkpoint holds; {} if OpenCLIP wrote it."""
    options = _tuples(content.get("clipfast", {}).get("config", {}))
    if options and _is_in_run(checkpoint):
        # The run continues in the folder of its checkpoint, even if the folder was moved or renamed.
        run = checkpoint.resolve().parent.parent
        options["name"] = options.get("name") or run.name  # a name that the user did not give is not in the options
        if _run_folder(options).resolve() != run:  # otherwise the path stays as it was given, for example relative
            options |= {"logs": str(run.parent), "name": run.name}
    return options


def _trusted(options: dict[str, Any], given: dict[str, Any], source: object) -> dict[str, Any]:
    """Return the options of a recipe or checkpoint ``source``, unless some are unsafe and the user has not given them.

    A recipe or a checkpoint may come from an untrusted source. Remote data may be opened by a shell command that
    contains its name, the import of an optimizer's module runs its code, and a remote copy gives away all results.

    Raises:
        ValueError: an unsafe option is not among the flags ``given``.
    """
    from ..data.names import is_local

    for key in ("train_data", "val_data"):
        if key not in given and not is_local(str(options.get(key))):
            raise ValueError(
                f"{source} names data that is not local, {options[key]!r}: to use it, give {flag_name(key)} yourself"
            )
    if "opt" not in given and ":" in str(options.get("opt")):
        raise ValueError(f"{source} imports {options['opt']!r}: to use it, give --opt yourself")
    if "remote_sync" not in given and options.get("remote_sync"):
        raise ValueError(
            f"{source} copies the run to {options['remote_sync']}: give --remote-sync yourself to keep this copy, or "
            "--remote-sync '' for none"
        )
    return options


SETS = ("val_data", "imagenet_val", "imagenet_v2")  # options that name data to evaluate on
PASSED = (  # options that clipfast eval has too
    "model", "pretrained", "cache_dir", "tokenizer", "device", "backend", "image_key", "text_key", "json_text_key",
    "csv_separator",
)  # fmt: skip
UNKNOWN = (  # options that clipfast eval does not have, but which would change its results
    "force_quick_gelu", "force_image_size", "force_context_length", "image_mean", "image_std", "image_interpolation",
    "image_resize_mode",
)  # fmt: skip


def is_evaluation(options: Mapping[str, Any]) -> bool:
    """Return True if training options name data to evaluate on, and no data to train on."""
    return "train_data" not in options and any(options.get(name) for name in SETS)


def commands(options: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the arguments of ``clipfast eval`` for each set that the training options name.

    Raises:
        ValueError: ``clipfast eval`` does not have one of the options.
    """
    from ..evaluate.imagenet import imagenet_set

    unknown = ", ".join(flag_name(name) for name in UNKNOWN if options.get(name))
    if unknown:
        raise ValueError(
            f"without --train-data this only evaluates, and clipfast eval does not have {unknown}: give the model as "
            "local-dir:FOLDER, whose open_clip_config.json sets this"
        )
    if options.get("naflex_patch_sizes"):
        raise ValueError(
            "without --train-data this only evaluates, with patches of the model's own size: leave out "
            "--naflex-patch-sizes"
        )
    passed = ["eval", "zeroshot"]
    if options.get("naflex_seq_lens"):
        passed += ["--image-seq-len", str(max(options["naflex_seq_lens"]))]
    for name in PASSED:
        value = options.get(name)
        if value:
            passed += [flag_name(name), *(value if isinstance(value, tuple) else (str(value),))]
    for name in SETS:
        if name == "val_data" and options.get(name):
            yield [*passed, "--data", options[name]]
        elif options.get(name):
            folder = imagenet_set(options[name]).data
            yield [*passed, "--data", folder, "--classnames", "imagenet", "--templates", "openai"]


def evaluate(options: Mapping[str, Any]) -> int:
    """Run ``clipfast eval`` for each set that the training options name, and return the exit code.

    Raises:
        ValueError: see :func:`commands`.
    """
    from .main import main

    return max(map(main, list(commands(options))))
