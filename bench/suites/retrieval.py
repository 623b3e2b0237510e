"""Ranks of image-text retrieval: ours, without the scores, against the reference, which has them all."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import reference, retrieval_ranks
from clipfast.kernels.floors import Floor

from ..case import DTYPES, OURS, Candidate, Case, Function, Inputs
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"images": 5000, "texts": 25000, "embed_dim": 512}
SMALLEST: Mapping[str, int | str | bool] = {"images": 20, "texts": 50, "embed_dim": 16}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """The test sets of Flickr30k and COCO, five captions for an image."""
    sizes = (1000,) if device_type == "cpu" else (1000, 5000)
    return [{"images": images, "texts": 5 * images, "embed_dim": 512} for images in sizes]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Unit features at random; texts belong to images in turn."""
    images, texts, embed_dim = (shape[key] for key in FIELDS)

    def inputs() -> Inputs:
        image, text = (
            F.normalize(torch.randn(rows, embed_dim, device=device), dim=-1).to(DTYPES[dtype])
            for rows in (images, texts)
        )
        return {"image": image, "text": text, "text_image": torch.arange(texts, device=device) % images}

    return Case(
        suite="retrieval",
        op="retrieval_ranks",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=(
            Candidate(OURS, lambda: _as_one(retrieval_ranks)),
            Candidate("PyTorch", lambda: _as_one(reference.retrieval_ranks)),
            Candidate("PyTorch compiled", lambda: peers.compiled(_as_one(reference.retrieval_ranks))),
        ),
        reference=_as_one(reference.retrieval_ranks),
        # features are read, ranks written
        floor=Floor(2.0 * images * texts * embed_dim, (images + texts) * (embed_dim * DTYPES[dtype].itemsize + 8)),
        items=(texts, "texts"),
    )


def _as_one(function: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    def run(image: Tensor, text: Tensor, text_image: Tensor) -> Tensor:
        return torch.cat(function(image, text, text_image=text_image))

    return run
