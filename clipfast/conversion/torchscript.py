"""OpenAI's published files: TorchScript archives, which are code with weights."""

import dataclasses
import warnings
import zipfile
from pathlib import Path

import torch

from ..checkpoint import CheckpointError, complete_preprocessing
from .contents import Contents
from .shapes import HEAD_WIDTH, config_of_weights, settled

# OpenAI's modules keep these numbers among their weights.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, without running or unpickling any of it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def read_file(path: Path, *, trust: bool) -> Contents:
    """Read the weights in OpenAI's TorchScript archive. Loading it may run its code.

    OpenAI's models have QuickGELU and heads of 64 dimensions.

    Raises:
        CheckpointError: ``trust`` is False, the archive cannot be loaded, or holds another kind of model.
    """
    if not trust:
        raise CheckpointError(
            f"{path} is a TorchScript archive, as OpenAI published: it is code, which loading could run. If you trust "
            "where it comes from, add --trust (in Python: trust=True)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            loaded = torch.jit.load(str(path), map_location="cpu").state_dict()
    except Exception as error:  # broken archives make the reader raise almost anything
        raise CheckpointError(f"{path} is a TorchScript archive that cannot be loaded: {error!s:.300}") from error
    state = {name: value for name, value in loaded.items() if name not in _NUMBERS}
    config = config_of_weights(state, path)
    if config.text.width % HEAD_WIDTH:
        raise CheckpointError(f"{path} is not one of OpenAI's models: their heads have {HEAD_WIDTH} dimensions")
    config = settled(dataclasses.replace(config, quick_gelu=True))
    return Contents(path, "OpenAI's TorchScript archive", (path,), state, config, complete_preprocessing({}))
