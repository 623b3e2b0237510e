"""Patch embedding from bytes: ours against normalisation, convolution, concatenation and addition."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import patch_embed, reference
from clipfast.kernels.floors import Floor, patch_embed_floor

from ..case import DTYPES, OURS, Candidate, Case, Inputs, without_grads
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"batch": 64, "size": 224, "patch": 16, "embed_dim": 768}
SMALLEST: Mapping[str, int | str | bool] = {"batch": 2, "size": 16, "patch": 8, "embed_dim": 16}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """L/14, B/16, B/32, H/14: the most telling first, since a run may be stopped."""
    batch = 16 if device_type == "cpu" else 256
    widths = ((14, 1024), (16, 768), (32, 768), (14, 1280))
    return [{"batch": batch, "size": 224, "patch": patch, "embed_dim": width} for patch, width in widths]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Random bytes; weight, class token and positions take gradients."""
    batch, size, patch, embed_dim = (shape[key] for key in FIELDS)
    tokens = 1 + (size // patch) ** 2

    def inputs() -> Inputs:
        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device).to(DTYPES[dtype])

        return {
            "images": torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device),
            "weight": draw(embed_dim, 3, patch, patch) / patch,
            "class_embedding": draw(embed_dim),
            "positional_embedding": draw(tokens, embed_dim),
            "grad": draw(batch, tokens, embed_dim),
        }

    return Case(
        suite="patch",
        op="patch_embed.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=(
            Candidate(OURS, lambda: without_grads(patch_embed)),
            Candidate("PyTorch", lambda: without_grads(reference.patch_embed)),
            Candidate("PyTorch compiled", lambda: peers.compiled(without_grads(reference.patch_embed))),
        ),
        reference=without_grads(reference.patch_embed),
        floor=patch_embed_floor(
            batch, 3, size, patch, embed_dim, pixel_bytes=1, itemsize=DTYPES[dtype].itemsize, backward=True
        ),
        items=(batch, "images"),
        wants_grad=("weight", "class_embedding", "positional_embedding"),
    )


def build_floats(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Random floats, which take a gradient too, as where a model guides the making of images."""
    case = build(shape, dtype, device)
    batch, size, patch, embed_dim = (shape[key] for key in FIELDS)

    def inputs() -> Inputs:
        images = torch.randn(batch, 3, size, size, device=device).to(DTYPES[dtype])
        return {**case.inputs(), "images": images}

    itemsize = DTYPES[dtype].itemsize
    others = patch_embed_floor(batch, 3, size, patch, embed_dim, itemsize, itemsize, backward=True)
    # a third product like the two, and the images' gradient
    floor = Floor(1.5 * others.flops, others.bytes + 3 * batch * size * size * itemsize)
    return dataclasses.replace(
        case, suite="patch_floats", op="patch_embed_floats.fwd_bwd", inputs=inputs, floor=floor,
        wants_grad=("images", *case.wants_grad),
    )  # fmt: skip


def build_kept(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Half of the patches of each image, as where training drops the others (FLIP)."""
    case = build(shape, dtype, device)
    batch, size, patch, embed_dim = (shape[key] for key in FIELDS)
    patches = (size // patch) ** 2
    kept = patches // 2

    def inputs() -> Inputs:
        drawn = case.inputs()
        keep = torch.rand(batch, patches, device=device).topk(kept, dim=1).indices
        return {**drawn, "keep": keep, "grad": drawn["grad"][:, : 1 + kept].contiguous()}

    itemsize = DTYPES[dtype].itemsize
    floor = patch_embed_floor(batch, 3, size, patch, embed_dim, 1, itemsize, keep=kept, backward=True)
    return dataclasses.replace(case, suite="patch_kept", op="patch_embed_kept.fwd_bwd", inputs=inputs, floor=floor)
