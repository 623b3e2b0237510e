"""Reads and writes checkpoints in OpenCLIP's layout. A file on disk is always complete, and reading runs no code in it.

A training checkpoint is ``{epoch, name, state_dict, optimizer}`` plus one key of our own, ``clipfast``, with the
model's configuration (its activation included) and the position in training.
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
from ..io.files import replace_file
from ..models import CLIP, CLIPConfig
from ..models.positions import grid_side, positions_name, resize_context, resize_positions, text_positions_name

log = logging.getLogger("clipfast")
TRUNK_PREFIX = "visual.trunk."  # the prefix of names in SigLIP's image tower
# The names of two parameters by which CLIP with timm's NaFlex tower differs from SigLIP.
NAFLEX_CLIP = {"visual.trunk.embeds.proj.weight", "visual.head.proj.weight"}
TEXT_PREFIX = "text."  # the prefix of names in the text tower of OpenCLIP's models with custom_text
# The prefixes that DistributedDataParallel and torch.compile add to the names of a model.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
MAX_UNPACKED = 1 << 24  # the most bytes to which compressed parts of a checkpoint may expand, besides twice their size
_COUNT = "num_batches_tracked"  # the last part of the name of BatchNorm's count of batches


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model; the message has the reason."""


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint. If the process is killed, ``path`` holds the complete old or the complete new checkpoint.

    Raises:
        DiskFullError: there is no space for it.
    """
    replace_file(path, lambda temporary: torch.save(checkpoint, temporary), _nbytes(checkpoint))


def _nbytes(content: Any) -> int:
    """Return the number of bytes of all tensors in a checkpoint, which is nested dicts and lists."""
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
        # PyTorch's own message recommends weights_only=False, which would run code in the file.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds objects other than tensors and plain values, which could run "
            "code when they are loaded; if you trust it, save its weights anew as .safetensors"
        ) from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error
    except Exception as error:  # Broken files make the readers raise almost anything.
        # PyTorch's messages are long, so only the first sentence is taken.
        reason = f"{type(error).__name__}: {error}".partition(". ")[0]
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: it is cut off, damaged or of another kind ({reason}); copy "
            "or download it again"
        ) from error
    checkpoint = loaded if isinstance(loaded, dict) and "state_dict" in loaded else {"state_dict": loaded}
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f", but {', '.join(map(repr, loaded))[:200]}" if isinstance(loaded, dict) else ""
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds no tensors by name{keys}; save a state_dict, or one in 'state_dict'"
        )
    return checkpoint


def _read_pickle(path: Path, mmap: bool) -> Any:
    """Read a checkpoint of ``torch.save``, and compare the checksums in it, which PyTorch itself ignores."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with path.open("rb") as file:
            check_archive(file, path)
    # Files of torch.save's old format, which are not zip archives, cannot be memory-mapped.
    return torch.load(path, "cpu", weights_only=True, mmap=mmap and is_zip)


