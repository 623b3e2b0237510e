"""Which model weights belong to, by the shapes of their tensors.

Shapes show neither the activation nor the number of heads. The published models differ in other sizes too, so that the
shapes name the model up to its activation.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import POSITIONS_NAME, CheckpointError
from ..models import CLIPConfig, TextConfig, VisionConfig, get_model_config, list_models

TEXT_POSITIONS_NAME = "positional_embedding"
POOL_POSITIONS_NAME = "visual.attnpool.positional_embedding"
HEAD_WIDTH = 64  # of every model that OpenAI published, and of most others
_RESNET_STRIDE = 32


def config_of_weights(state: Mapping[str, Tensor], source: str | Path) -> CLIPConfig:
    """Return the configuration that shapes show, with GELU and heads of 64 dimensions, which they do not show.

    Raises:
        CheckpointError: these are not the weights of a CLIP model that clipfast can build.
    """
    try:
        vision = _resnet(state) if POOL_POSITIONS_NAME in state else _transformer(state)
        context_length, width = state[TEXT_POSITIONS_NAME].shape
        hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        text = TextConfig(
            context_length,
            state["token_embedding.weight"].shape[0],
            width,
            max(1, width // HEAD_WIDTH),
            _count(state, r"transformer\.resblocks\.(\d+)\."),
            mlp_ratio(hidden, width),
        )
        return CLIPConfig(state["text_projection"].shape[1], vision, text)
    except KeyError as error:
        raise CheckpointError(f"{source} holds no CLIP model that clipfast can build: it has no {error}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} holds no CLIP model that clipfast can build: {error}") from error


def _transformer(state: Mapping[str, Tensor]) -> VisionConfig:
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    grid = grid_side(len(state[POSITIONS_NAME]))
    return VisionConfig(grid * patch_size, layers, width, HEAD_WIDTH, mlp_ratio(hidden, width), patch_size)


def _resnet(state: Mapping[str, Tensor]) -> VisionConfig:
    first, second, third, fourth = (_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    image_size = grid_side(len(state[POOL_POSITIONS_NAME])) * _RESNET_STRIDE
    return VisionConfig(image_size, (first, second, third, fourth), width, HEAD_WIDTH, patch_size=None)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})


def grid_side(positions: int) -> int:
    """Return the side of the square grid whose positions, with one for the class token, are ``positions``.

    Raises:
        ValueError: there is no such grid.
    """
    side = math.isqrt(max(0, positions - 1))
    if side == 0 or positions != 1 + side * side:
        raise ValueError(f"{positions} positions are not those of a class token and a square grid")
    return side


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio which gives ``hidden`` units, since ``int(width * hidden / width)`` can be one less."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def stored_sizes(state: Mapping[str, Tensor], config: CLIPConfig) -> tuple[int, int]:
    """Return the image size and the context length for which ``state`` has positions.

    They are those of ``config`` where a tensor is missing or has no such shape, which the check of all shapes reports.
    """
    image_size, context_length = config.vision.image_size, config.text.context_length
    is_vit = isinstance(config.vision.layers, int)
    positions = state.get(POSITIONS_NAME if is_vit else POOL_POSITIONS_NAME)
    if (
        positions is not None
        and positions.ndim == 2
        and math.isqrt(max(1, len(positions) - 1)) ** 2 + 1 == len(positions)
    ):
        image_size = grid_side(len(positions)) * ((config.vision.patch_size or 1) if is_vit else _RESNET_STRIDE)
    text = state.get(TEXT_POSITIONS_NAME)
    return image_size, len(text) if text is not None and text.ndim == 2 else context_length


def models_of_shapes(config: CLIPConfig) -> list[str]:
    """Return the names of the models whose weights have the shapes of those of ``config``."""
    return [name for name in list_models() if _shapes(get_model_config(name)) == _shapes(config)]


def settled(config: CLIPConfig) -> CLIPConfig:
    """Return the configuration as it is published, if a published model equals ``config`` but for its notation.

    A layout that states the hidden units of an MLP gives 4.363636 where the published configuration says 4.3637.
    """
    for name in models_of_shapes(config):
        known = get_model_config(name).with_vision(patch_dropout=config.vision.patch_dropout)
        if known.quick_gelu == config.quick_gelu and _heads(known) == _heads(config):
            return known
    return config


def name_of(config: CLIPConfig) -> str | None:
    """Return the name of the model that ``config`` is, or None if it has none."""
    for name in models_of_shapes(config):
        known = get_model_config(name)
        if known.quick_gelu == config.quick_gelu and _heads(known) == _heads(config):
            return name
    return None


def _shapes(config: CLIPConfig) -> tuple[Any, ...]:
    vision, text = config.vision, config.text
    image: tuple[Any, ...] = (vision.image_size, vision.layers, vision.width)
    if isinstance(vision.layers, int):
        image += (vision.patch_size, int(vision.width * vision.mlp_ratio))
    return (config.embed_dim, *image, text.context_length, text.vocab_size, text.width, text.layers,
            int(text.width * text.mlp_ratio))  # fmt: skip


def _heads(config: CLIPConfig) -> tuple[int, int]:
    return config.vision.heads, config.text.heads
