"""The tags of published weights: which repository of the Hugging Face hub each is in, and how its images are prepared.

The facts are in ``assets/pretrained.toml``. The names of models and tags, and the functions here, are OpenCLIP's.
"""

import dataclasses
import functools
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..io.text import meant
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from ..models import CLIPConfig, get_model_config, list_models
from ..models.registry import QUICK_GELU_SUFFIX
from ..models.siglip import IMAGE_MEAN, IMAGE_STD
from .hub import fetch
from .open_clip_folder import WEIGHTS_NAMES

# This maps each note in ``pretrained.toml`` to the settings that it changes in a configuration.
_NOTES: dict[str, dict[str, Any]] = {
    "quick_gelu": {"quick_gelu": True},
    "half": {"mean": IMAGE_MEAN, "std": IMAGE_STD},
    "squash": {"resize_mode": "squash"},
}


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    """Read the table of published weights: the configuration of each tag of each model."""
    raw = tomllib.loads(files("clipfast").joinpath("assets/pretrained.toml").read_text(encoding="utf-8"))
    table = {model: {tag: _entry(value) for tag, value in tags.items()} for model, tags in raw.items()}
    for model, tags in list(table.items()):
        quick = {tag: entry for tag, entry in tags.items() if entry.get("quick_gelu")}
        if quick:
            table[model + QUICK_GELU_SUFFIX] = quick
    return table


def _entry(value: str) -> dict[str, Any]:
    """Return the configuration of a tag from its line in the table: a repository, and notes on unusual settings."""
    repository, *notes = value.split()
    entry = {"hf_hub": f"{repository}/", "mean": CLIP_MEAN, "std": CLIP_STD}
    entry |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    for note in notes:
        entry |= _NOTES[note]
    return entry


def _known() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the part of the table of published weights whose models clipfast can build."""
    built = set(list_models())
    return {model: tags for model, tags in _table().items() if model in built}


def _clean(tag: str) -> str:
    """Return the spelling of a tag by which it is looked up: in lower case, and with underscores for hyphens."""
    return tag.lower().replace("-", "_")


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """Return the pairs of model and tag that :func:`clipfast.create_model` takes, as "model:tag" if ``as_str``."""
    pairs = [(model, tag) for model, tags in _known().items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """Return the tags of a model's published weights; an empty list if there are none."""
    return list(_known().get(model.replace("/", "-"), {}))


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """Return the models that have weights of a tag; an empty list if there are none."""
    return [model for model, tags in _known().items() if _clean(tag) in tags]


def get_pretrained_cfg(model: str, tag: str) -> dict[str, Any]:
    """Return the configuration of the weights of a tag; an empty dict if the model has no such tag.

    Returns:
        ``hf_hub`` ("ORG/REPO/", the repository); ``mean``, ``std``, ``interpolation`` and ``resize_mode`` of images;
        and ``quick_gelu`` if the weights were trained with QuickGELU.
    """
    return dict(_known().get(model.replace("/", "-"), {}).get(_clean(tag), {}))


def find_pretrained(model: str | None = None, tag: str | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the model, the tag and the configuration of all weights, or of those of one model or tag.

    Raises:
        ValueError: no weights match.
    """
    found = [
        (known, each, get_pretrained_cfg(known, each))
        for known in (list_models() if model is None else [model.replace("/", "-")])
        for each in list_pretrained_tags_by_model(known)
        if tag is None or each == _clean(tag)
    ]
    if not found:
        tags = list_pretrained_tags_by_model(model) if model is not None else []
        hint = f"; {model} has the tags {', '.join(tags)}" if tags else ": clipfast list-pretrained shows what there is"
        wanted = " ".join(name for name in (model, tag) if name is not None)
        similar = meant(tag, tags) if tag and tags else meant(model or "", list_models())
        raise ValueError(f"no weights are known for {wanted}{similar}{hint}")
    return found


def pretrained_config(model: str, entry: dict[str, Any]) -> CLIPConfig:
    """Return the configuration of a model for the weights of a tag: with QuickGELU if they were trained with it."""
    config = get_model_config(model.replace("/", "-"))
    return dataclasses.replace(config, quick_gelu=True) if entry.get("quick_gelu") else config


def fetch_pretrained(entry: dict[str, Any], cache_dir: str | Path | None = None) -> Path:
    """Return the file with the weights of a tag; see :func:`clipfast.checkpoints.hub.fetch`."""
    return fetch(entry["hf_hub"].rstrip("/"), *WEIGHTS_NAMES, cache_dir=cache_dir)
