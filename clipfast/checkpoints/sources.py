"""Finds the source of a model by its name: its configuration, its weights, and its preprocessing settings."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io.files import LOCAL_DIR_PREFIX, local_path
from ..models import CLIP, CLIPConfig, SigLIPConfig, get_model_config, list_models
from . import hugging_face
from .checkpoint import CheckpointError, load_weights, read_checkpoint
from .contents import check_size
from .hub import HUB_PREFIX, HubError, repository_of
from .layouts import checkpoint_of_run, described, fetch_folder, is_hugging_face_folder, read_contents
from .open_clip_folder import CONFIG_NAME, find_open_clip_weights, read_open_clip_config
from .preprocessing import PREPROCESSING_KEYS, check_preprocessing, complete_preprocessing, stated_preprocessing
from .pretrained import fetch_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model, pretrained_config

_THEIRS = "the model is built by open_clip.create_model(...) and handed to clipfast.apply_to_open_clip"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The source of a model: its configuration, its weights, and its preprocessing settings.

    Attributes:
        config: the configuration.
        weights: the file of the weights, or a folder (of transformers, or a checkpoint in parts) that holds them; None
            if there are none.
        preprocessing: the preprocessing settings by OpenCLIP's names: mean, std, interpolation and resize_mode.
        folder: the folder with the files of the tokenizer, if the model has its own.
        checkpoint: the content of ``weights``, if it had to be read to know the model.
        name: the name of the model, for error messages.
    """

    config: CLIPConfig
    weights: Path | None
    preprocessing: dict[str, Any]
    folder: Path | None = None
    checkpoint: dict[str, Any] | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.name


def model_source(
    config: CLIPConfig, weights: Path | None = None, given: Mapping[str, Any] | None = None,
    folder: Path | None = None, checkpoint: dict[str, Any] | None = None,
) -> ModelSource:  # fmt: skip
    """Return the source of a model with preprocessing settings by OpenCLIP's names.

    Settings that ``given`` lacks get the defaults of the kind of model, CLIP or SigLIP.

    Raises:
        CheckpointError: clipfast does not implement the preprocessing.
    """
    preprocessing = complete_preprocessing(given or {}, is_siglip=isinstance(config, SigLIPConfig))
    check_preprocessing(preprocessing, folder or weights or "the model")
    return ModelSource(config, weights, preprocessing, folder, checkpoint)


def resolve_source(
    model_name: str | ModelSource,
    pretrained: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    fetch_weights: bool = True,
    force_quick_gelu: bool = False,
) -> ModelSource:
    """Return the source of the model that :func:`clipfast.create_model` builds, for a name and optional other weights.

    Args:
        model_name, pretrained, cache_dir: as for :func:`clipfast.create_model`.
        fetch_weights: whether weights on the hub are downloaded; False downloads only the description of the model.
        force_quick_gelu: whether the caller builds the model with QuickGELU in any case, and needs no warning about it.

    Raises:
        ValueError: the name of the model is unknown.
        CheckpointError: the weights are unknown, missing or unreadable
            (:class:`~clipfast.checkpoints.hub.HubError` for those on the hub).
    """
    if isinstance(model_name, ModelSource):
        if pretrained:
            raise ValueError(f"pretrained={pretrained!r} cannot be given beside a ModelSource, which names its weights")
        return model_name
    name = model_name.replace("/", "-")  # OpenAI's spelling, as in ViT-B/32
    if name in list_models():
        return _named(name, pretrained, cache_dir, fetch_weights, force_quick_gelu)
    if pretrained and not Path(pretrained).is_file():
        raise CheckpointError(
            f"no checkpoint at {pretrained}: {_what_is_at(pretrained)}, and {model_name} has no tags; only models of "
            "clipfast.list_models() have"
        )
    source = _described(model_name, cache_dir, fetch_weights and not pretrained)
    return _with_file(source, Path(pretrained)) if pretrained else source


def _what_is_at(path: str | Path) -> str:
    """Return why there are no weights at a path that is no file."""
    is_folder = Path(path).is_dir()
    return "it is a folder (name a file in it, such as epoch_latest.pt)" if is_folder else "there is no such file"


def _with_file(source: ModelSource, path: Path) -> ModelSource:
    """Return the source of a model with the weights of a file, which may state its preprocessing settings."""
    content = read_checkpoint(path, mmap=True)
    preprocessing = source.preprocessing | stated_preprocessing(content)
    return model_source(source.config, path, preprocessing, source.folder, content)