def check_archive(file: IO[bytes], name: str | Path) -> None:
    """Verify the checksums in a checkpoint of ``torch.save``, and refuse one that expands to far more bytes."""
    with zipfile.ZipFile(file) as archive:
        packed, unpacked = file.seek(0, os.SEEK_END), sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_UNPACKED + 2 * packed:  # PyTorch compresses no tensors, only the code of TorchScript
            raise CheckpointError(
                f"{name} is refused: its {packed:,} bytes unpack to {unpacked:,}; if you trust it, save it anew"
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{name} is damaged: the checksum of {damaged} in it is wrong; copy or download it again")


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors checkpoint, and clipfast's notes in its header."""
    from safetensors import safe_open  # imported here, as a machine that only runs kernels may lack it

    with safe_open(path, framework="pt") as file:
        own = (file.metadata() or {}).get("clipfast", "{}")
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "clipfast": json.loads(own)}  # noqa: SIM118


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's state dict without the prefixes that DistributedDataParallel and others add to every name.

    OpenCLIP's models with ``custom_text`` have a prefix for their text tower. It is removed too, except for SigLIP,
    whose own names have it. Frozen BatchNorm has no count of batches; a count of 0 is added, since a new model has the
    count.
    """
    plain = dict(state)
    for name in [name for name in plain if name.endswith(".running_mean")]:
        plain.setdefault(name.removesuffix("running_mean") + _COUNT, torch.tensor(0))
    while prefix := next((one for one in WRAPPER_PREFIXES if plain and all(n.startswith(one) for n in plain)), None):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain if is_siglip_state(plain) else {name.removeprefix(TEXT_PREFIX): x for name, x in plain.items()}


def is_siglip_state(names: Iterable[str]) -> bool:
    """Return whether a checkpoint has the names of a SigLIP model, or of another model with an image tower of timm.

    CLIP with a NaFlex tower is the exception, since clipfast builds it as a CLIP model (``NAFLEX_CLIP``).
    """
    names = set(names)
    return any(name.startswith(TRUNK_PREFIX) for name in names) and not names >= NAFLEX_CLIP


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that do not fit a model. Tensors of one element fit in any shape.

    Args:
        weights: the weights by name.
        own: the state dict of the model, which may lie on the device "meta".
        source: the name of the checkpoint for the error message.

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
    names = [f"missing {name}" for name in own if name not in weights]
    names += [f"unexpected {name}" for name in weights if name not in own]
    values = []
    for name, value in own.items():
        other = weights.get(name, value)
        if value.shape != other.shape and not value.numel() == other.numel() == 1:
            values.append(f"{name} is {tuple(other.shape)}, the model has {tuple(value.shape)}")
        if value.is_floating_point() != other.is_floating_point():
            values.append(f"{name} holds {other.dtype}, the model has {value.dtype}")
    if names or values:
        shown = [*names[: 5 - len(values[:2])], *values][:5]  # at least two sizes that differ, beside missing names
        more = "; …" if len(names) + len(values) > len(shown) else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(shown)}{more}")


def load_weights(
    model: CLIP, checkpoint: dict[str, Any], source: str | Path, *, resize: bool = False, strict: bool = True
) -> _IncompatibleKeys:
    """Load the weights of ``checkpoint`` into ``model``, or change nothing if they do not fit.

    Args:
        model: the model to fill.
        checkpoint: as :func:`read_checkpoint` returns it.
        source: the name of the checkpoint in errors and in the log.
        resize: resize positions that were trained for another image size or text length, and log it.
        strict: refuse names that the model does not have. False loads only the names that the model has.

    Returns:
        The names that only the model has, and the names that only the checkpoint has.

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
    # A model with frozen BatchNorm has no count of batches, so the checkpoint's count is left out.
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
        with contextlib.suppress(ValueError):  # check_weights reports the problem later
            old, new = grid_side(name, weights[name]), grid_side(name, own[name])
            weights[name] = resize_positions(name, weights[name], new)
            changes.append(f"{old}x{old} to {new}x{new}")
    texts = weights.get(text_name)
    if texts is not None and texts.ndim == 2 and _is_resizable(texts, own.get(text_name)):
        weights[text_name] = resize_context(texts, model.context_length)
        changes.append(f"{len(texts)} to {model.context_length} tokens")
    return changes


def _is_resizable(positions: Tensor, own: Tensor | None) -> bool:
    """Return whether positions of a checkpoint differ from the model's ``own`` only in number, and can be resized."""
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
        strict: refuse names that the model does not have. False loads only the names that the model has.
        weights_only: must be True.
        device: accepted because OpenCLIP reads the file to this device. clipfast always reads it on the CPU.

    Returns:
        ``missing_keys``, which the file lacks, and ``unexpected_keys``, which the model lacks.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`load_weights` do.
        ValueError: ``weights_only`` is False.
        RuntimeError: the device does not exist.
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


def own_entry(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return clipfast's own entry of a checkpoint, under the key ``clipfast``; {} for checkpoints of other packages."""
    own = checkpoint.get("clipfast")
    return own if isinstance(own, dict) else {}


def own_config(checkpoint: Mapping[str, Any], source: str | Path) -> CLIPConfig | None:
    """Return the model configuration in a checkpoint of this package; None for other checkpoints.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    raw = own_entry(checkpoint).get("model_config")
    try:
        return None if raw is None else CLIPConfig.from_dict(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the model configuration in {source} cannot be read: {error}") from error


def write_safetensors(path: Path, weights: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of PyTorch's weights, with ``notes`` in its header.

    Raises:
        DiskFullError: there is no space for it.
    """
    from safetensors.torch import save_file

    content = {name: value.contiguous() for name, value in weights.items()}
    header = {"format": "pt", **(notes or {})}

    def write(temporary: Path) -> None:
        """Write a safetensors checkpoint to a temporary path."""
        save_file(content, temporary, header)
        _sort_notes(temporary)

    replace_file(path, write, _nbytes(content))


def _sort_notes(path: Path) -> None:
    """Sort the notes in the header of a safetensors file, so equal content gives equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
