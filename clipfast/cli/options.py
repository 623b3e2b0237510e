"""Command-line flags of the training options, for ``clipfast train`` and for commands that share some of them."""

import argparse
import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from ..train.option_checks import AUTO, flag_name
from ..train.train_config import TrainConfig

# This maps the first option of each group in ``clipfast train --help`` to the title of the group.
GROUPS = {
    "train_data": "training data", "use_naflex": "images in their own aspect (NaFlex)", "model": "model and loss",
    "batch_size": "optimisation", "precision": "memory and speed", "fsdp": "distributed training",
    "backend": "kernels and reading", "keyword_prob": "augmentation and decoding",
    "val_data": "evaluation during training", "max_bad_fraction": "checkpoints and failures",
    "log_every_n_steps": "logging",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add a flag for each training option, or only for the options in ``only``.

    A flag that is not given leaves no attribute in the namespace, so a recipe's value or the default is used.
    """
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(TrainConfig):
        if only is None and field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if only is not None and field.name not in only:
            continue
        meta, default, choices = field.metadata, field.default, field.metadata.get("choices")
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": meta["help"]}
        if only is not None:  # the remark on --val-data is left out, since only ``clipfast train`` has that option
            options["help"] = meta["help"].replace("; in --val-data, the default ones follow", "")
        if meta["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = meta["kind"]
            options["type"] = functools.partial(_number_or_auto, kind) if "auto" in meta else kind
            options |= {"choices": choices, "metavar": None if choices else meta["kind"].__name__.upper()}
            options["help"] += f" (default: {shown})" if shown else ""
        if isinstance(default, tuple):
            options["nargs"] = len(default) or "*"
        if "separator" in meta:
            options |= {"action": _Separated, "type": str}
        group.add_argument(flag_name(field.name), *meta.get("aliases", ()), **options)


class _Separated(argparse.Action):
    """The argparse action of an option with several values, which may be separate words or joined as in OpenCLIP."""

    def __call__(
        self, _: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, __: str | None = None
    ) -> None:
        meta = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}[self.dest]
        words = [word for value in values for word in value.split(meta["separator"])]
        try:
            setattr(namespace, self.dest, [meta["kind"](word) for word in words])
        except ValueError:
            kind = meta["kind"].__name__
            raise argparse.ArgumentError(self, f"needs {kind} values, got {' '.join(values)!r}") from None


def _number_or_auto(kind: type[int] | type[float], text: str) -> float | str:
    """Parse the value of a training option that takes a number or "auto"."""
    try:
        return text if text == AUTO else int(text) if kind is int or text.isdecimal() else kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} or 'auto', got {text!r}") from None
