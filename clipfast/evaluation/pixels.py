"""Pixels as features: what finds copies of an image where a model sees only what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder

if TYPE_CHECKING:
    from PIL import Image

SIDE = 16  # of the thumbnails


def small_pixels(image: Image.Image) -> Tensor:
    """Return an image scaled to 16 x 16 pixels, uint8 [3, 16, 16]."""
    from PIL import Image

    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).movedim(-1, 0).contiguous()


class PixelEncoder(Encoder):
    """Takes the place of a model: the similarity of two images is the correlation of the pixels of their thumbnails."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__("pixels", None, _no_texts, small_pixels, device)

    def about(self) -> dict[str, Any]:
        """Return what the features depend on, as plain values."""
        return {"model": self.name, "side": SIDE}

    def images(self, pixels: Tensor) -> Tensor:
        """Return the features [B, 768] of thumbnails [B, 3, 16, 16], of mean 0 and unit length; 0 for one grey."""
        flat = pixels.to(self.device).float().flatten(1)
        return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def _no_texts(_: Sequence[str]) -> Tensor:
    raise ValueError("pixels are compared with pixels, not with texts")
