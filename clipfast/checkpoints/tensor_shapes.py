"""Determines the model of a checkpoint's weights by the shapes of their tensors.

Shapes show neither the activation nor the number of heads. The published models differ in other sizes too, so that the
shapes name the model up to its activation.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, get_model_config, list_models
from ..models.positions import (
    POOL_POSITIONS_NAME,
    POSITIONS_NAME,
    TRUNK_POSITIONS_NAME,
    grid_side,
    positions_name,
    text_positions_name,
)
from .checkpoint import CheckpointError, is_siglip_state

HEAD_WIDTH = 64  # the head width of every model of OpenAI, and of most others
RESNET_STRIDE = 32


def config_of_weights(state: Mapping[str, Tensor], source: str | Path) -> CLIPConfig:
    """Return a model's configuration by the shapes of its weights; GELU and heads of 64 dimensions are assumed.

    Raises:
        CheckpointError: these are not the weights of a CLIP model that clipfast can build.
    """
    try:
        if is_siglip_state(state):
            vision, text = _trunk(state), _text(state, "text.")
            return SigLIPConfig(vision.width, vision, text, text_proj="text.text_projection.weight" in state)
        vision = _resnet(state) if POOL_POSITIONS_NAME in state else _transformer(state)
        return CLIPConfig(state["text_projection"].shape[1], vision, _text(state, ""))
    except KeyError as error:
        raise CheckpointError(f"{source} holds no CLIP model that clipfast can build: it has no {error}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} holds no CLIP model that clipfast can build: {error}") from error


def _text(state: Mapping[str, Tensor], prefix: str) -> TextConfig:
    """Return the configuration of a text tower by the shapes of its weights."""
    context_length, width = state[f"{prefix}positional_embedding"].shape
    hidden = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    vocab_size = state[f"{prefix}token_embedding.weight"].shape[0]
    layers = _count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    heads = width // _head_width(width)
    return TextConfig(context_length, vocab_size, width, heads, layers, mlp_ratio(hidden, width))


def _trunk(state: Mapping[str, Tensor]) -> VisionConfig:
    """Return the configuration of an image tower of timm by the shapes of its weights."""
    width, _, patch_size, _ = state["visual.trunk.patch_embed.proj.weight"].shape
    hidden = state["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0]
    layers = _count(state, r"visual\.trunk\.blocks\.(\d+)\.")
    image_size = grid_side(TRUNK_POSITIONS_NAME, state[TRUNK_POSITIONS_NAME]) * patch_size
    return VisionConfig(image_size, layers, width, _head_width(width), mlp_ratio(hidden, width), patch_size)


def _transformer(state: Mapping[str, Tensor]) -> VisionConfig:
    """Return the configuration of a vision transformer by the shapes of its weights."""
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    grid = grid_side(POSITIONS_NAME, state[POSITIONS_NAME])
    return VisionConfig(grid * patch_size, layers, width, _head_width(width), mlp_ratio(hidden, width), patch_size)


def _resnet(state: Mapping[str, Tensor]) -> VisionConfig:
    """Return the configuration of a ResNet by the shapes of its weights."""
    first, second, third, fourth = (_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    image_size = grid_side(POOL_POSITIONS_NAME, state[POOL_POSITIONS_NAME]) * RESNET_STRIDE
    return VisionConfig(image_size, (first, second, third, fourth), width, _head_width(32 * width), patch_size=None)


def _head_width(width: int) -> int:
    """Return the head width to assume for a checkpoint: 64, or the whole width if that is not a multiple of it."""
    return width if width % HEAD_WIDTH else HEAD_WIDTH


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many different values ``pattern`` captures in the names of the weights."""
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})


def mlp_ratio(hidden: int, width: int) -> float:
    """Return an mlp_ratio that gives the ``hidden`` units of a checkpoint's MLP, without rounding to one unit less."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def stored_sizes(state: Mapping[str, Tensor], config: CLIPConfig) -> tuple[int, int]:
    """Return the image size and the context length for which a checkpoint's ``state`` has positions.

    They are taken from ``config`` if a tensor is missing or has a wrong shape, which the later check of shapes reports.
    """
    image_size, context_length = config.vision.image_size, config.text.context_length
    name = positions_name(state)
    if name is not None:
        vision = config.vision
        stride = (vision.patch_size if isinstance(vision.layers, int) else None) or RESNET_STRIDE
        with contextlib.suppress(ValueError):
            side = grid_side(name, state[name])
            # The configuration's image size is kept if it gives the same grid: pixels at the edge may fill no patch.
            image_size = image_size if image_size // stride == side else side * stride
    text = state.get(text_positions_name(state))
    return image_size, len(text) if text is not None and text.ndim == 2 else context_length


def models_of_shapes(config: CLIPConfig) -> list[str]:
    """Return the names of the models whose weights have the shapes of the model ``config``."""
    return [name for name in list_models() if _shapes(get_model_config(name)) == _shapes(config)]


def settled(config: CLIPConfig) -> CLIPConfig:
    """Return the published configuration that equals a checkpoint's ``config`` up to rounding, or else ``config``.

    A layout that states the hidden units of an MLP gives 4.363636 where the published configuration says 4.3637.
    """
    name = name_of(config)
    return config if name is None else get_model_config(name).with_vision(patch_dropout=config.vision.patch_dropout)


def similar(config: SigLIPConfig) -> SigLIPConfig:
    """Return the published configuration like a checkpoint's ``config``, perhaps with another activation.

    Transformers computes GELU by tanh in all its SigLIP models, and OpenCLIP exactly in some of them.
    """
    for name in models_of_shapes(config):
        known = get_model_config(name)
        if isinstance(known, SigLIPConfig) and _hidden(known)[1:] == _hidden(config)[1:]:
            return dataclasses.replace(known, image_gelu=config.image_gelu, text_gelu=config.text_gelu)
    return config


def name_of(config: CLIPConfig) -> str | None:
    """Return the name of the published model whose configuration a checkpoint has, or None."""
    return next((name for name in models_of_shapes(config) if _hidden(get_model_config(name)) == _hidden(config)), None)


def _shapes(config: CLIPConfig) -> tuple[Any, ...]:
    """Return the sizes of a model that the shapes of its weights show."""
    vision, text = config.vision, config.text
    image: tuple[Any, ...] = (type(vision), vision.layers, vision.width)
    if isinstance(vision.layers, int) and vision.patch_size is not None:
        image += (vision.image_size // vision.patch_size, vision.patch_size, int(vision.width * vision.mlp_ratio))
    else:
        image += (vision.image_size,)
    family = (type(config), isinstance(config, SigLIPConfig) and config.text_proj)
    return (*family, config.embed_dim, *image, text.context_length, text.vocab_size, text.width, text.layers,
            int(text.width * text.mlp_ratio))  # fmt: skip


def _hidden(config: CLIPConfig) -> tuple[Any, ...]:
    """Return the settings of a model that no shape of its weights shows."""
    return config.activation, config.vision.heads, config.text.heads, config.vision.image_size
