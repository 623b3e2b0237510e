"""Translates settings and parameter names between clipfast and transformers' ``CLIPModel`` and ``SiglipModel``.

Of image towers, only vision transformers have a counterpart in transformers. A packed projection of attention is three
parameters in transformers, except in SigLIP's attention pooling, where transformers has one parameter and timm two.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import CLIPConfig, NaFlexConfig, SigLIPConfig, TextConfig, VisionConfig
from ..models.positions import TRUNK_POSITIONS_NAME
from ..models.siglip_config import EPS, EXACT, TANH
from .checkpoint import CheckpointError, is_siglip_state
from .tensor_shapes import mlp_ratio, settled, similar

ELSEWHERE = "convert it --to open_clip or --to clipfast"  # both layouts can hold every model of clipfast
_TRANSPOSED = ("text_projection", "visual.proj")
_PACKED = re.compile(r"attn\.(?:qkv\.|in_proj_)(weight|bias)")
_BLOCK = re.compile(r"(.+(?:resblocks|blocks))\.(\d+)\.(.+)")
_POOL = "visual.trunk.attn_pool."
_OLD_EOS = 2  # with this eos_token_id, transformers reads a text at its highest id, as clipfast does


class NoCounterpartError(ValueError):
    """A model that transformers' ``CLIPModel`` and ``SiglipModel`` cannot express."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How transformers describes one kind of model.

    Attributes:
        architecture: the name of the model's class.
        eps: the epsilon of every layer norm.
        activations: maps transformers' name of each activation to the value in clipfast's configuration.
        text, vision: transformers' defaults for settings that a file leaves out.
        names: maps clipfast's name of each parameter outside of blocks, or of its module, to transformers' name.
    """

    architecture: str
    eps: float
    activations: Mapping[str, bool | str]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    names: Mapping[str, str]


def _defaults(activation: str, eps: float, sizes: tuple[int, int, int, int], **others: Any) -> dict[str, Any]:
    """Return transformers' settings of a tower with these sizes, for a checkpoint's configuration."""
    width, hidden, layers, heads = sizes
    return {
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "hidden_act": activation, "layer_norm_eps": eps, **others,
    }  # fmt: skip


_BASE = (768, 3072, 12, 12)
CLIP_LAYOUT = Layout(
    "CLIPModel",
    1e-5,
    {"quick_gelu": True, "gelu": False},
    _defaults("quick_gelu", 1e-5, (512, 2048, 12, 8), vocab_size=49408, max_position_embeddings=77, eos_token_id=49407),
    _defaults("quick_gelu", 1e-5, _BASE, image_size=224, patch_size=32, num_channels=3),
    {
        "logit_scale": "logit_scale",
        "text_projection": "text_projection.weight",
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "visual.proj": "visual_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    },
)
SIGLIP_LAYOUT = Layout(
    "SiglipModel",
    EPS,
    {"gelu": EXACT, "gelu_pytorch_tanh": TANH},
    _defaults("gelu_pytorch_tanh", EPS, _BASE, vocab_size=32000, max_position_embeddings=64, projection_size=None),
    _defaults("gelu_pytorch_tanh", EPS, _BASE, image_size=224, patch_size=16, num_channels=3, vision_use_head=True),
    {
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        TRUNK_POSITIONS_NAME: "vision_model.embeddings.position_embedding.weight",
        "visual.trunk.norm": "vision_model.post_layernorm",
        f"{_POOL}latent": "vision_model.head.probe",
        f"{_POOL}qkv.weight": "vision_model.head.attention.in_proj_weight",
        f"{_POOL}qkv.bias": "vision_model.head.attention.in_proj_bias",
        f"{_POOL}proj": "vision_model.head.attention.out_proj",
        f"{_POOL}norm": "vision_model.head.layernorm",
        f"{_POOL}mlp.fc1": "vision_model.head.mlp.fc1",
        f"{_POOL}mlp.fc2": "vision_model.head.mlp.fc2",
        "text.token_embedding": "text_model.embeddings.token_embedding",
        "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text.ln_final": "text_model.final_layer_norm",
        "text.text_projection": "text_model.head",
    },
)
# This maps our names of modules within a block, which are timm's in SigLIP's image tower, to transformers' names.
_IN_BLOCKS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2", "attn.proj": "self_attn.out_proj",
}  # fmt: skip


def to_settings(config: CLIPConfig) -> dict[str, Any]:
    """Return the arguments of transformers' ``CLIPConfig`` or ``SiglipConfig`` for a checkpoint's model.

    Raises:
        NoCounterpartError: the model has a ResNet or a NaFlex tower, or is a SigLIP model whose text tower has no
            projection.
    """
    vision, text = config.vision, config.text
    if not isinstance(vision.layers, int):
        raise NoCounterpartError(f"Hugging Face's CLIP has no ResNets, only vision transformers: {ELSEWHERE}")
    if isinstance(vision, NaFlexConfig):
        raise NoCounterpartError(f"clipfast writes no NaFlex models for Hugging Face's transformers: {ELSEWHERE}")
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    lengths = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    if not isinstance(config, SigLIPConfig):
        width = {"projection_dim": config.embed_dim}
        ends = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0}
        return {
            **width,
            "vision_config": _tower(CLIP_LAYOUT, vision, config.quick_gelu) | sizes | width,
            "text_config": _tower(CLIP_LAYOUT, text, config.quick_gelu) | lengths | width | ends,
        }
    if not config.text_proj:
        raise NoCounterpartError(
            f"Hugging Face's SigLIP projects texts in the end, and this model does not: {ELSEWHERE}"
        )
    begin = 2 if config.pad_id == 0 else None
    marks = {"pad_token_id": config.pad_id, "bos_token_id": begin, "eos_token_id": 1}
    return {
        "vision_config": _tower(SIGLIP_LAYOUT, vision, config.image_gelu) | sizes,
        "text_config": _tower(SIGLIP_LAYOUT, text, config.text_gelu)
        | lengths
        | marks
        | {"projection_size": config.embed_dim},
    }


def _tower(layout: Layout, tower: VisionConfig | TextConfig, activation: bool | str) -> dict[str, Any]:
    """Return a tower's settings in the configuration of a checkpoint of transformers."""
    word = next(word for word, ours in layout.activations.items() if ours == activation)
    sizes: Any = (tower.width, int(tower.width * tower.mlp_ratio), tower.layers, tower.heads)
    return _defaults(word, layout.eps, sizes, attention_dropout=0.0)


