"""The names and shapes of a model's weights, without the model's memory."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..models import CLIPConfig, build


def empty_state(config: CLIPConfig, state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return the state dict of the model of ``config`` on the device "meta", where tensors have no memory.

    Args:
        config: the configuration.
        state: the weights that are to fit it. A configuration with many more layers is refused before it is built.
        source: where the configuration comes from, for the error.

    Raises:
        CheckpointError: there is no such model.
    """
    vision = config.vision.layers
    layers = config.text.layers + (vision if isinstance(vision, int) else sum(vision))
    if layers > len(state):
        raise CheckpointError(
            f"{source} does not fit the model: {len(state)} tensors cannot be those of {layers} layers"
        )
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} does not describe a model that can be built: {error}") from error
