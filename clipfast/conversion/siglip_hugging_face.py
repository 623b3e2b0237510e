"""Transformers' ``SiglipModel``, which holds SigLIP and SigLIP 2 at a fixed resolution: configuration and weights.

The configurations say the activation of each tower, which OpenCLIP's names of image towers fix. Attention has three
projections where timm has one, and the attention pooling one where timm has two.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..models import SigLIPConfig, TextConfig, VisionConfig
from ..models.siglip_config import EPS, EXACT, TANH
from .hugging_face_config import ELSEWHERE, NoCounterpartError, head_width, tower_settings
from .hugging_face_names import INNER, ParameterNames
from .shapes import mlp_ratio, similar

# Transformers takes these values for settings that a file leaves out.
_COMMON_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": EPS,
}  # fmt: skip
_TEXT_DEFAULTS = _COMMON_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None}
_VISION_DEFAULTS = _COMMON_DEFAULTS | {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True,
}  # fmt: skip
_GELUS = {"gelu": EXACT, "gelu_pytorch_tanh": TANH}

# Our names on the left, theirs on the right; modules stand for their weight and bias. Then the same inside blocks.
_OUTER = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.trunk.attn_pool.qkv.weight": "vision_model.head.attention.in_proj_weight",
    "visual.trunk.attn_pool.qkv.bias": "vision_model.head.attention.in_proj_bias",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final": "text_model.final_layer_norm",
    "text.text_projection": "text_model.head",
}
_INNER = INNER | {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}  # fmt: skip
_TOWERS = {"visual.trunk.blocks": "vision_model", "text.transformer.resblocks": "text_model"}
_NAMES = ParameterNames(_OUTER, _INNER, _TOWERS)
_POOL = "visual.trunk.attn_pool."


def to_settings(config: SigLIPConfig) -> dict[str, Any]:
    """Return the arguments of transformers' ``SiglipConfig`` for a model.

    Raises:
        NoCounterpartError: its text tower has no projection.
    """
    vision, text = config.vision, config.text
    if not config.text_proj:
        raise NoCounterpartError(
            f"Hugging Face's SigLIP projects texts in the end, and this model does not: {ELSEWHERE}"
        )
    words = {gelu: word for word, gelu in _GELUS.items()}
    common = {"layer_norm_eps": EPS, "attention_dropout": 0.0}
    return {
        "vision_config": common | {
            "hidden_act": words[config.image_gelu], "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio), "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads, "image_size": vision.image_size, "patch_size": vision.patch_size,
        },
        "text_config": common | {
            "hidden_act": words[config.text_gelu], "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio), "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length, "projection_size": config.embed_dim,
            "pad_token_id": config.pad_id, "bos_token_id": 2 if config.pad_id == 0 else None, "eos_token_id": 1,
        },
    }  # fmt: skip


def from_settings(raw: Mapping[str, Any], source: Path) -> SigLIPConfig:
    """Return the configuration of the model that a ``config.json`` of a ``SiglipModel`` describes.

    Raises:
        CheckpointError: it has a setting that clipfast does not implement.
    """
    try:
        text = tower_settings(raw, "text", _TEXT_DEFAULTS)
        vision = tower_settings(raw, "vision", _VISION_DEFAULTS)
        _check(text, vision)
        config = SigLIPConfig(
            text["projection_size"] or text["hidden_size"],
            VisionConfig(
                vision["image_size"], vision["num_hidden_layers"], vision["hidden_size"], head_width(vision),
                mlp_ratio(vision["intermediate_size"], vision["hidden_size"]), vision["patch_size"],
            ),
            TextConfig(
                text["max_position_embeddings"], text["vocab_size"], text["hidden_size"], text["num_attention_heads"],
                text["num_hidden_layers"], mlp_ratio(text["intermediate_size"], text["hidden_size"]),
            ),
            image_gelu=_GELUS[vision["hidden_act"]], text_gelu=_GELUS[text["hidden_act"]],
            clean="canonicalize",  # as transformers' SiglipTokenizer does
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is not a model configuration that clipfast implements: {error}") from error
    return similar(config)


def _check(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Refuse settings that clipfast's models do not have.

    Raises:
        ValueError: as above.
    """
    for tower in (text, vision):
        if tower["hidden_act"] not in _GELUS:
            raise ValueError(f"hidden_act must be one of {', '.join(_GELUS)}, got {tower['hidden_act']!r}")
        if tower["layer_norm_eps"] != EPS:
            raise ValueError(f"layer_norm_eps must be {EPS:g}, got {tower['layer_norm_eps']!r}")
    if vision["num_channels"] != 3:
        raise ValueError(f"num_channels must be 3, got {vision['num_channels']!r}")
    if not vision["vision_use_head"]:
        raise ValueError("vision_use_head must be true: without the attention pooling there are no features of images")


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one of our models by the names of transformers; they may share memory with ``state``."""
    theirs: dict[str, Tensor] = {}
    for name, value in _joined(state).items():
        shaped = value[0] if name == "visual.trunk.pos_embed" else value.reshape(1) if value.ndim == 0 else value
        theirs |= _NAMES.split(name, shaped)
    return theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights or gradients in ``theirs`` by our ``names``; what is missing there is left out."""
    ours: dict[str, Tensor] = {}
    for name in names:
        match = re.fullmatch(re.escape(_POOL) + r"(q|kv)\.(weight|bias)", name)
        value = _NAMES.join(f"{_POOL}qkv.{match[2]}" if match else name, theirs)
        if value is None:
            continue
        if match:
            width = len(value) // 3
            value = value[:width] if match[1] == "q" else value[width:]
        ours[name] = (
            value[None] if name == "visual.trunk.pos_embed" else value.reshape(()) if "logit" in name else value
        )
    return ours


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with one projection of the attention pooling in place of two."""
    joined = dict(state)
    for kind in ("weight", "bias"):
        parts = [joined.pop(f"{_POOL}{part}.{kind}", None) for part in ("q", "kv")]
        if parts[0] is not None and parts[1] is not None:
            joined[f"{_POOL}qkv.{kind}"] = torch.cat([parts[0], parts[1]])
    return joined
