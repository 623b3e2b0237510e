"""The configuration files of transformers for CLIP: the model's ``config.json`` and the images' preprocessing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError, complete_preprocessing
from ..models import CLIPConfig, TextConfig, VisionConfig
from .shapes import mlp_ratio, settled

# Transformers takes these values for settings that a file leaves out.
_TEXT_DEFAULTS = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_OLD_EOS = 2  # with it, transformers reads a text at its highest id, as clipfast does
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


# The layouts that can hold every model.
ELSEWHERE = "convert it --to open_clip or --to clipfast"


class NoCounterpartError(ValueError):
    """Hugging Face's CLIP cannot express this model."""


def to_hugging_face(config: CLIPConfig) -> dict[str, Any]:
    """Return the arguments of transformers' ``CLIPConfig`` for a model.

    Raises:
        NoCounterpartError: the model has a ResNet.
    """
    vision, text = config.vision, config.text
    if not isinstance(vision.layers, int):
        raise NoCounterpartError(f"Hugging Face's CLIP has no ResNets, only vision transformers: {ELSEWHERE}")
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    common = {"hidden_act": activation, "projection_dim": config.embed_dim, "attention_dropout": 0.0}
    return {
        "projection_dim": config.embed_dim,
        "vision_config": common | {
            "hidden_size": vision.width, "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
            "image_size": vision.image_size, "patch_size": vision.patch_size,
        },
        "text_config": common | {
            "hidden_size": text.width, "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0,
        },
    }  # fmt: skip


def from_hugging_face(raw: Mapping[str, Any], source: Path) -> CLIPConfig:
    """Return the configuration of the model that a ``config.json`` of transformers describes.

    Raises:
        CheckpointError: it is another kind of model, or has a setting that clipfast does not implement.
    """
    kind = raw.get("model_type")
    if kind != "clip":
        what = (raw.get("architectures") or [f"a model of type {kind!r}"])[0]
        naflex = ", whose images keep their shapes (NaFlex)" if kind == "siglip2" else ""
        raise CheckpointError(
            f"{source} describes {what}{naflex}; of transformers, clipfast reads only CLIPModel and SiglipModel, which "
            "holds SigLIP 2 at a fixed resolution too"
        )
    try:
        text, vision = tower_settings(raw, "text", _TEXT_DEFAULTS), tower_settings(raw, "vision", _VISION_DEFAULTS)
        _check(text, vision)
        config = CLIPConfig(
            raw.get("projection_dim", 512),
            VisionConfig(
                vision["image_size"], vision["num_hidden_layers"], vision["hidden_size"],
                head_width(vision), mlp_ratio(vision["intermediate_size"], vision["hidden_size"]),
                vision["patch_size"],
            ),
            TextConfig(
                text["max_position_embeddings"], text["vocab_size"], text["hidden_size"], text["num_attention_heads"],
                text["num_hidden_layers"], mlp_ratio(text["intermediate_size"], text["hidden_size"]),
            ),
            _ACTIVATIONS[text["hidden_act"]],
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is not a model configuration that clipfast implements: {error}") from error
    return settled(config)


def tower_settings(raw: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a tower. The second of the two names that files use for them has the last word."""
    settings = {**defaults, **(raw.get(f"{name}_config") or {})}
    again = raw.get(f"{name}_config_dict")
    return settings if again is None else {**settings, **defaults, **again}


def _check(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Refuse settings that clipfast's models do not have.

    Raises:
        ValueError: as above.
    """
    for tower in (text, vision):
        if tower["hidden_act"] not in _ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {tower['hidden_act']!r}")
        if tower["layer_norm_eps"] != 1e-5:
            raise ValueError(f"layer_norm_eps must be 1e-05, got {tower['layer_norm_eps']!r}")
    if text["hidden_act"] != vision["hidden_act"]:
        raise ValueError(
            f"both towers must have one activation, got {text['hidden_act']} for texts and {vision['hidden_act']} "
            "for images"
        )
    if vision["num_channels"] != 3:
        raise ValueError(f"num_channels must be 3, got {vision['num_channels']!r}")
    if text["eos_token_id"] not in (_OLD_EOS, text["vocab_size"] - 1):
        raise ValueError(
            f"eos_token_id must be the last of the {text['vocab_size']} tokens, where a text is read, "
            f"got {text['eos_token_id']!r}"
        )


def head_width(vision: Mapping[str, Any]) -> int:
    """Return the dimensions of an attention head.

    Raises:
        ValueError: the width is no multiple of the number of heads.
    """
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {width} and {heads}")
    return int(width // heads)


def to_image_processor(preprocessing: Mapping[str, Any], image_size: int, *, is_siglip: bool = False) -> dict[str, Any]:
    """Return ``preprocessor_config.json`` for a preprocessing in OpenCLIP's words.

    Raises:
        NoCounterpartError: transformers' image processors cannot resize images in that way.
    """
    mode, interpolation = preprocessing["resize_mode"], preprocessing["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLING:
        raise NoCounterpartError(
            f"Hugging Face's image processor of CLIP cannot resize with resize_mode {mode!r} and interpolation "
            f"{interpolation!r}"
        )
    square = {"height": image_size, "width": image_size}
    # SigLIP's cannot crop.
    kind = "SiglipImageProcessor" if is_siglip and mode == "squash" else "CLIPImageProcessor"
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size} if mode == "shortest" else square,
        "resample": _RESAMPLING[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }


def from_image_processor(
    raw: Mapping[str, Any], image_size: int, source: Path, *, is_siglip: bool = False
) -> dict[str, Any]:
    """Return the preprocessing in OpenCLIP's words that transformers' image processor does.

    Args:
        raw: the settings of the image processor.
        image_size: side of the model's images.
        source: the file of the settings, for errors.
        is_siglip: take what SigLIP's image processor does for settings that are left out, in place of CLIP's.

    Raises:
        CheckpointError: OpenCLIP has no words for it.
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
