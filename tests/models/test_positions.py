"""Test positions for images of another size than the model's: OpenCLIP's interpolation, in the model and on loading."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from clipfast import create_model
from clipfast.models import interpolate_positions

GRIDS = [((7, 7), (14, 14)), ((3, 5), (8, 2)), ((4, 4), (1, 1))]


@pytest.mark.parametrize(("old", "new"), GRIDS, ids=str)
def test_bicubic_with_antialiasing(old, new):
    positions = torch.randn(1 + old[0] * old[1], 12)
    grid = positions[1:].T.unflatten(1, old)[None]
    expected = F.interpolate(grid, new, mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T
    resized = interpolate_positions(positions, old, new)
    assert torch.equal(resized[0], positions[0])
    torch.testing.assert_close(resized[1:], expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(interpolate_positions(positions, old, new), resized)


def test_gradient():
    positions = torch.randn(1 + 3 * 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: interpolate_positions(x, (3, 4), (5, 2)), positions)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (5, 5)), ((0, 0), (2, 2)), ((3, 3), (0, 2))])
def test_grids_that_do_not_fit(old, new):
    with pytest.raises(ValueError, match=r"interpolate_positions: expected 1 \+ h \* w positions .*, got 10 for"):
        interpolate_positions(torch.zeros(10, 4), old, new)


@pytest.mark.parametrize("size", [(64, 64), (16, 40), (8, 8)], ids=str)
def test_model_takes_images_of_any_grid(size):
    model = create_model("ViT-T-8-32").eval()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    features = model.encode_image(images)
    features.square().sum().backward()
    # ``other`` is the same model built for the other size, with the interpolated positions.
    other = create_model("ViT-T-8-32").eval()
    other.load_state_dict(model.state_dict())
    grid = (size[0] // 8, size[1] // 8)
    resized = interpolate_positions(model.visual.positional_embedding, (4, 4), grid)
    other.visual.positional_embedding = torch.nn.Parameter(resized.detach())
    other.visual.grid_size = grid
    expected = other.encode_image(images)
    expected.square().sum().backward()
    torch.testing.assert_close(features, expected)
    (expected_grad,) = torch.autograd.grad(
        resized, model.visual.positional_embedding, other.visual.positional_embedding.grad
    )
    torch.testing.assert_close(model.visual.positional_embedding.grad, expected_grad)


@pytest.mark.parametrize("size", [64, 16])
def test_loading_resizes_as_open_clip_does(size, tmp_path, caplog):
    saved = create_model("ViT-T-8-32")
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "clipfast"):
        model = create_model("ViT-T-8-32", tmp_path / "w.pt", force_image_size=size)
    side = size // 8
    assert f"resized from 4x4 to {side}x{side}" in caplog.text
    assert torch.equal(model.visual.proj, saved.visual.proj)
    state = dict(saved.state_dict())
    theirs = pytest.importorskip("open_clip.model")
    theirs.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
    torch.testing.assert_close(
        model.visual.positional_embedding.detach(), state["visual.positional_embedding"], rtol=0, atol=1e-6
    )
