"""Checkpoints in OpenCLIP's layout, written so that the file on disk is always whole, and read without unpickling
anything.

A training checkpoint is ``{epoch, name, state_dict, optimizer}`` plus one key of our own, ``clipfast``, with the
model's configuration (its activation included) and the position in training. An exported folder holds
``open_clip_config.json`` and ``open_clip_model.safetensors``.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .kernels.reference import CLIP_MEAN, CLIP_STD
from .models import CLIP, CLIPConfig

_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, KeyError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
)
CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model; the message says why."""


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; ``path`` holds the old or the new one, whole, whenever the machine stops."""
    _write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint, or a bare state dict as ``{"state_dict": ...}``; ``.safetensors`` files too.

    Raises:
        CheckpointError: missing, broken, or holding anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        loaded = (
            _read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded if "state_dict" in loaded else {"state_dict": loaded}


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        own = (file.metadata() or {}).get("clipfast", "{}")
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "clipfast": json.loads(own)}  # noqa: SIM118


def load_weights(model: CLIP, checkpoint: dict[str, Any], source: str | Path) -> None:
    """Load the weights of ``checkpoint`` into ``model``; both stay as they are if they do not fit.

    Raises:
        CheckpointError: other keys, other shapes, or the other activation (GELU against QuickGELU), which no shape
            would show.
    """
    saved = checkpoint.get("clipfast", {}).get("model_config")
    if saved is not None and saved.get("quick_gelu", False) != model.config.quick_gelu:
        names = {True: "QuickGELU", False: "GELU"}
        raise CheckpointError(
            f"{source} was trained with {names[not model.config.quick_gelu]}, "
            f"but the model uses {names[model.config.quick_gelu]}: "
            "choose the model name with or without '-quickgelu' accordingly"
        )
    weights = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights] + [
        f"unexpected {name}" for name in weights if name not in own
    ]
    for name, value in own.items():
        if name not in weights or (value.numel() == 1 and weights[name].numel() == 1):
            continue
        if value.shape != weights[name].shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, the model has {tuple(value.shape)}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(problems[:5])}{'; …' if len(problems) > 5 else ''}"
        )
    model.load_state_dict({name: weights[name].reshape(value.shape) for name, value in own.items()})


def load_checkpoint(model: CLIP, path: str | Path) -> dict[str, Any]:
    """Read ``path``, load its weights into ``model`` and return it; raises as :func:`load_weights` does."""
    checkpoint = read_checkpoint(path)
    load_weights(model, checkpoint, path)
    return checkpoint


def export_open_clip(model: CLIP, folder: str | Path) -> None:
    """Write ``model`` as a folder that ``create_model("local-dir:FOLDER")`` loads, here and in OpenCLIP."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model.config.to_dict(), "preprocess_cfg": preprocess}
    weights: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    # The activation travels with the weights too: no shape would show it.
    own = {"format": "pt", "clipfast": json.dumps({"model_config": model.config.to_dict()})}
    _write_atomically(folder / WEIGHTS_NAME, lambda temporary: save_file(weights, temporary, own))
    _write_atomically(folder / CONFIG_NAME, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))


def read_open_clip_config(folder: str | Path) -> CLIPConfig:
    """Model configuration of an exported folder.

    Raises:
        CheckpointError: no such folder, or no readable configuration in it.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        return CLIPConfig.from_dict(json.loads(path.read_text())["model_cfg"])
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a model configuration that can be read: {error}") from error


def _write_atomically(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # On a directory this makes the rename itself durable.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
