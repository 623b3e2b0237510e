"""Heat maps: features of patches against plain PyTorch, windows over large images, and the command."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast.data.drawn_shapes import held_out_scene
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.search.heatmap import draw, heat_maps, overlay, shares, to_tensor

from ..small_runs import run_command

TEXT = TextConfig(context_length=16, vocab_size=512, width=64, heads=1, layers=1)


def tiny(kind=CLIPConfig, embed_dim=24, **changes):
    """Make a tiny model for heat maps, with images of 32 pixels and patches of 8 unless ``changes`` say otherwise."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32} | changes
    return build(kind(embed_dim=embed_dim, vision=VisionConfig(**vision), text=TEXT)).eval()


def drawn(*shape, seed=2):
    """Draw random numbers for heat maps."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit():
    """Return the ViT of which heat maps are computed."""
    return tiny(layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    """Draw the images of which heat maps are computed."""
    return torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_features_of_patches(vit, images, backend):
    """Dense features equal those of plain PyTorch, computed from the outputs of the tower's two blocks."""
    options = {"intermediates_only": True, "output_fmt": "NLC"}
    first, tokens = vit.visual.forward_intermediates(images, **options)["image_intermediates"]
    block, norm = vit.visual.transformer.resblocks[1], vit.visual.ln_post
    x = F.layer_norm(first, (64,), block.ln_1.weight, block.ln_1.bias)
    x = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)[..., 128:]
    values = F.linear(x, block.attn.out_proj.weight, block.attn.out_proj.bias)
    vit.set_backend(backend)
    for kind, x in (("values", values), ("tokens", tokens)):
        expected = (F.layer_norm(x, (64,), norm.weight, norm.bias) @ vit.visual.proj).unflatten(1, (4, 6))
        found = clipfast.dense_features(vit, images, kind)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    vit.set_backend("auto")


@torch.no_grad()
def test_values_of_siglip_average_to_its_feature():
    """SigLIP's attention pooling over a single patch returns the patch's value, so the dense feature is the image's."""
    model = tiny(SigLIPConfig, 64, image_size=16)
    image = drawn(2, 3, 8, 8)
    expected = model.encode_image(image)[:, None, None]
    torch.testing.assert_close(clipfast.dense_features(model, image), expected, rtol=1e-4, atol=1e-5)
    assert clipfast.dense_features(model, drawn(1, 3, 16, 24)).shape == (1, 2, 3, 64)
    with pytest.raises(ValueError, match="'tokens' are in the space of texts in CLIP"):
        clipfast.dense_features(model, image, "tokens")


@torch.no_grad()
def test_values_of_a_resnet():
    model = tiny(width=8, layers=(1, 1, 1, 1), patch_size=None, head_width=64)
    images = drawn(2, 3, 64, 32)
    found = clipfast.dense_features(model, images)
    last = model.visual.forward_intermediates(images, 1, intermediates_only=True)["image_intermediates"][0]
    pool = model.visual.attnpool
    expected = last.permute(0, 2, 3, 1)
    for projection in (pool.v_proj, pool.c_proj):
        expected = F.linear(expected, projection.weight, projection.bias)
    assert found.shape == (2, 2, 1, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_wrong_models_features_and_windows(vit, images):
    dense = clipfast.dense_features
    window = functools.partial(heat_maps, image=images[0], texts=drawn(1, 24))
    for message, call in (
        ("got 'keys'", lambda: dense(vit, images, "keys")),
        (r"call model.eval\(\)", lambda: dense(tiny(patch_dropout=0.5).train(), images)),
        ("clipfast.create_model, got torch.nn.modules.linear.Linear", lambda: window(torch.nn.Linear(1, 1))),
        ("margin at least 0", lambda: window(vit, margin=-1)),
        ("two are needed at least, got 1", lambda: shares(drawn(1, 4, 5), 10.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_window_is_the_map_of_its_patches(vit, images):
    texts, image = drawn(3, 24), images[0, :, :, :32]
    dense = F.normalize(clipfast.dense_features(vit, image[None]), dim=-1) @ F.normalize(texts, dim=-1).T
    expected = F.interpolate(dense.permute(0, 3, 1, 2), (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(heat_maps(vit, image, texts, stride=32, margin=0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (7, 90), (41, 33), (100, 64)])
def test_windows_cover_images_of_any_size(vit, size):
    """Heat maps cover the whole image, and do not depend on the number of windows in a batch."""
    image, texts = torch.full((3, *size), 77, dtype=torch.uint8), drawn(2, 24)
    maps = heat_maps(vit, image, texts, stride=5, batch_size=7)
    assert maps.shape == (2, *size)
    assert maps.abs().max() <= 1  # a comparison with NaN would fail
    torch.testing.assert_close(maps, heat_maps(vit, image, texts, stride=5, batch_size=64), rtol=0, atol=1e-6)


def test_a_window_that_moves_moves_the_map(vit, images):
    """If a pattern moves in a picture, the heat map around it moves with it."""
    image = torch.full((3, 96, 160), 128, dtype=torch.uint8)
    moved = image.clone()
    image[:, 40:56, 24:40] = moved[:, 40:56, 88:104] = images[0, :, :16, :16]
    first, second = (heat_maps(vit, one, drawn(1, 24), stride=8) for one in (image, moved))
    torch.testing.assert_close(first[:, 24:72, 16:48], second[:, 24:72, 80:112], rtol=0, atol=1e-5)


def test_the_picture_keeps_its_ratio_and_a_flat_map_is_drawn():
    picture = Image.new("RGB", (100, 50), "white")
    assert to_tensor(picture, 32).shape == (3, 32, 64)
    assert overlay(picture, torch.full((2, 2), 0.3), (0.3, 0.3)).size == (100, 50)
    assert draw(picture, torch.zeros(1, 4, 8), ["a $5 <b> $ cat"]).axes[1].get_title() == "a $5 <b> $ cat"


def test_a_higher_similarity_is_brighter_in_whichever_map_of_a_picture():
    maps = torch.linspace(-0.1, 0.3, 16)[drawn(16).argsort()].view(4, 1, 4)
    figure = draw(Image.new("RGB", (4, 1), "grey"), maps, list("abcd"))
    panels = [Image.fromarray(np.asarray(axis.get_images()[0].get_array())).convert("L") for axis in figure.axes[1:5]]
    grey = torch.tensor([panel.getpixel((place, 0)) for panel in panels for place in range(4)])
    assert (grey[maps.flatten().argsort()].diff() > 0).all()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clipfast.export_open_clip(clipfast.create_model("ViT-T-8-32"), "model")
    held_out_scene(2).picture().save("<b>$.png")
    arguments = ["heatmap", "<b>$.png", "a black square", "a $5 <i>", "--model", "local-dir:model", "--output", "o.png"]
    code, _, err = run_command(capsys, *arguments, "--stride", "64")
    assert (code, "stride must be from 1 to 32" in err, Path("o.png").exists()) == (2, True, False)
    _, out, _ = run_command(capsys, *arguments, "--html", "o.html", "--scores", "softmax", "--stride", "16")
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["a black square", "a $5 <i>"]
    with Image.open("o.png") as image:
        assert image.width > image.height
    page = Path("o.html").read_text()
    assert page.count('<li class="card">') == 3
    assert "a $5 &lt;i&gt;" in page
    assert "<i>" not in page
