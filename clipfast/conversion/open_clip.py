"""Reading files and folders with the names of OpenCLIP, which are those of clipfast's own checkpoints too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import (
    CONFIG_NAME,
    WRAPPER_PREFIXES,
    CheckpointError,
    find_open_clip_weights,
    is_siglip_state,
    own_config,
    own_preprocessing,
    plain_names,
    read_checkpoint,
    read_open_clip_config,
)
from .contents import Contents
from .tokenizer_files import find_tokenizer

_HUGGING_FACE_NAMES = ("text_model.", "vision_model.")


def read_file(path: Path) -> Contents:
    """Read a training checkpoint, or a bare state dict, of OpenCLIP or clipfast.

    Raises:
        CheckpointError: the file cannot be read, or has the names of a transformers model.
    """
    checkpoint = read_checkpoint(path, mmap=True)
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
    is_training = "optimizer" in checkpoint or "epoch" in checkpoint
    kind = (
        "clipfast checkpoint" if is_own else "OpenCLIP checkpoint" if is_training else "weights with OpenCLIP's names"
    )
    kind += " of a training run" if is_training else ""
    wrapped = [prefix for prefix in WRAPPER_PREFIXES if prefix in next(iter(checkpoint["state_dict"]), "")]
    notes = [f"names begin with {''.join(wrapped)}"] if wrapped else []
    notes += ["safetensors"] if path.suffix == ".safetensors" else []
    return f"{kind} ({', '.join(notes)})" if notes else kind


def _training_step(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the number of finished steps: clipfast's own, or what the optimizer has counted."""
    own = checkpoint.get("clipfast")
    progress = own.get("progress") if isinstance(own, dict) else None
    if isinstance(progress, dict) and isinstance(progress.get("step"), int):
        return int(progress["step"])
    optimizer = checkpoint.get("optimizer")
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    counts = (
        [state.get("step") for state in states.values() if isinstance(state, dict)] if isinstance(states, dict) else []
    )
    numbers = [int(count) for count in counts if isinstance(count, int | float | Tensor)]
    return max(numbers, default=None)
