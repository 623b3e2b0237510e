"""CLIP's byte-pair tokenizer: 49,408 ids, lower-cased, exact on any Unicode.

Text is cleaned as OpenAI's tokenizer does (ftfy, HTML unescaped twice, white space folded, lower case) and split into
words, and the UTF-8 bytes of each word are merged by rank (Sennrich et al. 2016). It is fast for two reasons: plain
ASCII skips the cleaning, which would not change it, and the ids of each word are cached.
"""

import functools
import gzip
import html
import re
from collections.abc import Iterable
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CONTEXT_LENGTH = 77
START_OF_TEXT, END_OF_TEXT = "<start_of_text>", "<end_of_text>"
NUM_MERGES = 49152 - 256 - 2
WORD_CACHE_SIZE = 2**17

_SPECIAL_AND_CONTRACTIONS = rf"{START_OF_TEXT}|{END_OF_TEXT}|'s|'t|'re|'ve|'m|'ll|'d"
# This matches words of lower-case ASCII, for which the standard library's ``re``, which is faster, is enough.
_ASCII_WORD = re.compile(_SPECIAL_AND_CONTRACTIONS + r"|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)
# This matches "&" and all characters but printable ASCII and white space: ftfy and HTML unescaping change nothing else.
_NEEDS_CLEANING = re.compile(r"[^\t\n\r -%'-~]")


class Tokenizer:
    """CLIP's tokenizer, which turns text into token ids and back.

    Args:
        context_length: tokens per text, including start and end.

    Raises:
        ValueError: ``context_length`` is less than 2.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must hold at least the start and end tokens, got {context_length}")
        self.context_length = context_length
        self._byte_symbols = _byte_symbols()
        self.merges, self.vocabulary, self._ranks = _tables()
        self.vocab_size = len(self.vocabulary)
        self.sot_token_id, self.eot_token_id = self.vocabulary[START_OF_TEXT], self.vocabulary[END_OF_TEXT]
        self._word_ids = functools.lru_cache(WORD_CACHE_SIZE)(self._encode_word)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[int]]:
        """Pickle only the context length: another process rebuilds the tokenizer, with an empty cache."""
        return Tokenizer, (self.context_length,)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without start, end or padding.

        Raises:
            TypeError: ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"tokenizer: text must be a string, got {type(text).__name__}: {text!r:.80}")
        if _NEEDS_CLEANING.search(text) is None:
            words = _ASCII_WORD.findall(text.lower())
        else:
            words = _any_word().findall(" ".join(unescaped(text).split()).lower())
        word_ids = self._word_ids
        return [token for word in words for token in word_ids(word)]

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the text of token ids, with a space after each word, and the names of the start and end tokens."""
        symbols = {index: symbol for symbol, index in self.vocabulary.items()}
        to_byte = {symbol: byte for byte, symbol in self._byte_symbols.items()}
        text = "".join(symbols[int(token)] for token in tokens)
        return bytes(to_byte[symbol] for symbol in text).decode("utf-8", errors="replace").replace("</w>", " ")

    def __call__(self, texts: str | list[str], context_length: int | None = None, truncate: bool = True) -> Tensor:
        """Return the token ids of texts as a batch.

        Args:
            texts: one text or several.
            context_length: tokens per text; default: the tokenizer's own.
            truncate: cut texts that are too long and keep their end token; with False they are an error.

        Returns:
            [len(texts), context_length] int64; each row has the start token, the tokens of the text, the end token, and
            zeros.

        Raises:
            TypeError: a text is not a string.
            ValueError: a text is too long and ``truncate`` is False, or ``context_length`` is less than 2.
        """
        length = self.context_length if context_length is None else context_length
        if length < 2:
            raise ValueError(f"tokenizer: context_length must hold at least the start and end tokens, got {length}")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            if len(ids) > length - 2:
                if not truncate:
                    raise ValueError(
                        f"tokenizer: text has {len(ids)} tokens, "
                        f"{length - 2} fit into context_length={length}: {text!r:.80}"
                    )
                ids = ids[: length - 2]
            rows.append([self.sot_token_id, *ids, self.eot_token_id] + [0] * (length - 2 - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Return the token ids of a word by byte-pair encoding: the pair of lowest rank is merged first."""
        if word in (START_OF_TEXT, END_OF_TEXT):
            return (self.vocabulary[word],)
        parts = [self._byte_symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, NUM_MERGES))
            if best not in self._ranks:
                break
            parts = _merge(parts, best)
        return tuple(self.vocabulary[part] for part in parts)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Merge every occurrence of a pair of BPE symbols, from left to right."""
    merged: list[str] = []
    index = 0
    while index < len(parts):
        if tuple(parts[index : index + 2]) == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(parts[index])
            index += 1
    return merged


@functools.cache
def _any_word() -> Any:
    """Return the pattern of a word in any script; it needs the regex package, since ``re`` cannot express it."""
    import regex  # imported here, since texts of plain ASCII do not need the regex package

    return regex.compile(_SPECIAL_AND_CONTRACTIONS + r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def unescaped(text: str) -> str:
    """Clean a text that is not plain ASCII: ftfy repairs wrong encodings, and HTML is unescaped."""
    import ftfy  # imported here, so that a machine without ftfy can train on ASCII texts

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte in the BPE vocabulary, in vocabulary order.

    A visible character stands for itself; the other bytes get the characters from U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}


def _read_merges() -> list[tuple[str, str]]:
    """Read the BPE merges: the pairs of symbols that are merged, in the order of their rank."""
    packed = files("clipfast").joinpath("assets/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]


@functools.cache
def _tables() -> tuple[list[tuple[str, str]], dict[str, int], dict[tuple[str, str], int]]:
    """Return the BPE merges, vocabulary and merge ranks; all tokenizers share them, since reading them takes long."""
    merges = _read_merges()
    symbols = list(_byte_symbols().values())
    vocabulary = (
        symbols
        + [symbol + "</w>" for symbol in symbols]
        + ["".join(pair) for pair in merges]
        + [START_OF_TEXT, END_OF_TEXT]
    )
    ids = {symbol: index for index, symbol in enumerate(vocabulary)}
    return merges, ids, {pair: rank for rank, pair in enumerate(merges)}


def trim_padding(texts: Tensor) -> Tensor:
    """Cut columns of token ids that are padding in every row, down to a multiple of 4: [B, L] -> [B, L'].

    A causal text tower returns the same features without them. (SigLIP's tower is not causal, and reads the padding.)
    """
    longest = int(texts.argmax(-1).max()) + 1
    return texts[:, : min(texts.shape[1], -(-longest // 4) * 4)].contiguous()


@functools.cache
def _default() -> Tokenizer:
    """Return CLIP's tokenizer, which is made once."""
    return Tokenizer()


def tokenize(texts: str | list[str], context_length: int = CONTEXT_LENGTH, truncate: bool = True) -> Tensor:
    """Return the token ids of texts, [len(texts), context_length] int64; see :class:`Tokenizer`."""
    return _default()(texts, context_length, truncate)
