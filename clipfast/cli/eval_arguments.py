"""The arguments that the tasks of ``clipfast eval`` share, loading of models and data, and output of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..evaluate.results import DEFAULT_TEMPLATES, report_left_out, result_about
from ..io.files import local_path
from ..io.text import meant
from ..train.option_checks import SOURCE_OPTIONS, keys_of, separator_of
from .arguments import BATCH, CACHE_DIR, DIST_TIMEOUT, DRAWN, TABLE, TOKENIZER, WORKERS, add_output, folder
from .options import add_arguments

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..distributed.world import World
    from ..evaluate.encoder import Encoder
    from ..evaluate.features import LabelledFeatures
    from ..evaluate.labelled import LabelledSet
    from ..evaluate.store import FeatureStore

DATA_HELP = (
    "image folder with a sub-folder per class, or pairs as --train-data of clipfast train takes them; "
    "'bundled:emoji/fluent' ships with the package, 'synthetic:2048' is drawn"
)


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True, several: bool = False) -> None:
    """Add ``--model``, ``--pretrained`` and other arguments that choose the model; ``several`` allows more than one."""
    add = parser.add_argument
    model = "folder of a run (its newest checkpoint, if it is not finished) or of a model, .pt file, model name, "
    model += "OpenCLIP's JSON file of a model, hf-hub:ORG/REPO, or open_clip:NAME for any model that OpenCLIP builds"
    if several:
        add("--model", nargs="+", default=[], help=f"{model}; NAME,TAG is a model name with its weights")
    else:
        add("--model", required=required, help=model)
    weights = "weights of a model name: a tag of clipfast list-pretrained, or a checkpoint (.pt, .bin, .safetensors)"
    add("--pretrained", metavar="TAG", help=weights)
    add("--cache-dir", **CACHE_DIR)
    add("--tokenizer", **TOKENIZER)
    patches = "most patches of an image, for NaFlex models, which keep the aspect (default: the model's, or else 1024)"
    add("--image-seq-len", type=BATCH, help=patches)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and the arguments that say how an evaluation reads it."""
    parser.add_argument("--data", required=True, help=DATA_HELP)
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how an evaluation reads labelled sets: keys, separator, label and group."""
    add_arguments(parser, SOURCE_OPTIONS)
    label = "column or json key that names the class (default: the caption)"
    parser.add_argument("--label-by", metavar="KEY", help=label)
    group = "column or json key that names the group of an image; KEY+KEY crosses them"
    parser.add_argument("--group-by", metavar="KEY", help=group)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--classnames`` and ``--templates``, from which an evaluation makes zero-shot prompts."""
    names = "'imagenet', or a text file with one name per class, in their order (default: the labels)"
    parser.add_argument("--classnames", metavar="FILE", help=names)
    add_templates_argument(parser)


