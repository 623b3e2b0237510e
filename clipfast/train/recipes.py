"""Training recipes, which are sets of options in TOML files, and ``params.txt``, which lists the options of a run."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..io.text import meant
from .option_checks import flag_name
from .train_config import TrainConfig

BY_MODEL = "by_model"  # a recipe's TOML table that holds tables by model, each with options for that model only


def list_recipes() -> list[str]:
    """Return the names of the training recipes that ship with the package."""
    return sorted(path.name.removesuffix(".toml") for path in files("clipfast").joinpath("recipes").iterdir())


def read_recipe(name: str, model: str | None = None) -> dict[str, Any]:
    """Return the training options that a bundled recipe or a TOML file sets.

    Args:
        name: name of the recipe, or the path of the file.
        model: the model to train, if it is not the one that the recipe names. The options in the recipe's table
            ``by_model`` apply only to the model under whose name they stand.

    Raises:
        ValueError: there is no such recipe or file, it is not TOML, or one of its keys is not an option.
    """
    source = files("clipfast").joinpath(f"recipes/{name}.toml") if name in list_recipes() else Path(name)
    if not source.is_file():
        known = list_recipes()
        raise ValueError(f"no recipe {name!r}{meant(name, known)}: neither a file nor one of {', '.join(known)}")
    try:
        raw = tomllib.loads(source.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name} is not TOML: {error}") from error
    tables = raw.pop("by-model", raw.pop(BY_MODEL, {}))
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError(f"recipe {name}: {BY_MODEL} must hold a table for each model, such as [{BY_MODEL}.RN50]")
    options = _options(name, raw)
    special = {key: _options(name, table) for key, table in tables.items()}
    return options | special.get(model or options.get("model", ""), {})


def _options(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a TOML table of a recipe to training options; raise ValueError if a key is not an option."""
    options = {key.replace("-", "_"): tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    unknown = set(options) - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ValueError(f"recipe {name} has unknown options: {', '.join(sorted(unknown))}")
    return options


def describe(config: TrainConfig, origins: Mapping[str, str]) -> str:
    """Return the text of ``params.txt``: all options of a run, one a line, each with its value and its origin.

    Args:
        config: the options.
        origins: the origin of each option that is not at its default. An option that is not in ``origins`` and differs
            from its default was given in Python.
    """
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        otherwise = "default" if value == field.default else "given"
        rows.append((flag_name(field.name), shown, origins.get(field.name, otherwise)))
    width = max(len(flag) for flag, *_ in rows)
    return "\n".join(f"{flag:<{width}}  {shown:<16}  ({origin})" for flag, shown, origin in rows)
