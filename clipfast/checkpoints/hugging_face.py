"""Reading and writing folders of transformers' ``CLIPModel`` and ``SiglipModel``."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import read_json, replace_text
from ..models import CLIPConfig, SigLIPConfig
from .checkpoint import CheckpointError, check_weights, read_checkpoint, write_safetensors
from .contents import Contents, check_size, copy_tokenizer, empty_state, find_tokenizer, write_tokenizer
from .hugging_face_layout import (
    CLIP_LAYOUT,
    SIGLIP_LAYOUT,
    NoCounterpartError,
    from_ours,
    from_settings,
    to_ours,
    to_settings,
)
from .preprocessing import complete_preprocessing

CONFIG_NAME = "config.json"
_INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAMES = ("model.safetensors", _INDEX_NAME, "pytorch_model.bin")
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")  # newer transformers write the 2nd
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's filters


def read_folder(folder: Path) -> Contents:
    """Read a folder that ``save_pretrained`` of a ``CLIPModel`` or a ``SiglipModel`` wrote.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the weights do not fit the configuration.
    """
    config, preprocessing = read_config(folder)
    files = weights_files(folder)
    theirs: dict[str, Tensor] = {}
    for file in files:
        theirs |= read_checkpoint(file, mmap=True)["state_dict"]
    # Old versions of transformers stored position_ids too, which are the numbers 0, 1, 2, ...
    theirs = {name: value for name, value in theirs.items() if not name.endswith(".position_ids")}
    check_size(config, files, folder / CONFIG_NAME)
    own = empty_state(config, folder)
    check_weights(theirs, from_ours(own), folder)
    layout = SIGLIP_LAYOUT if isinstance(config, SigLIPConfig) else CLIP_LAYOUT
    words = f"transformers folder ({layout.architecture})"
    return Contents(folder, words, files, to_ours(own, theirs), config, preprocessing, find_tokenizer(folder))


def read_config(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Read the model's configuration and its preprocessing settings from a folder of transformers.

    Raises:
        CheckpointError: a file is missing or cannot be read, or clipfast cannot build the model.
    """
    config = from_settings(_read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    is_siglip = isinstance(config, SigLIPConfig)
    for name in PROCESSOR_NAMES:
        if (folder / name).is_file():
            settings = _read_json(folder / name)
            section = settings if name == PROCESSOR_NAMES[0] else settings.get("image_processor")
            if isinstance(section, dict):
                size = config.vision.image_size
                return config, _from_image_processor(section, size, folder / name, is_siglip=is_siglip)
    return config, complete_preprocessing({}, is_siglip=is_siglip)


def weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the weights of a folder of transformers.

    Raises:
        CheckpointError: there are no weights, or their index names files outside of the folder.
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
    """Read a JSON file of a checkpoint of transformers."""
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(raw).__name__}, not an object of settings")
    return raw


def _from_image_processor(raw: Mapping[str, Any], image_size: int, source: Path, *, is_siglip: bool) -> dict[str, Any]:
    """Translate the settings of transformers' image processor into OpenCLIP's preprocessing settings.

    Args:
        raw: the settings of the image processor.
        image_size: side of the model's images.
        source: the file of the settings, for errors.
        is_siglip: whether settings that are left out have the defaults of SigLIP's image processor, or those of CLIP's.

    Raises:
        CheckpointError: OpenCLIP's preprocessing cannot express a setting.
    """
    wrong = [key for key in ("do_resize", "do_rescale", "do_normalize") if not raw.get(key, True)]
    if wrong:
        raise CheckpointError(f"{source} has {wrong[0]} false, but CLIP's images are resized, scaled and normalised")
    names = {number: name for name, number in _RESAMPLING.items()}
    square = {"height": image_size, "width": image_size}
    resample, crops = raw.get("resample", 3), raw.get("do_center_crop", not is_siglip)
    size, crop = raw.get("size", square if is_siglip else image_size), raw.get("crop_size", image_size)
    is_shortest = size in (image_size, {"shortest_edge": image_size}) and crops
    is_cropped_right = not crops or crop in (image_size, square)
    if resample not in names or not is_cropped_right or not (is_shortest or size == square):
        raise CheckpointError(
            f"{source} prepares images in a way that OpenCLIP's configuration cannot express for a model of images of "
            f"{image_size} pixels: size {size!r}, crop_size {crop!r}, do_center_crop {crops!r}, resample {resample!r}"
        )
    given = {"interpolation": names[resample], "resize_mode": "shortest" if is_shortest else "squash"}
    normalization = {key: raw[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in raw}
    return complete_preprocessing(given | normalization, is_siglip=is_siglip)


def _to_image_processor(preprocessing: Mapping[str, Any], image_size: int, *, is_siglip: bool) -> dict[str, Any]:
    """Translate OpenCLIP's preprocessing settings into transformers' ``preprocessor_config.json``.

    Raises:
        NoCounterpartError: transformers' image processors cannot resize images in that way.
    """
    mode, interpolation = preprocessing["resize_mode"], preprocessing["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLING:
        raise NoCounterpartError(
            f"Hugging Face's image processor of CLIP cannot resize with resize_mode {mode!r} and interpolation "
            f"{interpolation!r}"
        )
    square, crops = {"height": image_size, "width": image_size}, mode == "shortest"
    # SigLIP's image processor cannot crop
    kind = "SiglipImageProcessor" if is_siglip and not crops else "CLIPImageProcessor"
    done = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True)
    return {
        "image_processor_type": kind, **done, "do_center_crop": crops, "crop_size": square,
        "size": {"shortest_edge": image_size} if crops else square,
        "resample": _RESAMPLING[interpolation], "rescale_factor": 1 / 255,
        "image_mean": list(preprocessing["mean"]), "image_std": list(preprocessing["std"]),
    }  # fmt: skip


def write_folder(folder: Path, contents: Contents) -> None:
    """Write weights, configurations and tokenizer for transformers into ``folder``, which exists.

    Raises:
        NoCounterpartError: transformers cannot express the model or its preprocessing.
        DiskFullError: there is no space for it.
    """
    config = contents.settled_config
    is_siglip = isinstance(config, SigLIPConfig)
    # transformers loads all weights in the dtype that config.json states, so it must hold each without rounding.
    widest = functools.reduce(torch.promote_types, (value.dtype for value in contents.state.values()))
    raw = {
        "architectures": [(SIGLIP_LAYOUT if is_siglip else CLIP_LAYOUT).architecture],
        "model_type": "siglip" if is_siglip else "clip",
        "torch_dtype": str(widest).removeprefix("torch."),
        **to_settings(config),
    }
    processor = _to_image_processor(contents.preprocessing, config.vision.image_size, is_siglip=is_siglip)
    theirs = {name: value.clone() for name, value in from_ours(contents.state).items()}
    write_safetensors(folder / WEIGHTS_NAMES[0], theirs)
    for name, settings in ((CONFIG_NAME, raw), (PROCESSOR_NAMES[0], processor)):
        replace_text(folder / name, json.dumps(settings, indent=2) + "\n")
    if is_siglip or contents.tokenizer:
        copy_tokenizer(folder, contents.tokenizer)
    else:
        write_tokenizer(folder, config.text)
