"""Recognises the layout of a checkpoint's file or folder, and reads it."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

from ..io.files import local_path, read_json
from ..models import CLIPConfig, SigLIPConfig, get_model_config, list_models
from . import hugging_face
from . import open_clip_layout as open_clip
from . import torch_dcp as distributed
from .checkpoint import CheckpointError, own_config, plain_names
from .contents import TOKENIZER_FILES, Contents, find_tokenizer
from .hub import HUB_PREFIX, HubError, fetch, repository_of
from .open_clip_folder import CONFIG_NAME, WEIGHTS_NAMES
from .preprocessing import PREPROCESSING_KEYS, complete_preprocessing, own_preprocessing
from .pretrained import fetch_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model, pretrained_config
from .tensor_shapes import stored_sizes

log = logging.getLogger("clipfast")


def read_contents(source: str | Path, *, trust: bool = False, cache_dir: str | Path | None = None) -> Contents:
    """Read a checkpoint of any layout, without building a model.

    Args:
        source: a file, a folder (OpenCLIP's ``local-dir:`` in front of it is allowed), a run's folder, a repository on
            the Hugging Face hub (``hf-hub:ORG/REPO``, or ``ORG/REPO`` if there is no such path), or ``MODEL:TAG`` of
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
    path = local_path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        tags = list_pretrained_tags_by_model(model) if tag else []
        instead = f"; {model} has the tags {', '.join(tags)}" if tags else ""
        raise CheckpointError(f"there is no file or folder {path}{instead}")
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a regular file nor a folder: give those that hold a checkpoint")
    if open_clip.is_torchscript(path):
        return open_clip.read_torchscript(path, trust=trust)
    return open_clip.read_file(path)


def fetch_folder(
    repository: str, cache_dir: str | Path | None = None, *, weights: bool = True, tokenizer: bool = False
) -> Path:
    """Return the folder in the cache with a model's files, all of one commit; missing ones are downloaded.

    Args:
        repository: "ORG/REPO", in OpenCLIP's layout or else in that of transformers.
        cache_dir: the folder of the cache; default: huggingface_hub's own.
        weights: whether the weights are wanted; without them, only the description of the model is fetched.
        tokenizer: whether the files of a tokenizer are wanted, where there are any.

    Raises:
        HubError: there is no such repository, a file is missing in it, or is not in the cache of an offline machine.
    """
    config = fetch(repository, CONFIG_NAME, hugging_face.CONFIG_NAME, cache_dir=cache_dir)
    folder = config.parent  # the folder's name is the commit

    def more(*names: str) -> Path:
        """Fetch further files of the same commit of a model on the hub."""
        return fetch(repository, *names, cache_dir=cache_dir, revision=folder.name)

    if config.name == CONFIG_NAME:
        if weights:
            more(*WEIGHTS_NAMES)
    else:
        try:
            more(*hugging_face.PROCESSOR_NAMES)
        except HubError:
            log.warning(
                f"{HUB_PREFIX}{repository} has no {hugging_face.PROCESSOR_NAMES[0]}, or it is not in the cache: images "
                "are prepared as is usual for the kind of model"
            )
        if weights:
            more(*hugging_face.WEIGHTS_NAMES)
            for part in hugging_face.weights_files(folder):
                more(part.name)
    if tokenizer:
        fetch_tokenizer(repository, folder.name, cache_dir)
    return folder


def fetch_tokenizer(repository: str, commit: str, cache_dir: str | Path | None = None) -> None:
    """Download the tokenizer files that a commit of a model's repository has into the hub's cache."""
    for name in TOKENIZER_FILES:
        with contextlib.suppress(HubError):
            fetch(repository, name, cache_dir=cache_dir, revision=commit)


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


def checkpoint_of_run(folder: Path, *, is_said: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete checkpoint of a run with its content, and log its path; tensors may be left out.

    Args:
        folder: the folder of a run of this package or of OpenCLIP's trainer, of its checkpoints, or of a sharded
            checkpoint.
        is_said: whether to log the path.

    Returns:
        None for any other folder, and for the folder of a run into which the model of the last step is exported.

    Raises:
        CheckpointError: the run has no checkpoint yet, or no complete one.
    """
    from .of_run import Checkpoints, read_saved
    from .sharded import MANIFEST

    if (folder / MANIFEST).is_file():
        return folder, read_saved(folder, tensors=False)
    inner = folder / "checkpoints"
    checkpoints = Checkpoints(inner if inner.is_dir() else folder)
    exported = _exported_step(folder)
    if not checkpoints.kept() and exported < 0 and (folder / "params.txt").is_file():
        raise CheckpointError(
            f"the run {folder} has no checkpoint yet: clipfast train saves one after each epoch, and as often as "
            "--save-every says"
        )
    if not checkpoints.kept() or exported >= max(checkpoints.steps(), default=0):
        return None
    path, content, damaged = checkpoints.newest_whole()
    if path is None:
        return None
    for line in (*damaged, f"{folder}: its newest checkpoint is used, {path}") if is_said else ():
        log.warning(line)
    return path, content


def _exported_step(folder: Path) -> float:
    """Return the step of the model that is exported into a run's folder; -1 without one.

    A run that continues after its end leaves the exported model of that end in its folder. A model without a step
    counts as the newest.
    """
    if not any((folder / name).is_file() for name in (*WEIGHTS_NAMES, *hugging_face.WEIGHTS_NAMES)):
        return -1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(read_json(folder / "results.json")["steps"])
    return float("inf")


def described(path: Path, content: dict[str, Any]) -> tuple[CLIPConfig | None, dict[str, Any]]:
    """Return the configuration and the preprocessing settings of a checkpoint.

    OpenCLIP's checkpoints have no configuration: ``params.txt`` in the run's folder names the model. The configuration
    is None without that file, or if clipfast cannot build the model.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    own, preprocessing = own_config(content, path), own_preprocessing(content)
    params = path.parent.parent / "params.txt"
    if own is not None or not params.is_file():
        return own, preprocessing
    options = dict(line.partition(": ")[::2] for line in params.read_text("utf-8", "replace").splitlines())
    if options.get("model") not in list_models():
        return None, preprocessing
    config = get_model_config(options["model"])
    image_size, context_length = stored_sizes(plain_names(content["state_dict"]), config)
    quick_gelu = config.quick_gelu or options.get("force_quick_gelu") == "True"
    text = dataclasses.replace(config.text, context_length=context_length)
    config = dataclasses.replace(config, quick_gelu=quick_gelu, text=text)
    return config.with_vision(image_size=image_size), preprocessing


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder with a model's configuration is read in the layout of transformers, not of OpenCLIP.

    In a folder with both configurations, the layout whose weights are there counts; with both or no weights,
    OpenCLIP's.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    is_open_clip = CONFIG_NAME in names and (names & {*WEIGHTS_NAMES} or not names & {*hugging_face.WEIGHTS_NAMES})
    return hugging_face.CONFIG_NAME in names and not is_open_clip


def _read_folder(folder: Path) -> Contents:
    """Read a checkpoint that is a folder of any layout."""
    names = {entry.name for entry in folder.iterdir()}
    found = checkpoint_of_run(folder)
    if found is not None:
        config, preprocessing = described(*found)
        path, content = found
        contents = distributed.read_folder(path) if path.is_dir() else open_clip.contents_of(path, content)
        tokenizer = find_tokenizer(folder)
        return dataclasses.replace(contents, config=config, preprocessing=preprocessing, tokenizer=tokenizer)
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
