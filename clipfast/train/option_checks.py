"""Definition and checks of options, and the options by which ``clipfast train`` and other commands read pairs."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..data import Keys

AUTO = "auto"
MOST = 2**31 - 1  # the largest value of an integer option without a limit of its own
KEY_OPTIONS = ("image_key", "text_key", "json_text_key", "json_text_key_probs")
# The options by which commands other than ``clipfast train`` read pairs; they draw no random captions.
SOURCE_OPTIONS = ("image_key", "text_key", "json_text_key", "csv_separator")


def flag_name(field: str) -> str:
    """Return the flag of an option of training or another command: ``--batch-size`` for ``batch_size``."""
    return "--" + field.replace("_", "-")


def option(default: Any, text: str, kind: type = str, **limits: Any) -> Any:
    """Return the dataclass field of a training option.

    Args:
        default: value for runs that do not set the option.
        text: help text for ``--help``.
        kind: type of the value, or of each value if it is a tuple.
        limits: the limits that :func:`check_value` checks: ``choices``, ``positive``, ``not_negative``, ``most`` and
            ``below``. With ``auto=True``, "auto" is a value as well. ``aliases`` are further flags of the option.
    """
    return dataclasses.field(default=default, metadata={"help": text, "kind": kind, **limits})


def check_type(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError if a training option's value has the wrong type, as a recipe in TOML may give it."""
    kind, many, auto = field.metadata["kind"], isinstance(field.default, tuple), field.metadata.get("auto")
    if (value is None and field.default is None) or (auto and value == AUTO):
        return
    accepted = (int, float) if kind is float else kind
    values = value if many and isinstance(value, tuple) else (value,)
    right = all(isinstance(one, accepted) and (kind is bool or not isinstance(one, bool)) for one in values)
    if not right or isinstance(value, tuple) != many:
        expected = f"a list of {kind.__name__}" if many else kind.__name__
        expected += " or 'auto'" if auto else ""
        raise ValueError(f"{flag_name(field.name)} must be {expected}, got {value!r}")


def check_value(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError if a training option's value is beyond its limits, or not one of its choices."""
    meta, flag = field.metadata, flag_name(field.name)
    if "choices" in meta and value is not None and value not in meta["choices"]:
        raise ValueError(f"{flag} must be one of {', '.join(meta['choices'])}, got {value!r}")
    for one in value if isinstance(value, tuple) else (value,):
        if not isinstance(one, str | None):
            _check_number(flag, meta, one)


def _check_number(flag: str, meta: Mapping[str, Any], value: float) -> None:
    """Raise ValueError if a number is beyond the limits ``meta`` of a training option."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag} must be a finite number, got {value}")
    if "positive" in meta and value <= 0:
        raise ValueError(f"{flag} must be more than 0, got {value}")
    if "not_negative" in meta and value < 0:
        raise ValueError(f"{flag} must not be negative, got {value}")
    if "below" in meta and value >= meta["below"]:
        raise ValueError(f"{flag} must be less than {meta['below']}, got {value}")
    most = meta.get("most", MOST if isinstance(value, int) else math.inf)
    if value > most:
        raise ValueError(f"{flag} must be at most {most}, got {value}")


def keys_of(options: Mapping[str, Any]) -> "Keys":
    """Return the keys under which a pair has its image and captions, from options of training or another command.

    Raises:
        ValueError: the options contradict each other.
    """
    from ..data import read_keys

    return read_keys(**{name: options[name] for name in KEY_OPTIONS if name in options})


def source_command(words: Iterable[str], options: Mapping[str, Any]) -> str:
    """Return a command line "clipfast WORDS ..." with the flags by which these ``options`` read pairs, to be copied."""
    line = ["clipfast", *words]
    for name in SOURCE_OPTIONS:
        value = options.get(name) or ()
        line += [flag_name(name), *([value] if isinstance(value, str) else value)] if value else []
    return shlex.join(line)


def separator_of(options: Mapping[str, Any]) -> str | None:
    """Return the separator of CSV files from options of training or another command; None if the headers decide.

    Raises:
        ValueError: the option's value cannot be a separator.
    """
    from ..data import read_separator

    return read_separator(options.get("csv_separator"))
