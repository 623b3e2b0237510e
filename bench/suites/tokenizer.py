"""From captions to token ids: our tokenizer against OpenCLIP's, on ASCII and on other scripts."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipfast import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, Tokenizer

from ..case import OURS, Candidate, Case, Function, Sizes
from . import peers

FIELDS: Sizes = {"captions": 2000, "text": "ascii"}
SMALLEST: Sizes = {"captions": 20, "text": "unicode"}
# English captions, and the same captions with other letters, ideographs and an emoji.
SUFFIX = {"ascii": "", "unicode": " – ein Foto, 一张照片 📷"}
_CAPTIONS: list[Sizes] = [{"captions": 2000, "text": text} for text in SUFFIX]
SHAPES = {"cpu": _CAPTIONS, "cuda": _CAPTIONS}


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the case of class names in prompt templates, all different. Both tokenizers must give the same ids."""
    count, text = shape["captions"], shape["text"]
    if text not in SUFFIX:
        raise ValueError(f"tokenizer: text must be one of {', '.join(SUFFIX)}, got {text!r}")
    filled = (t.format(name) for t in OPENAI_IMAGENET_TEMPLATES for name in IMAGENET_CLASSNAMES)
    captions = [caption + SUFFIX[text] for caption, _ in zip(filled, range(count), strict=False)]
    if len(captions) < count:
        raise ValueError(f"tokenizer: at most {len(captions)} captions, got {count}")

    def open_clip() -> Function:
        return functools.partial(_encode, captions, peers.need("open_clip", "open_clip_torch").SimpleTokenizer())

    ours = Candidate(OURS, lambda: functools.partial(_encode, captions, Tokenizer()))
    return Case(
        suite="tokenizer", op="tokenizer.encode", shape=shape, dtype=dtype, device=device,
        inputs=lambda: {"order": torch.randperm(count)},
        candidates=(ours, Candidate("OpenCLIP tokenizer", open_clip)),
        reference=ours,
        items=(count, "captions"),
    )  # fmt: skip


def _encode(captions: list[str], tokenizer: Any, order: Tensor) -> Tensor:
    ids: Tensor = tokenizer([captions[index] for index in order.tolist()])
    return ids
