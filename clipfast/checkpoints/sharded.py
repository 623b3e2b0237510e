"""Checkpoints in parts: a folder into which every rank writes its tensors by ``torch.distributed.checkpoint`` (DCP).

``manifest.json`` has the size and the SHA-256 of every file, and is written last: a folder without it, or one whose
files differ from it, is no checkpoint. Only tensors, plain values and the classes of DCP's index are unpickled, so that
a folder from somebody else cannot run code.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.dtensors import is_dtensor
from ..distributed.world import World
from ..io.files import read_json, replace_text, sha256, sync
from .checkpoint import CheckpointError
from .torch_dcp import METADATA_NAME, read_metadata, read_tensor

MANIFEST = "manifest.json"
REST = "rest.pt"  # the file of everything but tensors, with placeholders for the tensors
_TENSOR = "name of a tensor"


def write_parts(folder: Path, content: dict[str, Any], world: World) -> None:
    """Write a checkpoint into ``folder``, which all ranks must see. All ranks call this function together.

    An existing folder is replaced. If a process is killed, ``folder`` is complete, or as before, or absent.

    Args:
        folder: its parent must exist.
        content: nested dicts and lists of tensors, which may be sharded, and plain values; with the same structure on
            every rank. Tensors and values that are not sharded are taken from rank 0.
        world: the processes.

    Raises:
        OSError: a rank cannot write its part; all ranks raise this error.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")

    def empty() -> None:
        """Make the temporary folder of a sharded checkpoint anew, without files."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    world.on_main(empty)
    everyones = world.gather(_written(temporary, content, world))

    def finish() -> None:
        """Raise an error if a rank could not write its part; otherwise complete the checkpoint."""
        failed = [theirs for theirs in everyones if isinstance(theirs, OSError)]
        if failed:
            raise failed[0]
        sealed = [theirs for theirs in everyones if not isinstance(theirs, OSError)]
        files = {name: seal for theirs in sealed for name, seal in theirs.items()}
        missing = [name for name, seal in files.items() if not _has_size(temporary / name, seal)]
        if missing:
            raise OSError(f"{temporary / missing[0]} is not there for rank 0: all ranks must write to the same disk")
        replace_text(temporary / MANIFEST, json.dumps(files, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)

    def finish_or_leave_nothing() -> None:
        """Complete the checkpoint, or remove its parts if that fails."""
        try:
            finish()
        except OSError:  # an incomplete checkpoint must not fill the disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    world.on_main(finish_or_leave_nothing)


def _written(folder: Path, content: dict[str, Any], world: World) -> "dict[str, dict[str, Any]] | OSError":
    """Write this rank's part of a sharded checkpoint, and return size and SHA-256 of its files, or the error."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(content, "", tensors)
    mine = {name: tensor for name, tensor in tensors.items() if world.is_main or is_dtensor(tensor)}
    try:
        save(dict(mine), checkpoint_id=folder, process_group=world.hosts)
        files = sorted(folder.glob(f"__{world.rank}_*"))
        if world.is_main:
            torch.save(rest, folder / REST)
            files += [folder / METADATA_NAME, folder / REST]
        return {path.name: _seal(path) for path in files}
    except CheckpointException as error:  # DCP raises the same error on all ranks
        rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return _os_error(reason, rank)
    except Exception as error:
        return _os_error(error, world.rank)


def _os_error(error: BaseException, rank: int) -> OSError:
    """Return an error of writing a checkpoint in a form that can be pickled and sent to other processes."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"{error.strerror} (rank {rank})")
    return OSError(f"{error} (rank {rank})")


def check_parts(folder: Path) -> None:
    """Compare the files of a sharded checkpoint with its manifest.

    Raises:
        CheckpointError: there is no manifest, or a file is missing or differs.
    """
    try:
        files: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)
        names = {name: (seal["size"], seal["sha256"]) for name, seal in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {MANIFEST} cannot be read: {error}") from error
    for name in {METADATA_NAME, REST} - names.keys():
        raise CheckpointError(f"{folder} is no whole checkpoint: {MANIFEST} does not list {name}")
    for name, (size, digest) in names.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != size or sha256(path) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} is not the file that was written")


def read_parts(folder: Path, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return a checkpoint that :func:`write_parts` wrote, with full tensors, on any number of processes.

    Args:
        folder: the checkpoint.
        without: keys of the content to leave out; their tensors are not read.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds anything but tensors and plain values.
    """
    rest = {key: value for key, value in read_rest(folder).items() if key not in without}
    metadata = read_metadata(folder / METADATA_NAME)

    def joined(value: Any) -> Any:
        """Return a value of the checkpoint with tensors in place of their names."""
        if isinstance(value, dict) and value.keys() == {_TENSOR}:
            name = value[_TENSOR]
            if name not in metadata.state_dict_metadata:
                raise CheckpointError(f"{folder} is damaged: it does not hold {name}")
            return read_tensor(folder, name, metadata.state_dict_metadata[name], metadata.storage_data)[0]
        if isinstance(value, dict):
            return {key: joined(item) for key, item in value.items()}
        return type(value)(map(joined, value)) if isinstance(value, list | tuple) else value

    try:
        content: dict[str, Any] = joined(rest)
    except RecursionError as error:
        raise CheckpointError(f"{folder / REST} is refused: its lists are nested too deeply") from error
    return content


def read_rest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint that :func:`write_parts` wrote, without its tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds anything but plain values.
    """
    check_parts(folder)
    try:
        rest: dict[str, Any] = torch.load(folder / REST, "cpu", weights_only=True)
    except Exception as error:  # broken files make the reader raise almost anything
        raise CheckpointError(f"{folder / REST} is refused: it is damaged, or could run code ({error})") from error
    if not isinstance(rest, dict):
        raise CheckpointError(f"{folder / REST} is refused: it holds no checkpoint")
    return rest


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors in a checkpoint's nested dicts and lists by names, and put them into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(item, f"{name}.{place}", tensors) for place, item in enumerate(value))
    return value


def _seal(path: Path) -> dict[str, Any]:
    """Flush a checkpoint's file to the disk, and return its size and its SHA-256."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _has_size(path: Path, seal: dict[str, Any]) -> bool:
    """Return True if a file of a sharded checkpoint has the size that the manifest says."""
    return path.is_file() and path.stat().st_size == seal["size"]
