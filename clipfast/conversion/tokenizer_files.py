"""The files of a tokenizer that lie beside weights."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..files import replace_text
from ..models import TextConfig
from ..tokenizer import END_OF_TEXT, START_OF_TEXT, Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "tokenizer.model",
)  # fmt: skip


def find_tokenizer(folder: Path) -> tuple[Path, ...]:
    """Return the files of a tokenizer in ``folder``."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def write_tokenizer(folder: Path, found: Sequence[Path], text: TextConfig) -> None:
    """Copy the files ``found`` into ``folder``, or write those of CLIP's tokenizer for transformers if there are none.

    A model with another vocabulary than CLIP's gets none that were not there.
    """
    if found:
        copy_tokenizer(folder, found)
        return
    tokenizer = Tokenizer(text.context_length)
    if tokenizer.vocab_size != text.vocab_size:
        return
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {{START_OF_TEXT: start, END_OF_TEXT: end}.get(symbol, symbol): token
                  for symbol, token in tokenizer.vocabulary.items()}  # fmt: skip
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True,
        "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "add_prefix_space": False,
    }  # fmt: skip
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    replace_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    replace_text(folder / "merges.txt", "\n".join(merges) + "\n")
    replace_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def copy_tokenizer(folder: Path, found: Sequence[Path]) -> None:
    """Copy the files ``found`` into ``folder``."""
    for file in found:
        shutil.copyfile(file, folder / file.name)
