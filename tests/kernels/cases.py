"""Inputs of the loss tests: each size says why it is there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.verify.inputs import lay_out as strided

__all__ = ["LOSS_SHAPES", "huge_strides", "loss_inputs", "strided"]

# (pairs, embed_dim)
LOSS_SHAPES = [
    (1, 16),  # one pair: both softmaxes are 1, every gradient is 0
    (2, 8),  # less than any tile in both directions
    (64, 64),  # exactly one fp32 tile, no mask is ever false
    (67, 40),  # prime, and a dimension that no tile divides
    (129, 72),  # one past the half-precision tile
]


def loss_inputs(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, matched: float, scale: float
) -> dict[str, Tensor]:
    """Unit features whose pairs are alike to the degree ``matched``: 0 is the start of training, 1 its end."""
    image = F.normalize(torch.randn(shape), dim=-1)
    text = F.normalize(matched * image + (1.001 - matched) * F.normalize(torch.randn(shape), dim=-1), dim=-1)
    return {
        "image": image.to(device, dtype),
        "text": text.to(device, dtype),
        "logit_scale": torch.tensor(scale, device=device),
    }


def huge_strides(shape: tuple[int, ...]) -> Tensor:
    """A float16 tensor whose last axis strides over more than 2^31 elements; only the pages that are touched exist."""
    stride = 2**31 // (shape[-1] - 1) + 16
    inner = torch.empty(shape[:-1]).stride()
    # not torch.empty, whose memory the tests fill
    return torch.empty_strided(shape, (*inner, stride), dtype=torch.float16)