def from_settings(raw: Mapping[str, Any], source: Path) -> CLIPConfig:
    """Return the configuration of the model that a ``config.json`` of transformers describes.

    Raises:
        CheckpointError: it is another kind of model, or has a setting that clipfast does not implement.
    """
    kind = raw.get("model_type")
    layout = {"clip": CLIP_LAYOUT, "siglip": SIGLIP_LAYOUT}.get(str(kind))
    if layout is None:
        named = raw.get("architectures")
        what = named[0] if named and isinstance(named, list) else f"a model of type {kind!r}"
        naflex = ", whose images keep their shapes (NaFlex)" if kind == "siglip2" else ""
        raise CheckpointError(
            f"{source} describes {what}{naflex}; of transformers, clipfast reads only CLIPModel and SiglipModel, which "
            "holds SigLIP 2 at a fixed resolution too"
        )
    try:
        text, vision = _settings(raw, "text", layout.text), _settings(raw, "vision", layout.vision)
        _check(layout, text, vision)
        image = VisionConfig(
            vision["image_size"], vision["num_hidden_layers"], vision["hidden_size"], _head_width(vision),
            mlp_ratio(vision["intermediate_size"], vision["hidden_size"]), vision["patch_size"],
        )  # fmt: skip
        words = TextConfig(
            text["max_position_embeddings"], text["vocab_size"], text["hidden_size"], text["num_attention_heads"],
            text["num_hidden_layers"], mlp_ratio(text["intermediate_size"], text["hidden_size"]),
        )  # fmt: skip
        gelus: list[Any] = [layout.activations[tower["hidden_act"]] for tower in (vision, text)]
        if layout is CLIP_LAYOUT:
            return settled(CLIPConfig(raw.get("projection_dim", 512), image, words, gelus[0]))
        width = text["projection_size"] or text["hidden_size"]
        config = SigLIPConfig(width, image, words, image_gelu=gelus[0], text_gelu=gelus[1])
        return similar(dataclasses.replace(config, clean="canonicalize"))  # transformers' SiglipTokenizer cleans so
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is not a model configuration that clipfast implements: {error}") from error


