"""Recognising what a file or folder is."""

import dataclasses
from pathlib import Path

from ..checkpoint import (
    CONFIG_NAME,
    PREPROCESSING_KEYS,
    WEIGHTS_NAMES,
    CheckpointError,
    complete_preprocessing,
)
from ..hub import HUB_PREFIX, repository_of
from ..pretrained import fetch_pretrained, get_pretrained_cfg, pretrained_config
from . import distributed, hugging_face, open_clip, torchscript
from .contents import Contents
from .hub_folder import fetch_folder

_LOCAL_DIR_PREFIX = "local-dir:"  # OpenCLIP's, in front of the names of folders


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
        contents = open_clip.read_file(fetch_pretrained(entry, cache_dir))
        preprocessing = complete_preprocessing({key: entry[key] for key in PREPROCESSING_KEYS})
        config = pretrained_config(model, entry)
        return dataclasses.replace(
            contents, layout=f"{contents.layout}, {source}", config=config, preprocessing=preprocessing
        )
    path = Path(str(source).removeprefix(_LOCAL_DIR_PREFIX))
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    return torchscript.read_file(path, trust=trust) if torchscript.is_archive(path) else open_clip.read_file(path)


def _read_folder(folder: Path) -> Contents:
    names = {entry.name for entry in folder.iterdir()}
    # Repositories that hold both have the weights twice.
    is_hugging_face = hugging_face.CONFIG_NAME in names
    if CONFIG_NAME in names and (names & {*WEIGHTS_NAMES} or not is_hugging_face):
        return open_clip.read_folder(folder)
    if is_hugging_face:
        return hugging_face.read_folder(folder)
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
