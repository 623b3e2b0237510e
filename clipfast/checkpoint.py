"""Checkpoints in OpenCLIP's layout. The file on disk is always whole, and reading runs no code of a pickle.

A training checkpoint is ``{epoch, name, state_dict, optimizer}`` plus one key of our own, ``clipfast``, with the
model's configuration (its activation included) and the position in training. An exported folder holds
``open_clip_config.json`` and ``open_clip_model.safetensors``.
"""

import dataclasses
import json
import logging
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import replace_file, replace_text
from .kernels.reference import CLIP_MEAN, CLIP_STD
from .models import CLIP, CLIPConfig
from .models.vision import VisionTransformer, interpolate_positions

log = logging.getLogger("clipfast")
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
POSITIONS_NAME = "visual.positional_embedding"
_PREPROCESSING = {"interpolation": "bicubic", "resize_mode": "shortest"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model; the message says why."""


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint. Whenever the process stops, ``path`` holds the old or the new one, and it is whole.

    Raises:
        DiskFullError: there is no space for it.
    """
    replace_file(path, lambda temporary: torch.save(checkpoint, temporary), _nbytes(checkpoint))


def _nbytes(content: Any) -> int:
    """Return the number of bytes of all tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        return content.nbytes
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return sum(map(_nbytes, values))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint, or a bare state dict as ``{"state_dict": ...}``; ``.safetensors`` files too.

    Raises:
        CheckpointError: if the file is missing or broken, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is not a checkpoint: the file is empty")
    try:
        loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError as error:
        # PyTorch's own message recommends to unpickle everything, which would run the file's code.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds objects other than tensors and plain values, which could run "
            "code when they are loaded; if you trust it, save its weights anew as .safetensors"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # Broken files make the readers raise almost anything.
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {reason}") from error
    checkpoint = loaded if isinstance(loaded, dict) and "state_dict" in loaded else {"state_dict": loaded}
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a checkpoint: it holds no tensors by name")
    return checkpoint


def _read_pickle(path: Path) -> Any:
    """Read what ``torch.save`` wrote, and compare the checksums in it, which PyTorch itself does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    return torch.load(path, "cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open  # not at the top: a machine that only runs kernels may lack it

    with safe_open(path, framework="pt") as file:
        own = (file.metadata() or {}).get("clipfast", "{}")
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "clipfast": json.loads(own)}  # noqa: SIM118


def load_weights(
    model: CLIP, checkpoint: dict[str, Any], source: str | Path, *, resize_positions: bool = False
) -> None:
    """Load the weights of ``checkpoint`` into ``model``, or change nothing if they do not fit.

    Args:
        model: the model to fill.
        checkpoint: as :func:`read_checkpoint` returns it.
        source: the name of the checkpoint in errors and in the log.
        resize_positions: resize the positions of a vision transformer that was trained on another image size, and log
            it.

    Raises:
        CheckpointError: if keys, shapes or the activation differ. Loading would not notice GELU in place of QuickGELU.
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
    resized = _resize_positions(weights, model) if resize_positions else None
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
    if resized is not None:
        log.info(f"{source}: positions were resized from {resized}")
    model.load_state_dict({name: weights[name].reshape(value.shape) for name, value in own.items()})


def _resize_positions(weights: dict[str, Tensor], model: CLIP) -> str | None:
    """Resize the positions in ``weights`` from another square grid; return "4x4 to 8x8", or None if nothing changed."""
    visual, positions = model.visual, weights.get(POSITIONS_NAME)
    if not isinstance(visual, VisionTransformer) or positions is None or not positions.is_floating_point():
        return None
    own = visual.positional_embedding
    if positions.ndim != 2 or positions.shape == own.shape or positions.shape[1:] != own.shape[1:]:
        return None
    side = math.isqrt(max(0, len(positions) - 1))
    if side == 0 or len(positions) != 1 + side * side:
        return None
    weights[POSITIONS_NAME] = interpolate_positions(positions, (side, side), visual.grid_size)
    return f"{side}x{side} to {visual.grid_size[0]}x{visual.grid_size[1]}"


def load_checkpoint(model: CLIP, path: str | Path) -> dict[str, Any]:
    """Load the weights of the file ``path`` into ``model``, and return the checkpoint as it was read.

    Positions of a vision transformer that was trained on another image size are resized, as OpenCLIP does.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`load_weights` do.
    """
    checkpoint = read_checkpoint(path)
    load_weights(model, checkpoint, path, resize_positions=True)
    return checkpoint


def read_own_config(path: str | Path) -> CLIPConfig:
    """Return the model configuration that a checkpoint of this package holds.

    Raises:
        CheckpointError: if the checkpoint has none, as OpenCLIP's, or cannot be read.
    """
    own = read_checkpoint(path).get("clipfast", {}).get("model_config")
    if own is None:
        raise CheckpointError(
            f"{path} does not say which model it belongs to: pass the name of the model, and this path as pretrained"
        )
    return CLIPConfig.from_dict(own)


def export_open_clip(model: CLIP, folder: str | Path) -> None:
    """Write ``model`` to a folder that ``create_model("local-dir:FOLDER")`` loads, here and in OpenCLIP.

    Raises:
        DiskFullError: there is no space for it.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    normalization = {"mean": list(model.visual.image_mean), "std": list(model.visual.image_std)}
    config = {"model_cfg": model.config.to_dict(), "preprocess_cfg": normalization | _PREPROCESSING}
    weights: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    # No shape shows which activation the weights were trained with, so the file says it.
    own = {"format": "pt", "clipfast": json.dumps({"model_config": model.config.to_dict()})}
    replace_file(folder / WEIGHTS_NAMES[0], lambda temporary: save_file(weights, temporary, own), _nbytes(weights))
    replace_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """All that is needed to build a model: its configuration, the file of its weights, and its normalisation."""

    config: CLIPConfig
    weights: Path | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def read_open_clip_folder(folder: str | Path) -> ModelSource:
    """Read the configuration of the model in a folder, and find its weights.

    Raises:
        CheckpointError: if there is no readable configuration or no weights, or if this package does not implement the
            preprocessing.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / CONFIG_NAME).read_text())
        config, preprocess = CLIPConfig.from_dict(raw["model_cfg"]), raw.get("preprocess_cfg", {})
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} is not a model configuration that can be read: {error}"
        ) from error
    for key, ours in _PREPROCESSING.items():
        if preprocess.get(key, ours) != ours:
            raise CheckpointError(
                f"{folder} preprocesses images with {key} {preprocess[key]!r}, clipfast only with {ours!r}"
            )
    weights = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS_NAMES)}")
    mean, std = (tuple(preprocess.get(key, default)) for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    return ModelSource(config, weights, mean, std)
