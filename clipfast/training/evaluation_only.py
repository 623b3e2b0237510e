"""Commands of OpenCLIP that name no training data: these only evaluate, which is ``clipfast eval`` here."""

from collections.abc import Iterator, Mapping
from typing import Any

from .options import flag_name

SETS = ("val_data", "imagenet_val", "imagenet_v2")
PASSED = (
    "model", "pretrained", "cache_dir", "tokenizer", "device", "backend", "image_key", "text_key", "json_text_key",
    "csv_separator",
)  # fmt: skip
UNKNOWN = (  # to clipfast eval, though they change what is computed
    "force_quick_gelu", "force_image_size", "force_context_length", "image_mean", "image_std", "image_interpolation",
    "image_resize_mode",
)  # fmt: skip


def is_evaluation(options: Mapping[str, Any]) -> bool:
    """Return True if options name data to evaluate on, and none to train on."""
    return "train_data" not in options and any(options.get(name) for name in SETS)


def commands(options: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the command for each set that the options name, without the name of the program.

    Raises:
        ValueError: ``clipfast eval`` does not have one of the options.
    """
    from ..evaluation.imagenet import imagenet_set

    unknown = ", ".join(flag_name(name) for name in UNKNOWN if options.get(name))
    if unknown:
        raise ValueError(
            f"without --train-data this only evaluates, and clipfast eval does not have {unknown}: give the model as "
            "local-dir:FOLDER, whose open_clip_config.json says it"
        )
    passed = ["eval", "zeroshot"]
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
    """Run ``clipfast eval`` for each set, which prints the results, and return the exit code.

    Raises:
        ValueError: as above.
    """
    from ..cli import main
    from .build import registered

    return max(map(main, list(commands({**options, "model": registered(str(options["model"]))}))))
