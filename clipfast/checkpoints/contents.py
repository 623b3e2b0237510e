"""``Contents``: the contents of a checkpoint in a common form, which is read from one layout and written to another."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import replace_text
from ..models import CLIPConfig, TextConfig, build
from ..models.tokenizer import END_OF_TEXT, START_OF_TEXT, Tokenizer
from .checkpoint import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "tokenizer.model",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint, under the names that clipfast and OpenCLIP share.

    Attributes:
        source: the file or folder, as the user named it.
        layout: the kind of file or folder, in messages.
        files: the files that hold the weights.
        state: the weights by name. They may be memory-mapped.
        config: the configuration of the model; None if the checkpoint does not tell it.
        preprocessing: the preprocessing settings by OpenCLIP's names: mean, std, interpolation and resize_mode.
        tokenizer: the files of a tokenizer beside the weights.
        epoch, step: the number of finished epochs and steps, if the checkpoint tells it.
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
        """The configuration of a checkpoint's model, after :func:`resolve` has determined it."""
        assert self.config is not None
        return self.config


def check_size(config: CLIPConfig, files: Sequence[Path], source: str | Path) -> None:
    """Refuse a checkpoint whose configuration describes a model that is far larger than its weights.

    Raises:
        CheckpointError: as above.
    """
    size, least = sum(file.stat().st_size for file in files if file.exists()), config.least_parameters
    if least > size and all(file.exists() for file in files):  # a parameter has at least one byte
        raise CheckpointError(
            f"{source} does not describe the model of these weights: it has {least:,} parameters or more, and the "
            f"weights have {size:,} bytes; correct the sizes in the configuration"
        )


def empty_state(config: CLIPConfig, source: str | Path) -> dict[str, Tensor]:
    """Return the state dict of the model of ``config`` on the device "meta", where tensors have no memory.

    Args:
        config: the configuration.
        source: the name of the checkpoint for the error message.

    Raises:
        CheckpointError: no model has this configuration.
    """
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} does not describe a model that can be built: {error}") from error


def find_tokenizer(folder: Path) -> tuple[Path, ...]:
    """Return the files of a tokenizer in a checkpoint's folder."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def copy_tokenizer(folder: Path, found: Sequence[Path]) -> None:
    """Copy a checkpoint's tokenizer files ``found`` into ``folder``."""
    for file in found:
        shutil.copyfile(file, folder / file.name)


def write_tokenizer(folder: Path, text: TextConfig) -> None:
    """Write the files of CLIP's tokenizer beside a checkpoint for transformers, unless the model has another one."""
    tokenizer = Tokenizer(text.context_length)
    if tokenizer.vocab_size != text.vocab_size:
        return
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {START_OF_TEXT: start, END_OF_TEXT: end}
    vocabulary = {names.get(symbol, symbol): token for symbol, token in tokenizer.vocabulary.items()}
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True,
        "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "add_prefix_space": False,
    }  # fmt: skip
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    replace_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    replace_text(folder / "merges.txt", "\n".join(merges) + "\n")
    replace_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
