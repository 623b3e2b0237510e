"""Recognising what a file or folder is."""

import dataclasses
from pathlib import Path
from typing import Any

from ..checkpoint import (
    CONFIG_NAME,
    PREPROCESSING_KEYS,
    WEIGHTS_NAMES,
    CheckpointError,
    complete_preprocessing,
)
from ..hub import HUB_PREFIX, repository_of
from ..models import CLIPConfig, SigLIPConfig
from ..pretrained import fetch_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model, pretrained_config
from . import distributed, hugging_face, open_clip, torchscript
from .contents import Contents
from .hub_folder import fetch_folder, fetch_tokenizer
from .tokenizer_files import find_tokenizer

LOCAL_DIR_PREFIX = "local-dir:"  # OpenCLIP's, in front of the names of folders


def read_contents(source: str | Path, *, trust: bool = False, cache_dir: str | Path | None = None) -> Contents:
    """Read a checkpoint of any layout, without building a model.

    Args:
        source: a file, a folder (OpenCLIP's ``local-dir:`` in front of it is allowed), a repository on the Hugging
            Face hub (``hf-hub:ORG/REPO``, or ``ORG/REPO`` if there is no such path), or ``MODEL:TAG`` of
            :func:`clipfast.list_pretrained`.
        trust: read TorchScript archives too, which are code.
        cache_dir: the folder of the hub's cache; default: huggingface_hub's own.

    Raises:
        CheckpointError: it is none of the layouts, is damaged or incomplete, or holds a model that clipfast cannot
            build; the message says which, and what to do.
    """
    repository = repository_of(str(source))
    if repository is not None:
        contents = _read_folder(fetch_folder(repository, cache_dir, tokenizer=True))
        return dataclasses.replace(contents, layout=f"{contents.layout} from {HUB_PREFIX}{repository}")
    model, _, tag = str(source).partition(":")
    entry = get_pretrained_cfg(model, tag)
    if entry:
        return _read_tag(str(source), pretrained_config(model, entry), entry, cache_dir)
    path = Path(str(source).removeprefix(LOCAL_DIR_PREFIX))
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        tags = list_pretrained_tags_by_model(model) if tag else []
        instead = f"; {model} has the tags {', '.join(tags)}" if tags else ""
        raise CheckpointError(f"there is no file or folder {path}{instead}")
    return torchscript.read_file(path, trust=trust) if torchscript.is_archive(path) else open_clip.read_file(path)


def _read_tag(source: str, config: CLIPConfig, entry: dict[str, Any], cache_dir: str | Path | None) -> Contents:
    """Read the weights of a tag, and for SigLIP the tokenizer beside them; CLIP's tokenizer needs no files."""
    weights = fetch_pretrained(entry, cache_dir)
    contents, folder = open_clip.read_file(weights), weights.parent
    if isinstance(config, SigLIPConfig):
        fetch_tokenizer(entry["hf_hub"].rstrip("/"), folder.name, cache_dir)
        contents = dataclasses.replace(contents, tokenizer=find_tokenizer(folder))
    preprocessing = complete_preprocessing({key: entry[key] for key in PREPROCESSING_KEYS})
    return dataclasses.replace(
        contents, layout=f"{contents.layout}, {source}", config=config, preprocessing=preprocessing
    )


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder with a model's configuration is read in the layout of transformers, not of OpenCLIP.

    In a folder with both configurations, the one whose weights are there counts; if both or none are, OpenCLIP's.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    is_open_clip = CONFIG_NAME in names and (names & {*WEIGHTS_NAMES} or not names & {*hugging_face.WEIGHTS_NAMES})
    return hugging_face.CONFIG_NAME in names and not is_open_clip


def _read_folder(folder: Path) -> Contents:
    names = {entry.name for entry in folder.iterdir()}
    if is_hugging_face_folder(folder):
        return hugging_face.read_folder(folder)
    if CONFIG_NAME in names:
        return open_clip.read_folder(folder)
    if not names:
        raise CheckpointError(f"{folder} is an empty folder: there is no checkpoint in it")
    if distributed.METADATA_NAME in names:
        return distributed.read_folder(folder)
    if names & {*hugging_face.WEIGHTS_NAMES}:
        raise CheckpointError(
            f"{folder} holds weights of transformers without config.json, which says what model they belong to: "
            "put the model's config.json beside them"
        )
    if names & {*WEIGHTS_NAMES}:
        raise CheckpointError(
            f"{folder} holds weights of OpenCLIP without {CONFIG_NAME}: give the file of the weights, and the model's "
            "name with --model"
        )
    raise CheckpointError(
        f"{folder} is no checkpoint: there is neither {CONFIG_NAME} (OpenCLIP) nor config.json (transformers) in it; "
        "if it holds checkpoints, give one of its files"
    )