def _named(
    name: str,
    pretrained: str | Path | None,
    cache_dir: str | Path | None,
    fetch_weights: bool,
    force_quick_gelu: bool,
) -> ModelSource:
    """Return the source of a model in the registry, with the weights of a tag or a file."""
    config = get_model_config(name)
    if not pretrained:
        return model_source(config)
    entry = get_pretrained_cfg(name, str(pretrained))
    if not entry:
        if not Path(pretrained).is_file():
            tags = list_pretrained_tags_by_model(name)
            raise CheckpointError(
                f"no checkpoint at {pretrained}: {_what_is_at(pretrained)}, and {name} has no such tag; "
                f"{'its tags are ' + ', '.join(tags) if tags else 'it has no tags'}"
            )
        return _with_file(model_source(config), Path(pretrained))
    if entry.get("quick_gelu") and not (config.quick_gelu or force_quick_gelu):
        warnings.warn(
            f"the weights {pretrained!r} of {name} were trained with QuickGELU, so the model is built with it; name it "
            f"{name}-quickgelu to say so",
            stacklevel=4,
        )
    weights = fetch_pretrained(entry, cache_dir) if fetch_weights else None
    preprocessing = {key: entry[key] for key in PREPROCESSING_KEYS}
    return model_source(pretrained_config(name, entry), weights, preprocessing)


def _described(model_name: str, cache_dir: str | Path | None, fetch_weights: bool) -> ModelSource:
    """Return the source of a model that a folder, a clipfast checkpoint or a repository of the hub describes."""
    path = local_path(model_name)
    if model_name.endswith(".pt") and not path.is_dir():
        return _of_checkpoint(path, read_checkpoint(path, mmap=True))
    if model_name.startswith(LOCAL_DIR_PREFIX) or path.is_dir():
        return read_folder(path, fetch_weights)
    if path.is_file():
        raise ValueError(
            f"{path} alone is no model: give the name of a model and weights as pretrained, or a folder with both, as "
            "`clipfast convert WEIGHTS FOLDER --to open_clip --model NAME_OR_JSON` makes it"
        )
    repository = repository_of(model_name)
    if repository is None and (model_name.startswith(("/", "./", "../")) or model_name.count("/") > 1):
        raise ValueError(f"there is no file or folder {model_name}")
    if repository is None and model_name.count("/") == 1 and Path(model_name).parent.is_dir():
        raise ValueError(
            f"there is no {model_name} in the folder {Path(model_name).parent}; a repository on the hub is "
            f"{HUB_PREFIX}{model_name}"
        )
    if repository is None:
        return model_source(get_model_config(model_name))  # get_model_config raises the error about an unknown name
    return _in_repository(repository, model_name, cache_dir, fetch_weights)


def _in_repository(repository: str, name: str, cache_dir: str | Path | None, fetch_weights: bool) -> ModelSource:
    """Return the source of a model on the hub. Its weights are downloaded only if clipfast can build the model."""
    try:
        folder = fetch_folder(repository, cache_dir, weights=False, tokenizer=True)
    except HubError as error:
        if name.startswith(HUB_PREFIX):
            raise
        raise HubError(f"{name} is no model that clipfast knows by name, and as a repository: {error}") from error
    try:
        source = _read_as(not (folder / CONFIG_NAME).is_file(), folder, False)
    except CheckpointError as error:
        raise CheckpointError(f"{HUB_PREFIX}{repository}: {error}; if it is one of OpenCLIP's, {_THEIRS}") from error
    return read_folder(fetch_folder(repository, cache_dir)) if fetch_weights else source


def read_folder(folder: Path, with_weights: bool = True) -> ModelSource:
    """Return the source of the model in a folder of OpenCLIP's layout, of transformers, or of a run.

    Raises:
        CheckpointError: there is no readable configuration or no weights, or this package does not implement the
            preprocessing.
    """
    found = checkpoint_of_run(folder, is_said=with_weights) if folder.is_dir() else None
    if found is not None:
        return _of_checkpoint(*found, folder)
    return _read_as(is_hugging_face_folder(folder), folder, with_weights)


def _read_as(is_hugging_face: bool, folder: Path, with_weights: bool) -> ModelSource:
    """Return the source of the model in a folder of transformers' or of OpenCLIP's layout."""
    config, preprocessing = (hugging_face.read_config if is_hugging_face else read_open_clip_config)(folder)
    weights = None
    if with_weights:
        weights = folder if is_hugging_face else find_open_clip_weights(folder)
        check_size(config, hugging_face.weights_files(folder) if is_hugging_face else [weights], folder)
    return model_source(config, weights, preprocessing, folder)


def _of_checkpoint(path: Path, content: dict[str, Any], folder: Path | None = None) -> ModelSource:
    """Return the source of the model in a checkpoint file.

    Raises:
        CheckpointError: the checkpoint does not tell its model.
    """
    config, preprocessing = described(path, content)
    if config is None:
        raise CheckpointError(
            f"{path} does not say which model it belongs to: pass the name of the model, and this path as "
            "pretrained (on the command line --model and --pretrained)"
        )
    check_size(config, [*path.iterdir()] if path.is_dir() else [path], path)
    return model_source(config, path, preprocessing, folder, None if path.is_dir() else content)


def load_source(model: CLIP, source: ModelSource) -> None:
    """Load the weights of a source into ``model``; positions are resized to the model's.

    Raises:
        CheckpointError: the source has no weights, or they cannot be read or do not fit.
    """
    weights, content = source.weights, source.checkpoint
    assert weights is not None
    if content is None:
        content = {"state_dict": read_contents(weights).state} if weights.is_dir() else read_checkpoint(weights)
    load_weights(model, content, weights, resize=True)
