"""Folders of OpenCLIP's layout, with ``open_clip_config.json`` and weights: their files, read and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io.files import read_json, replace_text
from ..models import CLIP, CLIPConfig, SigLIPConfig
from .checkpoint import CheckpointError, plain_names, write_safetensors
from .preprocessing import complete_preprocessing, preprocessing_of

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def export_open_clip(model: CLIP, folder: str | Path) -> None:
    """Write a model to a folder that ``create_model("local-dir:FOLDER")`` of clipfast and of OpenCLIP loads.

    Raises:
        DiskFullError: there is no space for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_open_clip_folder(folder, model.config, preprocessing_of(model), plain_names(model.state_dict()))


def write_open_clip_folder(
    folder: Path, config: CLIPConfig, preprocessing: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write configuration and weights of a model into an existing folder; see :func:`export_open_clip`."""
    # The header states the activation and the preprocessing of training, since no shape of the weights shows them.
    notes = {"model_config": config.to_dict(), "preprocess_cfg": dict(preprocessing)}
    write_safetensors(folder / WEIGHTS_NAMES[0], weights, {"clipfast": json.dumps(notes)})
    raw = {"model_cfg": config.to_dict(), "preprocess_cfg": dict(preprocessing)}
    replace_text(folder / CONFIG_NAME, json.dumps(raw, indent=2) + "\n")


def read_open_clip_config(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Read the model's configuration and its preprocessing settings from a folder with ``open_clip_config.json``.

    Raises:
        CheckpointError: the configuration cannot be read, or this package cannot build the model.
    """
    try:
        raw = read_json(folder / CONFIG_NAME)
        config = CLIPConfig.from_dict(raw["model_cfg"])
        given = raw.get("preprocess_cfg", {})
        return config, complete_preprocessing(given, is_siglip=isinstance(config, SigLIPConfig))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} is not a model configuration that can be read: {error}"
        ) from error


def find_open_clip_weights(folder: Path) -> Path:
    """Return the path of the weights in a folder of OpenCLIP's layout.

    Raises:
        CheckpointError: the folder has no weights.
    """
    weights = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS_NAMES)}")
    return weights
