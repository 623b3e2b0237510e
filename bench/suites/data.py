"""From files to tensors: decode, resize and normalise photographs, ours against OpenCLIP's transform."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipfast import image_transform, open_image

from ..case import OURS, Candidate, Case, Function, Sizes
from . import peers

if TYPE_CHECKING:  # at run time where it is used: a machine without Pillow can run the other suites
    from PIL import Image

FIELDS: Sizes = {"images": 32, "width": 640, "height": 480, "size": 224}
SMALLEST: Sizes = {"images": 2, "width": 64, "height": 48, "size": 32}
# Photographs of a size that is common on the web, resized to what most models take.
SHAPES = {"cpu": [FIELDS], "cuda": [FIELDS]}


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the case of JPEG files in memory. It uses one thread, because data loaders scale by processes."""
    count, width, height, size = (shape[key] for key in FIELDS)
    files = _jpegs(count, width, height)
    return Case(
        suite="data", op="data.decode_and_transform", shape=shape, dtype=dtype, device=device,
        inputs=lambda: {"order": torch.randperm(count)},
        candidates=(
            Candidate(OURS, functools.partial(_ours, files, size, uint8=True), note="bytes, normalised on the device"),
            Candidate("clipfast, floats", functools.partial(_ours, files, size, uint8=False)),
            Candidate("OpenCLIP transform", functools.partial(_open_clip, files, size)),
        ),
        items=(count, "images"),
    )  # fmt: skip


def _ours(files: list[bytes], size: int, *, uint8: bool) -> Function:
    return functools.partial(_all, files, open_image, image_transform(size, uint8=uint8))


def _open_clip(files: list[bytes], size: int) -> Function:
    from PIL import Image

    transform = peers.need("open_clip", "open_clip_torch").image_transform(size, is_train=False)
    return functools.partial(_all, files, lambda file: Image.open(io.BytesIO(file)), transform)


def _all(
    files: list[bytes], decode: Callable[[bytes], Image.Image], transform: Callable[[Any], Tensor], order: Tensor
) -> Tensor:
    return torch.stack([transform(decode(files[index])) for index in order.tolist()])


def _jpegs(count: int, width: int, height: int) -> list[bytes]:
    from PIL import Image

    # smooth colours with noise have about as many bits per pixel as a photograph
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files
