"""Images of random sizes for tests of NaFlex towers, and their padded batches as timm's loader makes them."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from clipfast.models.packed_images import patchify

PATCH, MOST = 4, 40


def naflex_vit(num_classes: int = 0, **settings: object) -> torch.nn.Module:
    """Return a small NaFlex tower of timm."""
    naflexvit = pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlexViT")
    usual = {
        "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
        "pos_embed_grid_size": (5, 5), "enable_patch_interpolator": True,
    }  # fmt: skip
    return naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**usual | settings), num_classes=num_classes)


def mixes(count: int, patch: int = PATCH, least_width: int = 2) -> Iterator[list[torch.Tensor]]:
    """Yield lists of images of random sizes for a NaFlex tower, at most MOST patches each."""
    # Images are at least two patches wide by default, because PyTorch, and so timm, resizes positions to a width of 1
    # wrongly on a CPU.
    draw = random.Random(0)
    for _ in range(count):
        images = []
        for _ in range(draw.randint(1, 6)):
            height = draw.randint(1, 12)
            width = draw.randint(least_width, max(least_width, MOST // height))
            images.append(torch.randn(3, patch * height, patch * width, dtype=torch.float64))
        yield images


def padded(images: list[torch.Tensor], patch: int = PATCH) -> dict[str, torch.Tensor]:
    """Return a padded batch of images for a NaFlex tower, with patches [P, P, 3]."""
    patches = [patchify(image, patch) for image in images]
    coords = [torch.cartesian_prod(*(torch.arange(side // patch) for side in image.shape[1:])) for image in images]
    both = (torch.stack([F.pad(x, (0, 0, 0, MOST - len(x))) for x in rows]) for rows in (patches, coords))
    batch = dict(zip(("patches", "patch_coord"), both, strict=True))
    batch["patches"] = batch["patches"].unflatten(2, (patch, patch, 3))
    return batch | {"patch_valid": torch.arange(MOST) < torch.tensor([[len(x)] for x in patches])}
