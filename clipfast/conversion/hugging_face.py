"""Reading and writing folders of transformers' ``CLIPModel`` and ``SiglipModel``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, check_weights, complete_preprocessing, read_checkpoint, write_safetensors
from ..files import read_json, replace_text
from ..models import CLIPConfig, SigLIPConfig
from . import hugging_face_names, siglip_hugging_face
from .contents import Contents
from .hugging_face_config import from_hugging_face, from_image_processor, to_hugging_face, to_image_processor
from .skeleton import check_size, empty_state
from .tokenizer_files import copy_tokenizer, find_tokenizer, write_tokenizer

CONFIG_NAME = "config.json"
_INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAMES = ("model.safetensors", _INDEX_NAME, "pytorch_model.bin")
_PROCESSOR_NAME = "preprocessor_config.json"
_PROCESSORS_NAME = "processor_config.json"  # of newer versions, with one section for images and one for texts
PROCESSOR_NAMES = (_PROCESSOR_NAME, _PROCESSORS_NAME)


def read_folder(folder: Path) -> Contents:
    """Read a folder that ``save_pretrained`` of a ``CLIPModel`` or a ``SiglipModel`` wrote.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the weights do not fit the configuration.
    """
    config, preprocessing = read_config(folder)
    is_siglip = isinstance(config, SigLIPConfig)
    names = siglip_hugging_face if is_siglip else hugging_face_names
    files = weights_files(folder)
    theirs: dict[str, Tensor] = {}
    for file in files:
        theirs |= read_checkpoint(file, mmap=True)["state_dict"]
    # Old versions stored the numbers 0, 1, 2, ... too.
    theirs = {name: value for name, value in theirs.items() if not name.endswith(".position_ids")}
    check_size(config, files, folder / CONFIG_NAME)
    own = empty_state(config, folder)
    check_weights(theirs, names.from_ours(own), folder)
    state = names.to_ours(own, theirs)
    layout = f"transformers folder ({'SiglipModel' if is_siglip else 'CLIPModel'})"
    return Contents(folder, layout, files, state, config, preprocessing, find_tokenizer(folder))


def read_config(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Return the model's configuration, and how images are prepared, of a folder of transformers.

    Raises:
        CheckpointError: a file is missing or cannot be read, or clipfast cannot build the model.
    """
    raw, path = _read_json(folder / CONFIG_NAME), folder / CONFIG_NAME
    is_siglip = raw.get("model_type") == "siglip"
    config: CLIPConfig = siglip_hugging_face.from_settings(raw, path) if is_siglip else from_hugging_face(raw, path)
    return config, _read_preprocessing(folder, config.vision.image_size, is_siglip=is_siglip)


def weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the weights of a folder of transformers.

    Raises:
        CheckpointError: there are none, or the list of them names files elsewhere.
    """
    found = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights: neither {', nor '.join(WEIGHTS_NAMES)}")
    if found.name != _INDEX_NAME:
        return (found,)
    parts = _read_json(found).get("weight_map")
    names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{found} names no files of weights in its folder: its weight_map is {parts!r:.80}")
    return tuple(folder / name for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(raw).__name__}, not an object of settings")
    return raw


def _read_preprocessing(folder: Path, image_size: int, *, is_siglip: bool) -> dict[str, Any]:
    options = {"is_siglip": is_siglip}
    if (folder / _PROCESSOR_NAME).is_file():
        path = folder / _PROCESSOR_NAME
        return from_image_processor(_read_json(path), image_size, path, **options)
    if (folder / _PROCESSORS_NAME).is_file():
        section = _read_json(folder / _PROCESSORS_NAME).get("image_processor")
        if isinstance(section, dict):
            return from_image_processor(section, image_size, folder / _PROCESSORS_NAME, **options)
    return complete_preprocessing({}, **options)


def write_folder(folder: Path, contents: Contents) -> None:
    """Write weights, configurations and tokenizer for transformers into ``folder``, which exists.

    Raises:
        NoCounterpartError: transformers cannot express the model or its preprocessing.
        DiskFullError: there is no space for it.
    """
    config = contents.settled_config
    is_siglip = isinstance(config, SigLIPConfig)
    raw = {
        "architectures": ["SiglipModel" if is_siglip else "CLIPModel"],
        "model_type": "siglip" if is_siglip else "clip",
        "torch_dtype": _widest(contents.state),
        **(siglip_hugging_face.to_settings(config) if isinstance(config, SigLIPConfig) else to_hugging_face(config)),
    }
    processor = to_image_processor(contents.preprocessing, config.vision.image_size, is_siglip=is_siglip)
    names = siglip_hugging_face if is_siglip else hugging_face_names
    theirs = {name: value.clone() for name, value in names.from_ours(contents.state).items()}
    write_safetensors(folder / WEIGHTS_NAMES[0], theirs)
    for name, settings in ((CONFIG_NAME, raw), (_PROCESSOR_NAME, processor)):
        replace_text(folder / name, json.dumps(settings, indent=2) + "\n")
    if is_siglip:
        copy_tokenizer(folder, contents.tokenizer)
    else:
        write_tokenizer(folder, contents.tokenizer, config.text)


def _widest(state: dict[str, Tensor]) -> str:
    """Return the name of the dtype that holds every weight without rounding; transformers loads them all in one."""
    widest = next(iter(state.values())).dtype
    for value in state.values():
        widest = torch.promote_types(widest, value.dtype)
    return str(widest).removeprefix("torch.")
