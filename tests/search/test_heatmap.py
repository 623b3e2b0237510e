"""Heat maps: features of patches against plain PyTorch from the state dict, windows, and the command."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast.data.shapes import held_out_scene
from clipfast.kernels.reference import CLIP_MEAN, CLIP_STD
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.search.heatmap import draw, heat_maps, overlay, shares, to_tensor

from ..clip.conftest import run_command

TEXT = TextConfig(context_length=16, vocab_size=512, width=64, heads=1, layers=1)


def tiny(kind=CLIPConfig, embed_dim=24, **changes):
    """Make a model whose images are 32 pixels wide and whose patches 8, unless ``changes`` says otherwise."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32} | changes
    return build(kind(embed_dim=embed_dim, vision=VisionConfig(**vision), text=TEXT)).eval()


def drawn(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit():
    return tiny(layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def plain_features(state, images, kind):
    """The features [B, h, w, D] of a model of two blocks with two heads each, in float64."""
    w = {name.removeprefix("visual."): value.double() for name, value in state.items() if name.startswith("visual.")}
    mean, std = (torch.tensor(x, dtype=torch.double)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    patches = F.conv2d((images.double() / 255 - mean) / std, w["conv1.weight"], stride=8)
    grid = tuple(patches.shape[-2:])
    x = torch.cat([w["class_embedding"].expand(len(images), 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + clipfast.models.interpolate_positions(w["positional_embedding"], (4, 4), grid)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name, weight=".weight", bias=".bias"):
        return F.linear(x, w[f"{name}{weight}"], w[f"{name}{bias}"])

    x = norm(x, "ln_pre")
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn", ".in_proj_weight", ".in_proj_bias")
        if kind == "values" and block.endswith("1"):
            x = linear(qkv[..., 128:], f"{block}.attn.out_proj")
            break
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        x = x + linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return (norm(x, "ln_post")[:, 1:] @ w["proj"]).unflatten(1, grid)


@pytest.mark.parametrize("kind", ["values", "tokens"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_features_of_patches(vit, images, kind, backend):
    vit.set_backend(backend)
    found = clipfast.dense_features(vit, images, kind)
    vit.set_backend("auto")
    expected = plain_features(vit.state_dict(), images, kind)
    assert found.shape == (2, 4, 6, 24)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_values_of_siglip_average_to_its_feature():
    """Of one patch, attention pooling is its value."""
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
    other, dense = torch.nn.Linear(1, 1), clipfast.dense_features
    window = functools.partial(heat_maps, image=images[0], texts=drawn(1, 24))
    for error, message, call in (
        (ValueError, "features must be values or tokens, got 'keys'", lambda: dense(vit, images, "keys")),
        (TypeError, "clipfast.create_model, got a Linear", lambda: dense(other, images)),
        (ValueError, r"call model.eval\(\)", lambda: dense(tiny(patch_dropout=0.5).train(), images)),
        (ValueError, "clipfast.create_model, got torch.nn.modules.linear.Linear", lambda: window(other)),
        (ValueError, "stride must be from 1 to 32", lambda: window(vit, stride=0)),
        (ValueError, "stride must be from 1 to 32", lambda: window(vit, stride=33)),
        (ValueError, "margin at least 0", lambda: window(vit, margin=-1)),
        (ValueError, "two are needed at least, got 1", lambda: shares(drawn(1, 4, 5), 10.0)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_one_window_is_the_map_of_its_patches(vit, images):
    texts, image = drawn(3, 24), images[0, :, :, :32]
    dense = F.normalize(clipfast.dense_features(vit, image[None]), dim=-1) @ F.normalize(texts, dim=-1).T
    expected = F.interpolate(dense.permute(0, 3, 1, 2), (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(heat_maps(vit, image, texts, stride=32, margin=0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (7, 90), (41, 33), (100, 64)])
def test_windows_cover_images_of_any_size(vit, size):
    """Windows are computed in batches, which change nothing."""
    image, texts = torch.full((3, *size), 77, dtype=torch.uint8), drawn(2, 24)
    maps = heat_maps(vit, image, texts, stride=5, batch_size=7)
    assert maps.shape == (2, *size)
    assert maps.abs().max() <= 1  # nor is any NaN
    torch.testing.assert_close(maps, heat_maps(vit, image, texts, stride=5, batch_size=64), rtol=0, atol=1e-6)


def test_a_window_that_moves_moves_the_map(vit, images):
    """What is in the picture is found where it is, in rows as in columns."""
    image = torch.full((3, 96, 160), 128, dtype=torch.uint8)
    moved = image.clone()
    image[:, 40:56, 24:40] = moved[:, 40:56, 88:104] = images[0, :, :16, :16]
    first, second = (heat_maps(vit, one, drawn(1, 24), stride=8) for one in (image, moved))
    torch.testing.assert_close(first[:, 24:72, 16:48], second[:, 24:72, 80:112], rtol=0, atol=1e-5)


def test_shares():
    torch.testing.assert_close(shares(drawn(3, 4, 5), 10.0).sum(0), torch.ones(4, 5))


def test_the_picture_keeps_its_ratio_and_the_colours_their_places():
    picture = Image.new("RGB", (100, 50), "white")
    assert to_tensor(picture, 32).shape == (3, 32, 64)
    heat = torch.zeros(4, 8)
    heat[0, 7] = 1
    shown = overlay(picture, heat, (0, 1)).convert("L")
    assert shown.size == (100, 50)
    assert shown.getpixel((99, 0)) > shown.getpixel((0, 49)) + 50
    assert overlay(picture, torch.full((2, 2), 0.3), (0.3, 0.3)).size == (100, 50)
    assert "a $5 <b> $ cat" in [axis.get_title() for axis in draw([(picture, heat[None], ["a $5 <b> $ cat"])]).axes]


def test_a_higher_similarity_is_brighter_in_whichever_map_of_a_picture():
    maps = torch.linspace(-0.1, 0.3, 16)[drawn(16).argsort()].view(4, 1, 4)
    figure = draw([(Image.new("RGB", (4, 1), "grey"), maps, list("abcd"))])
    panels = [Image.fromarray(np.asarray(axis.get_images()[0].get_array())).convert("L") for axis in figure.axes[1:5]]
    grey = torch.tensor([panel.getpixel((place, 0)) for panel in panels for place in range(4)])
    assert (grey[maps.flatten().argsort()].diff() > 0).all()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with a model that was not trained, and a picture; return its code and its words."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clipfast.export_open_clip(clipfast.create_model("ViT-T-8-32"), "model")
    held_out_scene(2).picture().save("<b>$.png")
    arguments = ["heatmap", "<b>$.png", "a black square", "a $5 <i>", "--model", "local-dir:model", "--output"]
    return lambda *more: run_command(capsys, *arguments, *more)


def test_the_command(run):
    code, out, _ = run("o.png", "--html", "o.html", "--scores", "softmax", "--stride", 16)
    assert code == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["a black square", "a $5 <i>"]
    with Image.open("o.png") as image:
        assert image.width > image.height
    page = Path("o.html").read_text()
    assert page.count('<li class="card">') == 3
    assert "a $5 &lt;i&gt;" in page
    assert "<i>" not in page


def test_the_command_refuses(run):
    before = sorted(Path().iterdir())
    for more, message in (
        (["nowhere/o.png"], "no folder nowhere"),
        (["o.txt"], "--output o.txt: the name must end in"),
        (["o.png", "--stride", "64"], "stride must be from 1 to 32"),
    ):
        code, _, err = run(*more)
        assert (code, message in err) == (2, True), err
    assert sorted(Path().iterdir()) == before
