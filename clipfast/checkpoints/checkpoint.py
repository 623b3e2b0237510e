"""Checkpoints in OpenCLIP's layout. The file on disk is always whole, and reading runs no code of a pickle.

A training checkpoint is ``{epoch, name, state_dict, optimizer}`` plus one key of our own, ``clipfast``, with the
model's configuration (its activation included) and the position in training. An exported folder holds
``open_clip_config.json`` and ``open_clip_model.safetensors``.
"""

import contextlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from ..distributed.dtensors import fill
from ..io.files import read_json, replace_file, replace_text
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from ..models import CLIP, CLIPConfig, SigLIPConfig
from ..models.images import INTERPOLATIONS, RESIZE_MODES
from ..models.positions import grid_side, positions_name, resize_context, resize_positions, text_positions_name
from ..models.siglip import IMAGE_MEAN, IMAGE_STD

log = logging.getLogger("clipfast")
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRUNK_PREFIX = "visual.trunk."  # of the image tower of SigLIP
TEXT_PREFIX = "text."  # of the text tower of OpenCLIP's models with custom_text
# DistributedDataParallel and torch.compile put these in front of the names of a model that they wrap.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
MAX_UNPACKED = 1 << 24  # bytes of the packed parts of a checkpoint
_COUNT = "num_batches_tracked"  # the last part of the name of BatchNorm's count of batches
# The preparation of images if nothing else is said, in OpenCLIP's words: for CLIP, and for SigLIP.
_PREPROCESSING: dict[bool, dict[str, Any]] = {
    False: {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    True: {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bicubic", "resize_mode": "squash"},
}
PREPROCESSING_KEYS = tuple(_PREPROCESSING[False])


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


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint, or a bare state dict as ``{"state_dict": ...}``; ``.safetensors`` files too.

    Args:
        path: the file.
        mmap: leave the tensors on the disk until they are used. The file must not change meanwhile.

    Raises:
        CheckpointError: if the file is missing or broken, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is not a checkpoint: the file is empty")
    try:
        loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, mmap)
    except pickle.UnpicklingError as error:
        # PyTorch's own message recommends to unpickle everything, which would run the file's code.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds objects other than tensors and plain values, which could run "
            "code when they are loaded; if you trust it, save its weights anew as .safetensors"
        ) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error
    except Exception as error:  # Broken files make the readers raise almost anything.
        reason = f"{type(error).__name__}: {error}".partition(". ")[0]  # PyTorch's go on about causes
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: it is cut off, damaged or of another kind ({reason}); copy "
            "or download it again"
        ) from error
    checkpoint = loaded if isinstance(loaded, dict) and "state_dict" in loaded else {"state_dict": loaded}
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a checkpoint: it holds no tensors by name")
    return checkpoint