def add_templates_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--templates``, the prompt templates."""
    templates = "prompts to average: plain, simple (7), openai (80), or a text file with one template per line"
    default = f"{templates} (default: {DEFAULT_TEMPLATES})"
    parser.add_argument("--templates", default=DEFAULT_TEMPLATES, metavar="NAME", help=default)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``--device``."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto for a GPU if there is one (default: auto)")


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``--backend``, which selects the implementation of the ops."""
    backends = ("auto", "triton", "torch")
    parser.add_argument("--backend", default="auto", choices=backends, help="implementation of the ops (default: auto)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an evaluation for features, batch size, workers, device and outputs."""
    add = parser.add_argument
    kept = "folder that keeps features, so that a stopped task goes on where it was, and later tasks use them again"
    add("--features", type=folder, metavar="FOLDER", help=kept)
    add("--batch-size", type=BATCH, default=256, help="images to encode at once (default: 256)")
    add("--workers", type=WORKERS, default=0, help="processes that read and decode images (default: 0)")
    add_device_argument(parser)
    add_backend_argument(parser)
    add("--dist-timeout", **DIST_TIMEOUT)
    add_output(parser, "--json", help="also write the results to this file")
    add("--table", **TABLE)
    plot = "also draw the results, in the format that the name ends in, such as .png, .svg or .pdf"
    add_output(parser, "--plot", ends=DRAWN, help=plot)


def add_watch_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--watch`` and its arguments, to evaluate the checkpoints of a training run.

    ``name`` is the file in the run's folder to which results are written.
    """
    add = parser.add_argument
    watched = "evaluate each checkpoint of a run that is being trained, as it appears, until the run is finished"
    add("--watch", type=local_path, metavar="RUN", help=f"in place of --model: {watched}; lines go to RUN/{name}")
    add("--interval", type=float, metavar="SECONDS", help="time between two looks at RUN (default: 30)")
    raw = "the weights themselves where a checkpoint of RUN also has their average (EMA)"
    add("--raw", action="store_true", help=f"evaluate {raw}")


def check_unwatched(args: argparse.Namespace) -> None:
    """Check the arguments of an evaluation without ``--watch``.

    Raises:
        ValueError: there is no ``--model``, or a flag needs ``--watch``.
    """
    if not args.model:
        raise ValueError("--model or --watch is needed: the model or the run to evaluate")
    if args.raw or args.interval is not None:
        name = "--raw" if args.raw else "--interval"
        raise ValueError(f"{name} is for the checkpoints of a run: give --watch RUN in place of --model")


class Session(NamedTuple):
    """The loaded models, the feature store and the ranks of a task of ``clipfast eval``.

    Attributes:
        encoders: the models.
        store: the store of features; None if features are not kept.
        world: the ranks that share the work.
    """

    encoders: Sequence[Encoder]
    store: FeatureStore | None
    world: World

    @property
    def encoder(self) -> Encoder:
        """The first model, for tasks with a single model."""
        return self.encoders[0]


@contextlib.contextmanager
def session(args: argparse.Namespace, models: Sequence[tuple[str, str]] = ()) -> Iterator[Session]:
    """Join the process group of an evaluation, if there are several ranks, and load its models.

    Models with equal preprocessing get the same transform object, so that images are transformed only once for them.

    Args:
        args: arguments of a task.
        models: names and weights of several models, as :func:`named_models` returns them; by default, the model that
            ``args`` name.

    Raises:
        ValueError: a model, its weights or the device cannot be used.
    """
    from ..distributed.world import joined
    from ..evaluate.store import FeatureStore

    with joined(args.device, args.dist_timeout) as world:
        named = models or [(args.model, args.pretrained)]
        encoders = [load_encoder(args, name, weights or None, world) for name, weights in named]
        transforms: dict[str, Any] = {}
        for encoder in encoders:
            encoder.transform = transforms.setdefault(repr(encoder.transform), encoder.transform)
        yield Session(encoders, None if args.features is None else FeatureStore(args.features), world)


def load_encoder(args: argparse.Namespace, model: str, pretrained: str | None, world: World) -> Encoder:
    """Load a model for an evaluation as an encoder; device, tokenizer and other options are those of the arguments.

    Raises:
        ValueError: the model, its weights or the device cannot be used.
    """
    from ..evaluate.encoder import Encoder

    return Encoder.load(
        model, pretrained, device=str(world.device(args.device)), tokenizer_file=args.tokenizer,
        cache_dir=args.cache_dir, backend=args.backend, image_seq_len=args.image_seq_len,
    )  # fmt: skip


def named_models(given: Sequence[str], pretrained: str | None) -> list[tuple[str, str]]:
    """Return name and weights of each model of ``--model``; the weights are "" if the name implies them.

    Args:
        given: values of ``--model``: NAME or NAME,TAG.
        pretrained: the weights of models without a tag.

    Raises:
        ValueError: the results of two models would have the same name.
    """
    from ..evaluate.suite import file_name, label

    models: list[tuple[str, str]] = []
    for text in given:
        name, _, tag = (text, "", "") if ":" in text or Path(text).exists() else text.partition(",")
        models.append((name, tag or pretrained or ""))
    names: dict[str, tuple[str, str]] = {}
    for model in models:
        other = names.setdefault(file_name("", *model, ""), model)
        if other is not model:
            raise ValueError(f"results of {label(*other)} and {label(*model)} would have the same file names")
    return models


def labelled_set(args: argparse.Namespace, data: str | None = None) -> LabelledSet:
    """Return the labelled set of ``--data``, or of ``data`` in its place, with the keys that the arguments name.

    Raises:
        ValueError: the arguments do not fit together, or a folder has not as many classes as there are class names.
    """
    from ..evaluate.evaluate import names_of
    from ..evaluate.labelled import LabelledSet

    options = vars(args)
    keys, separator = keys_of(options), separator_of(options)
    images = LabelledSet(data or args.data, args.group_by, args.label_by, keys=keys, separator=separator)
    given = None if data else read_classnames(options.get("classnames"))
    labels = given and images.folder_labels()
    if labels:  # a wrong number of class names is an error now, and not only after hours of encoding
        names_of(labels, given)
    return images


def encoded(args: argparse.Namespace, at: Session, images: LabelledSet) -> LabelledFeatures:
    """Encode a labelled set by the model of ``clipfast eval``, and print images that cannot be used.

    On ranks other than 0, the result has no features.

    Raises:
        ValueError: the set cannot be read, or not one of its images can be used.
    """
    return encoded_by(args, at, at.encoders, images)[0]


def encoded_by(
    args: argparse.Namespace, at: Session, encoders: Sequence[Encoder], images: LabelledSet, *, report: bool = True
) -> list[LabelledFeatures]:
    """Encode a labelled set by each of several models; features are empty on ranks other than 0.

    Args:
        args: arguments with batch size and workers.
        at: session with the feature store and the ranks.
        encoders: the models.
        images: the labelled set.
        report: print the left-out images on stderr.

    Raises:
        ValueError: the set cannot be read, or not one of its images can be used.
    """
    from ..evaluate.features import LabelledFeatures, encode_set

    found = encode_set(
        encoders, images, batch_size=args.batch_size, workers=args.workers, store=at.store, world=at.world
    )
    if found and report:
        report_left_out(found[0].left_out.values())
    return found or [LabelledFeatures.empty()] * len(encoders)


def result_of(args: argparse.Namespace, task: str, metrics: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the results of an evaluation under CLIP_benchmark's keys, with data and model from the arguments."""
    return result_about(args.data, args.model, args.pretrained, task, metrics, **more)


def write_results(
    args: argparse.Namespace, results: dict[str, Any], table: Callable[[dict[str, Any]], str], shown: Path | None = None
) -> None:
    """Print the results of an evaluation as JSON, or as a table with ``--table``; write JSON to the file of ``--json``.

    Args:
        args: arguments of the command.
        results: results as plain values.
        table: a function that formats the results as text.
        shown: the HTML page that was written with the results; if there is one, JSON is not printed.

    Raises:
        DiskFullError: there is no space for the file.
    """
    from ..io.files import replace_text

    text = json.dumps(results, indent=2)
    if args.table or shown is None:
        print(table(results) if args.table else text)
    if args.json:
        replace_text(args.json, text + "\n")


def read_templates(name: str) -> tuple[str, ...]:
    """Return the prompt templates that the value of ``--templates`` names: "plain", "simple", "openai", or a file.

    Raises:
        ValueError: there is no such file, it is empty, or a template has no place for the class name.
    """
    from ..evaluate.zero_shot import TEMPLATES

    if name in TEMPLATES:
        return TEMPLATES[name]
    templates = _lines(name, f"--templates must be one of {', '.join(TEMPLATES)} or a file{meant(name, TEMPLATES)}")
    lacking = [template for template in templates if "{}" not in template]
    if lacking:
        raise ValueError(f"template {lacking[0]!r} in {name} has no {{}} for the class name")
    return templates


def read_classnames(name: str | None) -> tuple[str, ...] | None:
    """Return the class names that the value of ``--classnames`` names, "imagenet" or a file; None for None.

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    from ..evaluate.zero_shot import IMAGENET_CLASSNAMES

    if name is None:
        return None
    return IMAGENET_CLASSNAMES if name == "imagenet" else _lines(name, "--classnames must be 'imagenet' or a file")


def read_texts(path: Path, flag: str = "--queries") -> tuple[str, ...]:
    """Return the texts in a file with one text per line, which is the value of the option ``flag``.

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    return _lines(str(path), f"{flag} must be a file")


def _lines(path: str, otherwise: str) -> tuple[str, ...]:
    """Return the non-empty lines of a text file; if there is no such file, raise an error with text ``otherwise``."""
    if not Path(path).is_file():
        raise ValueError(f"{otherwise}, got {path!r}")
    try:
        text = Path(path).read_text("utf-8-sig")  # editors of Windows write a byte order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def check_watch(args: argparse.Namespace, refused: Iterable[str]) -> float:
    """Check the arguments of an evaluation with ``--watch``.

    Args:
        args: arguments of the evaluation.
        refused: names of the flags that cannot be used with ``--watch``.

    Returns:
        The number of seconds between two checks of the run's folder.

    Raises:
        ValueError: there is no run, a flag cannot be used, or the interval is not positive.
    """
    from ..evaluate.watch import INTERVAL
    from ..runs.status import is_run

    given = [flag for flag in refused if getattr(args, flag)]
    if given:
        raise ValueError(f"--watch cannot be used with --{given[0].replace('_', '-')}")
    if not is_run(args.watch):
        raise ValueError(f"--watch {args.watch}: there is no run in that folder")
    interval: float = INTERVAL if args.interval is None else args.interval
    if not 0 < interval < math.inf:
        raise ValueError(f"--interval must be more than 0, and finite, got {interval}")
    return interval
