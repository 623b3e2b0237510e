"""Reads folders of ``torch.distributed.checkpoint`` (DCP): shards of tensors, and a pickled index of the shards.

The index is read by an unpickler that accepts only the index's own classes, and the shards by
``torch.load(weights_only=True)``: neither can run code. Only the model's tensors are read, not the optimizer's.
"""

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..io.files import open_regular, read_regular
from .checkpoint import CheckpointError, check_archive, is_siglip_state, plain_names
from .contents import Contents
from .open_clip_layout import refuse_hugging_face_names
from .preprocessing import complete_preprocessing

METADATA_NAME = ".metadata"
MAX_METADATA = 1 << 30  # the limit in bytes of the index file that is read
_METADATA_CLASSES = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
_COMMON = "logit_scale"  # a parameter of every model, by which the prefix of the model's names is found


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler of DCP's index ``.metadata``, which refuses every other class and every function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that may occur in the index of a DCP checkpoint, and refuse any other."""
        from torch.distributed.checkpoint import filesystem, metadata

        if module == metadata.__name__ and name in _METADATA_CLASSES:
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return _PATHS[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_folder(folder: Path) -> Contents:
    """Read the model in a folder that ``torch.distributed.checkpoint.save`` wrote.

    The model may be all of the state or a part of it, as in ``{"model": ..., "optim": ...}``.

    Raises:
        CheckpointError: the folder is damaged or incomplete, holds code, or holds no model or several.
    """
    metadata = read_metadata(folder / METADATA_NAME)
    entries: Mapping[str, Any] = metadata.state_dict_metadata
    prefix = _prefix(folder, entries)
    state, files = {}, set()
    for name, entry in entries.items():
        if name.startswith(prefix) and hasattr(entry, "chunks"):
            state[name.removeprefix(prefix)], used = read_tensor(folder, name, entry, metadata.storage_data)
            files |= used
    state = plain_names(state)
    refuse_hugging_face_names(state, folder)
    layout = "folder of torch.distributed.checkpoint" + (f" (the model is in {prefix[:-1]!r})" if prefix else "")
    epoch, step = (_read_number(folder, metadata, name) for name in ("epoch", "step"))
    preprocessing = complete_preprocessing({}, is_siglip=is_siglip_state(state))
    return Contents(folder, layout, tuple(sorted(files)), state, None, preprocessing, epoch=epoch, step=step)


def read_metadata(path: Path) -> Any:
    """Read DCP's index of all shards.

    Raises:
        CheckpointError: the index is damaged, or holds code.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(read_regular(path, MAX_METADATA))).load()
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise TypeError("it lists no tensors")
    except Exception as error:  # a broken pickle raises almost anything
        raise CheckpointError(
            f"{path} is refused: it is damaged, or is no list of torch.distributed.checkpoint ({error})"
        ) from error
    return metadata


def _prefix(folder: Path, entries: Mapping[str, Any]) -> str:
    """Return the prefix of the names of the model's weights: "" or, for instance, "app.model."."""
    names = [name for name, entry in entries.items() if hasattr(entry, "chunks")]
    found = [name.removesuffix(_COMMON) for name in names if name == _COMMON or name.endswith(f".{_COMMON}")]
    # An optimizer or a moving average may have an entry for this parameter too; the model's prefix has "model" in it.
    if len(found) > 1:
        found = [prefix for prefix in found if "model" in prefix.split(".")] or found
    if len(found) != 1:
        where = f"several, under {', '.join(map(repr, found))}" if found else f"none: no name in it ends in {_COMMON}"
        raise CheckpointError(
            f"{folder} must hold one model, and it holds {where}; save the model's state by itself, or under 'model'"
        )
    return found[0]


def read_tensor(folder: Path, name: str, entry: Any, places: Mapping[Any, Any]) -> tuple[Tensor, set[Path]]:
    """Assemble a checkpoint's tensor from its DCP shards; return it with the files of the shards."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    files = set()
    try:
        shape, dtype = torch.Size(entry.size), entry.properties.dtype
        if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != shape.numel():
            raise ValueError("its shards do not make the whole")
        value, covered = torch.empty(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
        for chunk in entry.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            part = _read_slice(folder, place)
            window = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            if part.dtype != dtype or part.shape != torch.Size(chunk.sizes) or value[window].shape != part.shape:
                raise ValueError(f"a shard is {tuple(part.shape)} of {part.dtype}, and is listed as something else")
            if covered[window].any():
                raise ValueError("its shards overlap")
            value[window], covered[window] = part, True
            files.add(folder / place.relative_path)
    except Exception as error:  # broken files make the readers raise almost anything
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{folder} is damaged or incomplete: {name} cannot be read: {reason}") from error
    return value, files


def _read_slice(folder: Path, place: Any) -> Any:
    """Read a checkpoint's DCP shard or value, which ``torch.save`` wrote into a part of a file; verify its checksums.

    Raises:
        ValueError: the file is in another folder, or the part is damaged, has another format, or could run code.
    """
    if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
        raise ValueError(f"it lies in {place.relative_path!r} in a form that clipfast does not read")
    with open_regular(folder / place.relative_path) as file:
        file.seek(place.offset)
        stream = io.BytesIO(file.read(min(place.length, os.fstat(file.fileno()).st_size)))
    check_archive(stream, place.relative_path)
    stream.seek(0)
    try:
        return torch.load(stream, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message recommends weights_only=False, which would run code in the file.
        raise ValueError("it is an object other than a tensor or a plain value, which could run code") from error


def _read_number(folder: Path, metadata: Any, name: str) -> int | None:
    """Return the integer (such as the step) that a DCP checkpoint stores under ``name`` at any depth, or None."""
    found = [index for index in metadata.storage_data if index.fqn == name or index.fqn.endswith(f".{name}")]
    found = [index for index in found if not hasattr(metadata.state_dict_metadata.get(index.fqn), "chunks")]
    if len(found) != 1:
        return None
    try:
        value = _read_slice(folder, metadata.storage_data[found[0]])
    except Exception:  # a missing epoch or step is not worth an error
        return None
    return value if isinstance(value, int) else None
