"""Tokenizers in the file format of the tokenizers package, for SigLIP (T5's tokenizer) and SigLIP 2 (Gemma's).

They are read from a local file: clipfast ships no such file, and this module downloads none.
"""

import contextlib
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import read_json, replace_text
from . import SigLIPConfig
from .siglip_config import CLEANINGS
from .tokenizer import unescaped

FILE_NAME, SETTINGS_NAME = "tokenizer.json", "tokenizer_config.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class FileTokenizer:
    """A tokenizer from ``tokenizer.json``, which turns text into token ids and back as OpenCLIP's ``HFTokenizer`` does.

    Args:
        path: the file, or its folder. If files of transformers lie beside it, they tell the padding token.
        context_length: tokens per text, including those that the file adds, such as the end of the text.
        clean: the cleaning of texts: "canonicalize" (lower case, without punctuation), "lower" or "whitespace".
        pad_id: the id of the padding token if no file tells it.

    Raises:
        ValueError: the file does not exist or is not a tokenizer, or an argument is wrong.
        ImportError: the tokenizers package is missing.
    """

    def __init__(
        self, path: str | Path, context_length: int = 64, clean: str = "canonicalize", pad_id: int = 1
    ) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "this tokenizer needs the tokenizers package: pip install 'clipfast[siglip]'", name="tokenizers"
            ) from error
        if clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {', '.join(CLEANINGS)}, got {clean!r}")
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at {file}: give {FILE_NAME}, or the folder that holds it")
        with _refusing(file):
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        self.file, self.context_length, self.clean = file, context_length, clean
        self.pad_token_id = _pad_id(self._tokenizer, file.parent, pad_id)
        self._pads_left = _read_settings(file.parent / SETTINGS_NAME).get("padding_side") == "left"
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.encode("a photo of a \u2603")  # a trial, because some tokenizer files load, but fail on unknown characters
        self._added = int(self._tokenizer.num_special_tokens_to_add(False))
        self._check_length(context_length)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, with the special tokens that the file adds, without padding.

        Raises:
            TypeError: ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"tokenizer: text must be a string, got {type(text).__name__}: {text!r:.80}")
        with _refusing(self.file):
            ids: list[int] = self._tokenizer.encode(_clean_text(text, self.clean)).ids
        return ids

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the text of token ids, without special tokens."""
        text: str = self._tokenizer.decode([int(token) for token in tokens])
        return text

    def __call__(self, texts: str | list[str], context_length: int | None = None, truncate: bool = True) -> Tensor:
        """Return the token ids of texts as a batch.

        Args:
            texts: one text or several.
            context_length: tokens per text; default: the tokenizer's own.
            truncate: cut texts that are too long and keep their end token; with False they are an error.

        Returns:
            [len(texts), context_length] int64; each row is padded with the padding token, at its end unless the files
            of transformers say otherwise.

        Raises:
            TypeError: a text is not a string.
            ValueError: a text is too long and ``truncate`` is False, or ``context_length`` is too small.
        """
        length = self.context_length if context_length is None else context_length
        self._check_length(length)
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            if len(ids) > length:
                if not truncate:
                    raise ValueError(f"tokenizer: text has {len(ids)} tokens, {length} fit: {text!r:.80}")
                ids = self._truncated(text, length)
            padding = [self.pad_token_id] * (length - len(ids))
            rows.append(padding + ids if self._pads_left else ids + padding)
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder`` in a form that clipfast, OpenCLIP and transformers read.

        The written settings always include the padding token, which may originally have come from another file.
        """
        replace_text(folder / FILE_NAME, self.file.read_text(encoding="utf-8"))
        settings = _read_settings(self.file.parent / SETTINGS_NAME) or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
        }
        settings["pad_token"] = self._tokenizer.id_to_token(self.pad_token_id)
        replace_text(folder / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n")

    def _truncated(self, text: str, length: int) -> list[int]:
        """Return the token ids of ``text`` cut to ``length``; the tokenizers package places the special tokens."""
        self._tokenizer.enable_truncation(length)
        try:
            return self.encode(text)
        finally:
            self._tokenizer.no_truncation()

    def _check_length(self, length: int) -> None:
        """Refuse a context length of the tokenizer that holds no token beside the special ones."""
        if length <= self._added:
            raise ValueError(
                f"context_length must hold the {self._added} special token(s) and at least one more, got {length}"
            )


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turn all errors of the tokenizers package into a ValueError that names the tokenizer's file.

    A panic of the package's Rust code is a BaseException, and not an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{file} is not a file of the tokenizers package that can be used: {error!s:.300}") from error


def tokenizer_of(config: SigLIPConfig, name: str, path: str | Path | None, context_length: int | None) -> FileTokenizer:
    """Open the tokenizer of a SigLIP model, and check that it fits the model.

    Args:
        config: the model's configuration.
        name: the name of the model for error messages.
        path: the tokenizer's file or folder.
        context_length: tokens per text, in place of the model's.

    Raises:
        ValueError: ``path`` is None, or as for :class:`FileTokenizer`, or the vocabulary is larger than the model's.
    """
    if path is None:
        where = f", that of the Hugging Face repository {config.tokenizer}" if config.tokenizer else ""
        raise ValueError(
            f"{name} needs the file {FILE_NAME} of its tokenizer{where}, which clipfast does not ship: pass its path "
            "as tokenizer_file (on the command line --tokenizer), or put it into the model's folder"
        )
    length = config.text.context_length if context_length is None else context_length
    tokenizer = FileTokenizer(path, length, config.clean, config.pad_id)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer at {path} has {tokenizer.vocab_size} tokens, and {name} knows only "
            f"{config.text.vocab_size}: it is not the one that the model was trained with"
        )
    return tokenizer


def _pad_id(tokenizer: Any, folder: Path, otherwise: int) -> int:
    """Return the padding token's id from transformers' files in ``folder``, else the tokenizer, else ``otherwise``."""
    for name in (SETTINGS_NAME, "special_tokens_map.json"):
        token = _read_settings(folder / name).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is not None:
            return int(found)
    return int(tokenizer.padding["pad_id"]) if tokenizer.padding else otherwise


def _read_settings(path: Path) -> dict[str, Any]:
    """Read the tokenizer settings in a JSON file of transformers; {} if the file is missing or not an object."""
    try:
        raw = read_json(path)
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _clean_text(text: str, clean: str) -> str:
    """Clean a text as OpenCLIP's tokenizer does for the value ``clean``; "canonicalize" is big_vision's for SigLIP."""
    text = unescaped(text)
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if clean == "whitespace" else text.lower()
