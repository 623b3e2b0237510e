"""The feature store (``--features``): a folder that keeps features of models for later evaluations."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..io.files import replace_file, replace_text

log = logging.getLogger("clipfast")
ABOUT = "about.json"
VERSION = 1


class FeatureStore:
    """A folder of features: ``FOLDER/<kind>/<hash>/`` has the features of one model and one set of data, in parts.

    The hash is that of ``about.json`` there, which describes the model and the data. If a process is killed, each part
    is complete or absent. The store never removes features; delete unneeded folders yourself.

    Args:
        folder: the folder, which is made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def section(self, kind: str, about: dict[str, Any]) -> "Section":
        """Return the section of the feature store for features of one model and one input.

        Args:
            kind: "images" or "texts".
            about: all values on which the features depend, as plain values; they are written to ``about.json``.
        """
        about = {"version": VERSION, **about}
        text = json.dumps(about, indent=2, sort_keys=True) + "\n"
        folder = self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ABOUT).exists():
            replace_text(folder / ABOUT, text)
        return Section(folder)


class Section(NamedTuple):
    """The features of one model and one input in the feature store, in parts."""

    folder: Path

    def _path(self, name: str) -> Path:
        """Return the path of the file in which the feature store keeps a part of the features."""
        return self.folder / f"{name}.safetensors"

    def holds(self, name: str) -> bool:
        """Return True if the feature store has the part ``name`` of the features, and the part can be read."""
        if not self._path(name).exists():
            return False
        try:
            self.load(name)
        except Exception as error:  # safetensors raises many kinds of errors for damaged files
            log.warning(f"{self._path(name)} cannot be read, and is computed again: {error}")
            return False
        return True

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write a part of the features with plain values to the feature store.

        Raises:
            DiskFullError: there is no space.
        """
        from safetensors.torch import save_file

        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in contiguous.values())
        # Several processes may write the same part at the same time, so each one has a temporary file of its own.
        own = self.folder / f"{name}.{os.getpid()}.safetensors"
        replace_file(own, lambda path: save_file(contiguous, path, {"values": json.dumps(values)}), size)
        own.replace(self._path(name))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a part of the features and its plain values from the feature store."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["values"])
