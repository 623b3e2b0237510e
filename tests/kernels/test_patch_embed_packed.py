"""Test the patch embedding of packed images against one image after the other, and with inputs that do not fit."""

import random

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import patch_embed_packed
from clipfast.kernels.grids import places_of
from clipfast.kernels.packing import pack
from clipfast.kernels.patch_embed_packed import launches
from clipfast.kernels.patch_embed_packed.spec import PackedShape

from ..conftest import INTERPRET
from ..numerics import compare
from .conftest import call_at, needs_sanitizer

pytestmark = pytest.mark.usefixtures("poison")
SMALL = PackedShape(4, 4, 2, 16, prefix=2)
MODES = [(interpolation, keep_aspect) for interpolation in ("bilinear", "bicubic") for keep_aspect in (False, True)]


def one_by_one(patches, grids, weight, positional_embedding, *, bias, prefix, interpolation, keep_aspect):
    """Embed images one after the other, with positions that PyTorch resizes as timm's NaFlexViT does."""
    tokens, start = [], 0
    for height, width in grids.tolist():
        size = (max(height, width),) * 2 if keep_aspect else (height, width)
        # Height and width are exchanged, because on a CPU PyTorch 2.13 resizes a table of positions to a width of 1
        # from its first row alone.
        table = positional_embedding.permute(2, 1, 0)[None]
        positions = F.interpolate(table, size[::-1], mode=interpolation, antialias=True)[0, :, :width, :height].mT
        own = patches[start : start + height * width]
        tokens += [prefix, F.linear(own, weight, bias) + positions.flatten(1).T]
        start += height * width
    return torch.cat(tokens)


@pytest.mark.parametrize(("interpolation", "keep_aspect"), MODES)
def test_packed_images_are_those_of_one_after_the_other(interpolation, keep_aspect, device):
    draw = random.Random(0)
    for _ in range(2 if INTERPRET else 12):
        sides = [(draw.randint(2, 12), draw.randint(1, 12)) for _ in range(draw.randint(1, 6))]
        grids = torch.tensor(sides, dtype=torch.int32, device=device)
        num_prefix, table = draw.randint(0, 3), (draw.randint(1, 9), draw.randint(1, 9))
        unused = draw.randint(0, 3)
        sizes = [(sum(h * w for h, w in sides) + unused, 12), (16, 12), (*table, 16), (16,), (num_prefix, 16)]
        patches, weight, positions, bias, prefix = (torch.randn(size, device=device).requires_grad_() for size in sizes)
        cu_seqlens = F.pad((grids.prod(1) + num_prefix).cumsum(0), (1, 0)).int()
        options = {"bias": bias, "prefix": prefix, "interpolation": interpolation, "keep_aspect": keep_aspect}
        found = patch_embed_packed(patches, grids, weight, positions, cu_seqlens=cu_seqlens, **options)
        expected = one_by_one(patches, grids, weight, positions, **options)
        assert not found[len(expected) :].any()
        leaves = patches, weight, positions, bias, *([prefix] if num_prefix else [])
        gradient = torch.randn_like(expected)
        results = [
            (value, *torch.autograd.grad(value, leaves, gradient)) for value in (found[: len(expected)], expected)
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=3e-5)


def test_other_normalisation(device):
    compare(*call_at("patch_embed_packed", SMALL, device, mean=(0.1, 0.9, 0.5), std=(0.5, 0.02, 1.5)))


def test_patches_of_no_image_are_not_read(device):
    call = call_at("patch_embed_packed", SMALL.changed(uint8=False), device)
    expected = call.results()
    of_none = slice(SMALL.patches, None)
    call.inputs["patches"][of_none] = float("nan")
    found = call.results()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found["d_patches"][of_none].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grids": [[4, 4], [3, 4]]}, r"image 1 has 12 tokens by cu_seqlens, but grids say 3 x 4 patches, .* 2 prefix"),
        ({"grids": [[4, 4], [-1, -10]]}, r"image 1 has 12 tokens by cu_seqlens, but grids say -1 x -10 patches"),
        ({"grids": [[4, 4], [65536, 65536]], "cu_seqlens": [0, 18, 20]}, r"image 1 has 2 tokens by cu_seqlens"),
        ({"cu_seqlens": [0, 18, 30, 30]}, r"cu_seqlens are of 3 images, but grids of 2"),
        ({"cu_seqlens": [0, 18, 31]}, r"cu_seqlens must run from 0 to 30 tokens at most, got 0 to 31"),
        ({"mean": (0.5,) * 5, "std": (1,) * 5}, r"a patch of 12 numbers has not 5 channels, as mean has"),
        ({"interpolation": "nearest"}, r"interpolation must be bilinear or bicubic, got 'nearest'"),
        ({"positional_embedding": torch.zeros(4, 4, 7)}, r"positional_embedding must be \[GH, GW, 8\] for weight"),
        ({"prefix": torch.zeros(2, 7)}, r"prefix must be \[R, 8\] for weight \(8, 12\), got \(2, 7\)"),
        ({"bias": torch.zeros(7)}, r"bias must be \[8\]"),
        ({"weight": torch.zeros(8, 11)}, r"weight must be \[E, 12\], and not empty, for patches \(26, 12\)"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(changed, message):
    inputs = {
        "patches": torch.zeros(26, 12), "grids": [[4, 4], [2, 5]], "weight": torch.zeros(8, 12),
        "positional_embedding": torch.zeros(4, 4, 8), "cu_seqlens": [0, 18, 30], "prefix": torch.zeros(2, 8),
    } | changed  # fmt: skip
    integers = {name: torch.tensor(x, dtype=torch.int32) for name, x in inputs.items() if isinstance(x, list)}
    with pytest.raises(ValueError, match=f"^patch_embed_packed: {message}"):
        patch_embed_packed(**inputs | integers)


def test_the_rows_of_wrong_sizes_are_those_of_no_patch():
    packing = pack(torch.tensor([0, 0, 0, 0, 17], dtype=torch.int32), 17)
    rows = places_of(*packing[1:], torch.ones(4, 2, dtype=torch.int32), 1, 4).row
    assert rows.min() >= 0
    assert rows.max() <= 1


@needs_sanitizer
@pytest.mark.parametrize(
    ("ends", "grid"),
    [
        ([0, 6, 12, 18], [0, 0]),
        ([0, 6, 12, 18], [9, 9]),
        ([0, 6, 12, 18], [-3, 5]),
        ([0, 6, 12, 18], [2**30, 2**30]),
        ([0, 0, 0, 18], [2, 8]),  # the patches of an image would begin before the first row
        ([0, 6, 12, 22], [2, 4]),  # the patches of an image would end after the last row
    ],
)
def test_sizes_that_do_not_fit_read_nothing_outside(ends, grid, sanitizer):
    packing = pack(torch.tensor(ends, dtype=torch.int32), 22)
    grids = torch.tensor([[2, 2], [2, 2], grid], dtype=torch.int32)
    patches = torch.ones(12, 12, dtype=torch.uint8)
    out = launches.lay_out(patches, grids, *packing[1:], (3, 3), 2, 24, "bilinear", False, torch.float32)
    assert out.isfinite().all()