def _settings(raw: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's settings in transformers' ``config.json``; ``NAME_config_dict`` overrides ``NAME_config``."""
    settings = {**defaults, **(raw.get(f"{name}_config") or {})}
    again = raw.get(f"{name}_config_dict")
    return settings if again is None else {**settings, **defaults, **again}


def _check(layout: Layout, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of transformers with settings that clipfast's models do not implement.

    Raises:
        ValueError: as above.
    """
    for tower in (text, vision):
        if tower["hidden_act"] not in layout.activations:
            raise ValueError(f"hidden_act must be one of {', '.join(layout.activations)}, got {tower['hidden_act']!r}")
        if tower["layer_norm_eps"] != layout.eps:
            raise ValueError(f"layer_norm_eps must be {layout.eps:g}, got {tower['layer_norm_eps']!r}")
    if vision["num_channels"] != 3:
        raise ValueError(f"num_channels must be 3, got {vision['num_channels']!r}")
    if not vision.get("vision_use_head", True):
        raise ValueError("vision_use_head must be true: without the attention pooling there are no features of images")
    if layout is SIGLIP_LAYOUT:
        return
    if text["hidden_act"] != vision["hidden_act"]:
        raise ValueError(
            f"both towers must have one activation, got {text['hidden_act']} for texts and {vision['hidden_act']} "
            "for images"
        )
    if text["eos_token_id"] not in (_OLD_EOS, text["vocab_size"] - 1):
        raise ValueError(
            f"eos_token_id must be the last of the {text['vocab_size']} tokens, where a text is read, "
            f"got {text['eos_token_id']!r}"
        )


def _head_width(vision: Mapping[str, Any]) -> int:
    """Return a tower's head width in a checkpoint of transformers."""
    width, heads = vision["hidden_size"], vision["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {width} and {heads}")
    return int(width // heads)


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one of our models by the names of transformers; they may share memory with ``state``."""
    layout, joined = _layout_of(state), dict(state)
    for kind in ("weight", "bias"):
        query, others = (joined.pop(f"{_POOL}{part}.{kind}", None) for part in ("q", "kv"))
        if query is not None and others is not None:
            joined[f"{_POOL}qkv.{kind}"] = torch.cat([query, others])
    theirs: dict[str, Tensor] = {}
    for name, value in joined.items():
        names = _theirs(layout, name)
        if name in _TRANSPOSED:
            value = value.T.contiguous()
        elif name == TRUNK_POSITIONS_NAME:
            value = value[0]
        elif layout is SIGLIP_LAYOUT and value.ndim == 0:
            value = value.reshape(1)
        theirs |= zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True)
    return theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' weights or gradients ``theirs`` by our ``names``; others are left out."""
    wanted = list(names)
    layout, ours = _layout_of(wanted), {}
    for name in wanted:
        pooled = re.fullmatch(re.escape(_POOL) + r"(q|kv)\.(weight|bias)", name)
        parts = _theirs(layout, f"{_POOL}qkv.{pooled[2]}" if pooled else name)
        if not all(part in theirs for part in parts):
            continue
        value = torch.cat([theirs[part] for part in parts]) if len(parts) > 1 else theirs[parts[0]]
        if pooled:
            width = len(value) // 3
            value = value[:width] if pooled[1] == "q" else value[width:]
        elif name in _TRANSPOSED:
            value = value.T
        elif name == TRUNK_POSITIONS_NAME:
            value = value[None]
        elif layout is SIGLIP_LAYOUT and "logit" in name:
            value = value.reshape(())
        ours[name] = value
    return ours


def _layout_of(names: Iterable[str]) -> Layout:
    """Return transformers' layout of the kind of model whose weights have these names."""
    return SIGLIP_LAYOUT if is_siglip_state(names) else CLIP_LAYOUT


def _theirs(layout: Layout, name: str) -> list[str]:
    """Return transformers' names of one of our parameters in a checkpoint: three for packed attention, else one."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [_renamed(name, layout.names)]
    blocks, number, part = match.groups()
    tower = "vision_model" if blocks.startswith("visual.") else "text_model"
    prefix = f"{tower}.encoder.layers.{number}."
    packed = _PACKED.fullmatch(part)
    if packed:
        return [f"{prefix}self_attn.{projection}_proj.{packed[1]}" for projection in "qkv"]
    return [prefix + _renamed(part, _IN_BLOCKS)]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the name in a checkpoint of transformers that ``names`` gives to a parameter or its module."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"