def _read_pickle(path: Path, mmap: bool) -> Any:
    """Read a file of ``torch.save``, and compare the checksums in it, which PyTorch itself ignores."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with path.open("rb") as file:
            check_archive(file, path)
    return torch.load(path, "cpu", weights_only=True, mmap=mmap and is_zip)  # older files are one stream


def check_archive(file: IO[bytes], name: str | Path) -> None:
    """Compare the checksums in an archive of ``torch.save``'s, and refuse one that unpacks to much more."""
    with zipfile.ZipFile(file) as archive:
        packed, unpacked = file.seek(0, os.SEEK_END), sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_UNPACKED + 2 * packed:  # PyTorch packs nothing but code
            raise CheckpointError(
                f"{name} is refused: its {packed:,} bytes unpack to {unpacked:,}; if you trust it, save it anew"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{name} is damaged: the checksum of {damaged} in it is wrong; copy or download it again")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open  # not at the top: a machine that only runs kernels may lack it

    with safe_open(path, framework="pt") as file:
        own = (file.metadata() or {}).get("clipfast", "{}")
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "clipfast": json.loads(own)}  # noqa: SIM118


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` without the prefixes that wrappers of a model put in front of every name.

    OpenCLIP's models with ``custom_text`` have another one for their text tower. It goes too, unless it belongs to
    SigLIP's own names. BatchNorm whose statistics are constant keeps no count of batches; it gets one of 0, since
    models are built with BatchNorm that has it.
    """
    plain = dict(state)
    for name in [name for name in plain if name.endswith(".running_mean")]:
        plain.setdefault(name.removesuffix("running_mean") + _COUNT, torch.tensor(0))
    while prefix := next((one for one in WRAPPER_PREFIXES if plain and all(n.startswith(one) for n in plain)), None):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain if is_siglip_state(plain) else {name.removeprefix(TEXT_PREFIX): x for name, x in plain.items()}


def is_siglip_state(names: Iterable[str]) -> bool:
    """Return whether the names are those of a SigLIP model, or of another with an image tower of timm's."""
    return any(name.startswith(TRUNK_PREFIX) for name in names)


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that do not fit a model. Tensors of one element fit whatever their shape.

    Args:
        weights: the weights by name.
        own: the state dict of the model, which may lie on the device "meta".
        source: where the weights come from, for the error.

    Raises:
        CheckpointError: if names or shapes differ, or there are integers where the model has floats.
    """
    if is_siglip_state(weights) != is_siglip_state(own):
        kinds = {True: "a SigLIP model", False: "a CLIP model"}
        is_siglip = is_siglip_state(weights)
        raise CheckpointError(
            f"{source} does not fit the model: it holds {kinds[is_siglip]}, and the model is {kinds[not is_siglip]}: "
            "choose the name of the model accordingly, with or without SigLIP in it"
        )
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    for name, value in own.items():
        other = weights.get(name, value)
        if value.shape != other.shape and not value.numel() == other.numel() == 1:
            problems.append(f"{name} is {tuple(other.shape)}, the model has {tuple(value.shape)}")
        if value.is_floating_point() != other.is_floating_point():
            problems.append(f"{name} holds {other.dtype}, the model has {value.dtype}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(problems[:5])}{'; …' if len(problems) > 5 else ''}"
        )


def load_weights(
    model: CLIP, checkpoint: dict[str, Any], source: str | Path, *, resize: bool = False, strict: bool = True
) -> _IncompatibleKeys:
    """Load the weights of ``checkpoint`` into ``model``, or change nothing if they do not fit.

    Args:
        model: the model to fill.
        checkpoint: as :func:`read_checkpoint` returns it.
        source: the name of the checkpoint in errors and in the log.
        resize: resize the positions of patches that were trained on another image size, and those of texts of another
            length, and log it.
        strict: refuse names that are not those of the model. False loads those that the model has.

    Returns:
        The names that only the model has, and those that only the checkpoint has.

    Raises:
        CheckpointError: if keys, shapes or the activation differ. Loading would not notice GELU in place of QuickGELU.
    """
    saved = own_config(checkpoint, source)
    if saved is not None and type(saved) is type(model.config) and saved.activation != model.config.activation:
        raise CheckpointError(
            f"{source} was trained with {saved.activation}, but the model uses {model.config.activation}: "
            "choose the model name with or without '-quickgelu' accordingly"
        )
    weights = plain_names(checkpoint["state_dict"])
    resized = _resize_positions(weights, model) if resize else []
    own = model.state_dict()
    # BatchNorm whose statistics are constant has no count to fill.
    weights = {name: value for name, value in weights.items() if name in own or not name.endswith(f".{_COUNT}")}
    differ = _IncompatibleKeys([name for name in own if name not in weights], [x for x in weights if x not in own])
    if not strict:
        weights = {name: weights[name] for name in own if name in weights}
        own = {name: own[name] for name in weights}
    check_weights(weights, own, source)
    for what in resized:
        log.info(f"{source}: positions were resized from {what}")
    for name, value in own.items():
        fill(value, weights[name])
    return differ


def _resize_positions(weights: dict[str, Tensor], model: CLIP) -> list[str]:
    """Resize the positions in ``weights`` to those of ``model``; return the changes, such as "4x4 to 8x8"."""
    own, changes = model.state_dict(), []
    name, text_name = positions_name(weights), text_positions_name(weights)
    if name is not None and _is_resizable(weights[name], own.get(name)):
        with contextlib.suppress(ValueError):  # the check of all shapes says what is wrong
            old, new = grid_side(name, weights[name]), grid_side(name, own[name])
            weights[name] = resize_positions(name, weights[name], new)
            changes.append(f"{old}x{old} to {new}x{new}")
    texts = weights.get(text_name)
    if texts is not None and texts.ndim == 2 and _is_resizable(texts, own.get(text_name)):
        weights[text_name] = resize_context(texts, model.context_length)
        changes.append(f"{len(texts)} to {model.context_length} tokens")
    return changes


def _is_resizable(positions: Tensor, own: Tensor | None) -> bool:
    """Return whether ``positions`` are as wide as the model's ``own``, but not as many."""
    if own is None or not positions.is_floating_point() or positions.numel() == 0:
        return False
    return positions.ndim == own.ndim and positions.shape != own.shape and positions.shape[-1] == own.shape[-1]


def load_checkpoint(
    model: CLIP,
    checkpoint_path: str | Path,
    strict: bool = True,
    weights_only: bool = True,
    device: str | torch.device = "cpu",
) -> _IncompatibleKeys:
    """Load the weights of a file into ``model``, as ``open_clip.load_checkpoint`` does.

    Positions of patches that were trained on another image size, and of texts of another length, are resized, as
    OpenCLIP and timm do.

    Args:
        model: the model to fill, on any device.
        checkpoint_path: a ``.pt``, ``.bin`` or ``.safetensors`` file.
        strict: refuse weights whose names are not those of the model. False loads those that the model has.
        weights_only: must be True.
        device: where OpenCLIP reads the file to. Here it is always read on the CPU.

    Returns:
        The names that the file lacks, and those that the model lacks: ``missing_keys`` and ``unexpected_keys``.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`load_weights` do.
        ValueError: ``weights_only`` is False.
        RuntimeError: there is no such device.
    """
    torch.device(device)
    if not weights_only:
        raise ValueError("load_checkpoint: weights_only must be True: clipfast never unpickles more than weights")
    if Path(checkpoint_path).suffix in (".npz", ".npy"):
        raise CheckpointError(
            f"{checkpoint_path}: clipfast does not read big_vision's weights: load them into a model of OpenCLIP, and "
            "save its state dict"
        )
    checkpoint = read_checkpoint(checkpoint_path)
    return load_weights(model, checkpoint, checkpoint_path, resize=True, strict=strict)


def _own(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key ``clipfast`` of a checkpoint; {} for checkpoints of other packages."""
    own = checkpoint.get("clipfast")
    return own if isinstance(own, dict) else {}


def own_config(checkpoint: Mapping[str, Any], source: str | Path) -> CLIPConfig | None:
    """Return the model configuration in a checkpoint of this package; None for other checkpoints.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    raw = _own(checkpoint).get("model_config")
    try:
        return None if raw is None else CLIPConfig.from_dict(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the model configuration in {source} cannot be read: {error}") from error


def stated_preprocessing(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint of this package says that images are prepared, in OpenCLIP's words; {} for others."""
    found = _own(checkpoint).get("preprocess_cfg")
    return found if isinstance(found, dict) else {}


def own_preprocessing(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return :func:`stated_preprocessing`, completed by the usual values for the kind of model, CLIP or SigLIP."""
    is_siglip = is_siglip_state(plain_names(checkpoint["state_dict"]))
    return complete_preprocessing(stated_preprocessing(checkpoint), is_siglip=is_siglip)


def preprocessing_of(model: CLIP) -> dict[str, Any]:
    """Return how images are prepared for a model, in OpenCLIP's words: mean, std, interpolation and resize_mode."""
    visual: Any = model.visual
    given = {"mean": list(visual.image_mean), "std": list(visual.image_std), "resize_mode": visual.resize_mode}
    return complete_preprocessing(given | {"interpolation": getattr(visual, "preprocess_cfg", {}).get("interpolation")})


def complete_preprocessing(given: Mapping[str, Any], *, is_siglip: bool = False) -> dict[str, Any]:
    """Return ``given`` with the usual normalisation and resizing of CLIP or SigLIP for what it leaves open.

    Raises:
        CheckpointError: mean or std are not three numbers.
    """
    usual = {key: list(x) if isinstance(x, tuple) else x for key, x in _PREPROCESSING[is_siglip].items()}
    complete = usual | {key: value for key, value in given.items() if value is not None}
    for key in ("mean", "std"):
        value = complete[key]
        is_three = isinstance(value, list | tuple) and len(value) == 3
        is_right = is_three and all(isinstance(x, int | float) and abs(x) < 1e6 for x in value)  # NaN is not
        if not is_right or (key == "std" and min(value) <= 0):
            kind = "positive numbers" if key == "std" else "numbers"
            raise CheckpointError(f"the {key} of images must be three {kind}, got {value!r:.80}")
    return complete


def check_preprocessing(preprocessing: Mapping[str, Any], source: str | Path) -> None:
    """Refuse a preparation of images that this package does not implement.

    Raises:
        CheckpointError: as above.
    """
    for key, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES), ("fill_color", (0,))):
        value = preprocessing.get(key, known[0])
        if value not in known:
            ours = " or ".join(map(repr, known))
            raise CheckpointError(f"{source} preprocesses images with {key} {value!r}, clipfast only with {ours}")


def export_open_clip(model: CLIP, folder: str | Path) -> None:
    """Write ``model`` to a folder that ``create_model("local-dir:FOLDER")`` loads, here and in OpenCLIP.

    Raises:
        DiskFullError: there is no space for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_open_clip_folder(folder, model.config, preprocessing_of(model), plain_names(model.state_dict()))


def write_open_clip_folder(
    folder: Path, config: CLIPConfig, preprocessing: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write configuration and weights into ``folder``, which exists; see :func:`export_open_clip`."""
    # No shape shows which activation and which images the weights were trained with, so the file says it.
    notes = {"model_config": config.to_dict(), "preprocess_cfg": dict(preprocessing)}
    write_safetensors(folder / WEIGHTS_NAMES[0], weights, {"clipfast": json.dumps(notes)})
    raw = {"model_cfg": config.to_dict(), "preprocess_cfg": dict(preprocessing)}
    replace_text(folder / CONFIG_NAME, json.dumps(raw, indent=2) + "\n")


def write_safetensors(path: Path, weights: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of PyTorch's weights, with ``notes`` in its header.

    Raises:
        DiskFullError: there is no space for it.
    """
    from safetensors.torch import save_file

    content = {name: value.contiguous() for name, value in weights.items()}
    header = {"format": "pt", **(notes or {})}

    def write(temporary: Path) -> None:
        save_file(content, temporary, header)
        _sort_notes(temporary)

    replace_file(path, write, _nbytes(content))


def _sort_notes(path: Path) -> None:
    """Put the notes in the header of a safetensors file in order, so that equal content is equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_open_clip_config(folder: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Return the model's configuration, and how images are prepared, of a folder with ``open_clip_config.json``.

    Raises:
        CheckpointError: the configuration cannot be read, or this package cannot build the model.
    """
    try:
        raw = read_json(folder / CONFIG_NAME)
        config = CLIPConfig.from_dict(raw["model_cfg"])
        given = raw.get("preprocess_cfg", {})
        return config, complete_preprocessing(given, is_siglip=isinstance(config, SigLIPConfig))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} is not a model configuration that can be read: {error}"
        ) from error


def find_open_clip_weights(folder: Path) -> Path:
    """Return the file with the weights of a folder in OpenCLIP's layout.

    Raises:
        CheckpointError: there is none.
    """
    weights = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS_NAMES)}")
    return weights
