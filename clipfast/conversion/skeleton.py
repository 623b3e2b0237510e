"""The size, and the names and shapes, of a model's weights, without the model's memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..models import CLIPConfig, build


def check_size(config: CLIPConfig, files: Sequence[Path], source: str | Path) -> None:
    """Refuse a configuration of a model that is far larger than its weights, before it is built.

    Raises:
        CheckpointError: as above.
    """
    size, least = sum(file.stat().st_size for file in files if file.exists()), config.least_parameters
    if least > size and all(file.exists() for file in files):  # a parameter has a byte at least
        raise CheckpointError(
            f"{source} does not describe the model of these weights: it has {least:,} parameters or more, and the "
            f"weights have {size:,} bytes; correct the sizes in the configuration"
        )


def empty_state(config: CLIPConfig, source: str | Path) -> dict[str, Tensor]:
    """Return the state dict of the model of ``config`` on the device "meta", where tensors have no memory.

    Args:
        config: the configuration.
        source: where the configuration comes from, for the error.

    Raises:
        CheckpointError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} does not describe a model that can be built: {error}") from error
