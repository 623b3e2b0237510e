"""Text input, a row of the table and one of the positions for each token: ours against lookup and addition."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import reference, text_embed
from clipfast.kernels.floors import text_embed_floor

from ..case import DTYPES, OURS, Candidate, Case, Inputs, without_grads
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"batch": 64, "tokens": 77, "vocab": 49408, "width": 512}
SMALLEST: Mapping[str, int | str | bool] = {"batch": 2, "tokens": 5, "vocab": 11, "width": 16}
WORDS = 20  # of a caption: the rest is padding, which is id 0


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """Texts of B, L and H."""
    batch = 32 if device_type == "cpu" else 1024
    return [{"batch": batch, "tokens": 77, "vocab": 49408, "width": width} for width in (512, 768, 1024)]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Random captions, padded; table and positions take gradients."""
    batch, tokens, vocab, width = (shape[key] for key in FIELDS)

    def inputs() -> Inputs:
        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device).to(DTYPES[dtype])

        text = torch.randint(0, vocab, (batch, tokens), device=device)
        text[:, WORDS:] = 0
        return {
            "text": text,
            "token_embedding": draw(vocab, width),
            "positional_embedding": draw(tokens, width),
            "grad": draw(batch, tokens, width),
        }

    itemsize = DTYPES[dtype].itemsize
    return Case(
        suite="text",
        op="text_embed.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=(
            Candidate(OURS, lambda: without_grads(text_embed)),
            Candidate("PyTorch", lambda: without_grads(reference.text_embed)),
            Candidate("PyTorch compiled", lambda: peers.compiled(without_grads(reference.text_embed))),
        ),
        reference=without_grads(reference.text_embed),
        floor=text_embed_floor(batch, tokens, vocab, width, itemsize, itemsize, backward=True),
        items=(batch, "texts"),
        wants_grad=("token_embedding", "positional_embedding"),
    )
