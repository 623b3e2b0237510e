"""What a model is built from: a configuration, weights, and how its images and texts are prepared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import (
    CheckpointError,
    check_preprocessing,
    complete_preprocessing,
    find_open_clip_weights,
    own_config,
    own_preprocessing,
    read_checkpoint,
    read_open_clip_config,
)
from .kernels.reference import CLIP_MEAN, CLIP_STD
from .models import CLIPConfig, SigLIPConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """All that is needed to build a model: its configuration, the file of its weights, and how images are prepared.

    ``folder`` is where the files of its tokenizer lie, if it has one of its own.
    """

    config: CLIPConfig
    weights: Path | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize_mode: str = "shortest"
    folder: Path | None = None


def model_source(
    config: CLIPConfig, weights: Path | None = None, given: Mapping[str, Any] | None = None, folder: Path | None = None
) -> ModelSource:
    """Return the source of a model whose images are prepared as ``given`` says in OpenCLIP's words.

    What ``given`` leaves open is as usual for the kind of model.

    Raises:
        CheckpointError: this package does not implement the preparation of images.
    """
    preprocessing = complete_preprocessing(given or {}, is_siglip=isinstance(config, SigLIPConfig))
    check_preprocessing(preprocessing, folder or weights or "the model")
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    return ModelSource(config, weights, mean, std, preprocessing["resize_mode"], folder)


def read_own_source(path: str | Path) -> ModelSource:
    """Return the model that a checkpoint of this package holds.

    Raises:
        CheckpointError: if the checkpoint names no model, as OpenCLIP's, or cannot be read.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    config = own_config(checkpoint, path)
    if config is None:
        raise CheckpointError(
            f"{path} does not say which model it belongs to: pass the name of the model, and this path as pretrained"
        )
    return model_source(config, Path(path), own_preprocessing(checkpoint))


def read_open_clip_folder(folder: str | Path) -> ModelSource:
    """Read the configuration of the model in a folder, and find its weights.

    Raises:
        CheckpointError: if there is no readable configuration or no weights, or if this package does not implement the
            preprocessing.
    """
    folder = Path(folder)
    config, preprocessing = read_open_clip_config(folder)
    return model_source(config, find_open_clip_weights(folder), preprocessing, folder)
