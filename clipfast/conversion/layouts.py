"""Recognising what a file or folder is."""

from pathlib import Path

from ..checkpoint import CONFIG_NAME, WEIGHTS_NAMES, CheckpointError
from . import hugging_face, open_clip, torchscript
from .contents import Contents

_LOCAL_DIR_PREFIX = "local-dir:"  # OpenCLIP's, in front of the names of folders


def read_contents(source: str | Path, *, trust: bool = False) -> Contents:
    """Read a checkpoint of any layout, without building a model.

    Args:
        source: a file, or a folder (OpenCLIP's ``local-dir:`` in front of it is allowed).
        trust: read TorchScript archives too, which are code.

    Raises:
        CheckpointError: it is none of the layouts, is damaged or incomplete, or holds a model that clipfast cannot
            build; the message says which, and what to do.
    """
    path = Path(str(source).removeprefix(_LOCAL_DIR_PREFIX))
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    return torchscript.read_file(path, trust=trust) if torchscript.is_archive(path) else open_clip.read_file(path)


def _read_folder(folder: Path) -> Contents:
    names = {entry.name for entry in folder.iterdir()}
    # Repositories that hold both have the weights twice.
    is_hugging_face = hugging_face.CONFIG_NAME in names
    if CONFIG_NAME in names and (names & {*WEIGHTS_NAMES} or not is_hugging_face):
        return open_clip.read_folder(folder)
    if is_hugging_face:
        return hugging_face.read_folder(folder)
    if not names:
        raise CheckpointError(f"{folder} is an empty folder: there is no checkpoint in it")
    if ".metadata" in names:
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed.checkpoint, which clipfast does not read; this makes a "
            f"file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    if names & {*hugging_face.WEIGHTS_NAMES}:
        raise CheckpointError(
            f"{folder} holds weights of transformers without config.json, which says what model they belong to: "
            "put the model's config.json beside them"
        )
    if names & {*WEIGHTS_NAMES}:
        raise CheckpointError(
            f"{folder} holds weights of OpenCLIP without {CONFIG_NAME}: give the file of the weights, and the model's "
            "name with --model"
        )
    raise CheckpointError(
        f"{folder} is no checkpoint: there is neither {CONFIG_NAME} (OpenCLIP) nor config.json (transformers) in it; "
        "if it holds checkpoints, give one of its files"
    )
