"""The contents of a checkpoint, whatever its layout: the form between reading one layout and writing another."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models import CLIPConfig


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint, under the names that clipfast and OpenCLIP share.

    Attributes:
        source: the file or folder, as the user named it.
        layout: what it is, in words.
        files: the files that hold the weights.
        state: the weights by name. They may lie on the disk until they are used.
        config: the configuration of the model; None if the checkpoint does not say it.
        preprocessing: how images are prepared, in OpenCLIP's words: mean, std, interpolation and resize_mode.
        tokenizer: the files of a tokenizer that lie beside the weights.
        epoch, step: how far training had come, if the checkpoint says it.
    """

    source: Path
    layout: str
    files: tuple[Path, ...]
    state: dict[str, Tensor]
    config: CLIPConfig | None
    preprocessing: dict[str, Any]
    tokenizer: tuple[Path, ...] = ()
    epoch: int | None = None
    step: int | None = None

    @property
    def settled_config(self) -> CLIPConfig:
        """The configuration of a model that :func:`resolve` has settled on.

        Raises:
            ValueError: nothing has settled it yet.
        """
        if self.config is None:
            raise ValueError(f"{self.source} has no configuration: resolve() must settle on one before it is written")
        return self.config
