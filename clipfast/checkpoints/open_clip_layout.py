"""Reads files and folders with OpenCLIP's parameter names, which clipfast's and OpenAI's checkpoints have too."""

import contextlib
import dataclasses
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import WRAPPER_PREFIXES, CheckpointError, is_siglip_state, own_config, plain_names, read_checkpoint
from .contents import Contents, find_tokenizer
from .open_clip_folder import CONFIG_NAME, find_open_clip_weights, read_open_clip_config
from .preprocessing import complete_preprocessing, own_preprocessing
from .tensor_shapes import HEAD_WIDTH, config_of_weights, settled

_HUGGING_FACE_NAMES = ("text_model.", "vision_model.")
# OpenAI's state dicts have these numbers besides the weights.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def read_file(path: Path) -> Contents:
    """Read a training checkpoint, or a bare state dict, of OpenCLIP or clipfast.

    Raises:
        CheckpointError: the file cannot be read, or has the names of a transformers model.
    """
    return contents_of(path, read_checkpoint(path, mmap=True))


def contents_of(path: Path, checkpoint: dict[str, Any]) -> Contents:
    """Return the contents of a checkpoint file that has been read.

    Raises:
        CheckpointError: it has the names of a transformers model.
    """
    state = plain_names(checkpoint["state_dict"])
    refuse_hugging_face_names(state, path)
    config, epoch = own_config(checkpoint, path), checkpoint.get("epoch")
    return Contents(
        path, _layout(checkpoint, path, config is not None), (path,), state, config, own_preprocessing(checkpoint),
        epoch=epoch if isinstance(epoch, int) else None, step=_training_step(checkpoint),
    )  # fmt: skip


def refuse_hugging_face_names(state: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights with the names of transformers, which need its configuration.

    Raises:
        CheckpointError: as above.
    """
    if any(name.startswith(_HUGGING_FACE_NAMES) for name in state):
        raise CheckpointError(
            f"{source} holds the weights of a transformers model without its configuration: give the folder in which "
            "it lies beside config.json"
        )


def read_folder(folder: Path) -> Contents:
    """Read a folder with ``open_clip_config.json`` and weights.

    Raises:
        CheckpointError: one of them is missing or cannot be read, or clipfast cannot build the model.
    """
    config, preprocessing = read_open_clip_config(folder)
    weights = find_open_clip_weights(folder)
    checkpoint = read_checkpoint(weights, mmap=True)
    state, own = plain_names(checkpoint["state_dict"]), own_config(checkpoint, weights)
    if own is not None and own.activation != config.activation:
        key = "act_kwargs" if is_siglip_state(state) else "quick_gelu"
        raise CheckpointError(
            f"{folder / CONFIG_NAME} says {config.activation}, but {weights.name} says that it was "
            f"trained with {own.activation}: correct {key} in {CONFIG_NAME}"
        )
    layout = "OpenCLIP folder (local-dir)"
    return Contents(folder, layout, (weights,), state, config, preprocessing, find_tokenizer(folder))


def _layout(checkpoint: Mapping[str, Any], path: Path, is_own: bool) -> str:
    """Describe the layout of a checkpoint file in words."""
    is_training = "optimizer" in checkpoint or "epoch" in checkpoint
    kind = "OpenCLIP checkpoint" if is_training else "weights with OpenCLIP's names"
    kind = ("clipfast checkpoint" if is_own else kind) + (" of a training run" if is_training else "")
    wrapped = [prefix for prefix in WRAPPER_PREFIXES if prefix in next(iter(checkpoint["state_dict"]), "")]
    notes = [f"names begin with {''.join(wrapped)}"] if wrapped else []
    notes += ["safetensors"] if path.suffix == ".safetensors" else []
    return f"{kind} ({', '.join(notes)})" if notes else kind


def _training_step(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the number of finished steps of a training checkpoint: clipfast's own, or the count of the optimizer."""
    wrong = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError)
    with contextlib.suppress(*wrong):
        return int(checkpoint["clipfast"]["progress"]["step"])
    with contextlib.suppress(*wrong):
        return max(int(state["step"]) for state in checkpoint["optimizer"]["state"].values() if "step" in state)
    return None


def is_torchscript(path: Path) -> bool:
    """Return whether a checkpoint is a TorchScript archive, without running or unpickling any of it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def read_torchscript(path: Path, *, trust: bool) -> Contents:
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
