"""Heat maps: features of patches against plain PyTorch from the state dict, windows, and the command."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast.cli import main
from clipfast.data.shapes import held_out_scene
from clipfast.kernels.reference import CLIP_MEAN, CLIP_STD
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.search.heatmap import draw, heat_maps, overlay, shares, to_tensor

TEXT = TextConfig(context_length=16, vocab_size=512, width=64, heads=1, layers=1)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=2, head_width=32)
    return build(CLIPConfig(embed_dim=24, vision=vision, text=TEXT)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def plain_features(state, images, heads, kind):
    """The features [B, h, w, D] of a model of two blocks, in float64."""
    w = {name.removeprefix("visual."): value.double() for name, value in state.items() if name.startswith("visual.")}
    mean, std = (torch.tensor(x, dtype=torch.double)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    patches = F.conv2d((images.double() / 255 - mean) / std, w["conv1.weight"], stride=8)
    grid = patches.shape[-2:]
    x = patches.flatten(2).transpose(1, 2)
    positions = clipfast.models.interpolate_positions(w["positional_embedding"], (4, 4), tuple(grid))
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + positions

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm(x, "ln_pre")
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        qkv = F.linear(norm(x, f"{block}.ln_1"), w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
        if kind == "values" and block.endswith("1"):
            x = linear(qkv[..., 128:], f"{block}.attn.out_proj")
            break
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return (norm(x, "ln_post")[:, 1:] @ w["proj"]).unflatten(1, tuple(grid))


@pytest.mark.parametrize("kind", ["values", "tokens"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_features_of_patches(vit, images, kind, backend):
    vit.set_backend(backend)
    with torch.no_grad():
        found = clipfast.dense_features(vit, images, kind)
    vit.set_backend("auto")
    expected = plain_features(vit.state_dict(), images, 2, kind)
    assert found.shape == (2, 4, 6, 24)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_values_of_a_uniform_stack_are_the_feature_of_the_image():
    """With one image whose patches and positions are all equal, any average of the values is each of them."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=1, head_width=32)
    model = build(CLIPConfig(embed_dim=24, vision=vision, text=TEXT)).eval()
    block = model.visual.transformer.resblocks[0]
    with torch.no_grad():
        model.visual.positional_embedding.zero_()
        model.visual.class_embedding.copy_(model.visual.conv1.weight.sum((1, 2, 3)))
        found = clipfast.dense_features(model, torch.ones(1, 3, 32, 32))
        x = block.attn(block.ln_1(model.visual.ln_pre(model.visual.embed(torch.ones(1, 3, 32, 32)))))
        expected = model.visual.ln_post(x[:, 0]) @ model.visual.proj
    torch.testing.assert_close(found, expected[:, None, None].expand_as(found), rtol=1e-4, atol=1e-5)


def test_values_of_siglip_average_to_its_feature():
    """Of one patch, attention pooling is its value."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=64, layers=1, head_width=32)
    config = SigLIPConfig(embed_dim=64, vision=vision, text=TEXT)
    model = build(config).eval()
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, expected = clipfast.dense_features(model, image), model.encode_image(image)
        assert clipfast.dense_features(model, torch.randn(1, 3, 16, 24)).shape == (1, 2, 3, 64)
    torch.testing.assert_close(found, expected[:, None, None], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'tokens' are in the space of texts in CLIP's vision transformers only"):
        clipfast.dense_features(model, image, "tokens")


def test_values_of_a_resnet():
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, width=8, layers=(1, 1, 1, 1), patch_size=None, head_width=64)
    model = build(CLIPConfig(embed_dim=24, vision=vision, text=TEXT)).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 32)
        found = clipfast.dense_features(model, images)
        last = model.visual.forward_intermediates(images, 1, intermediates_only=True)["image_intermediates"][0]
    pool = {name: value.double() for name, value in model.visual.attnpool.state_dict().items()}
    values = F.conv2d(last.double(), pool["v_proj.weight"][..., None, None], pool["v_proj.bias"])
    expected = F.conv2d(values, pool["c_proj.weight"][..., None, None], pool["c_proj.bias"]).permute(0, 2, 3, 1)
    assert found.shape == (2, 2, 1, 24)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_wrong_models_and_features(vit, images):
    with pytest.raises(ValueError, match="features must be values or tokens, got 'keys'"):
        clipfast.dense_features(vit, images, "keys")
    with pytest.raises(TypeError, match=r"model must be one of clipfast.create_model, got a Linear"):
        clipfast.dense_features(torch.nn.Linear(1, 1), images)
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=1, head_width=32, patch_dropout=0.5)
    model = build(CLIPConfig(embed_dim=24, vision=vision, text=TEXT))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        clipfast.dense_features(model, images)


def test_one_window_is_the_map_of_its_patches(vit, images):
    texts = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    image = images[0, :, :, :32]
    with torch.no_grad():
        dense = F.normalize(clipfast.dense_features(vit, image[None]), dim=-1) @ F.normalize(texts, dim=-1).T
    expected = F.interpolate(dense.permute(0, 3, 1, 2), (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(heat_maps(vit, image, texts, stride=32, margin=0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (7, 90), (41, 33), (100, 64)])
def test_windows_cover_images_of_any_size(vit, size):
    """Of a flat image every window is the same but for its positions, so that without these the map repeats."""
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    texts = torch.randn(2, 24, generator=torch.Generator().manual_seed(2))
    maps = heat_maps(vit, image, texts, stride=5, batch_size=7)
    assert maps.shape == (2, *size)
    assert maps.isfinite().all()
    assert maps.abs().max() <= 1
    torch.testing.assert_close(maps, heat_maps(vit, image, texts, stride=5, batch_size=64), rtol=0, atol=1e-6)


def test_a_window_that_moves_moves_the_map(vit):
    """What is in the picture is found where it is, in rows as in columns."""
    image = torch.full((3, 96, 160), 128, dtype=torch.uint8)
    moved = image.clone()
    thing = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image[:, 40:56, 24:40], moved[:, 40:56, 88:104] = thing, thing
    texts = torch.randn(1, 24, generator=torch.Generator().manual_seed(2))
    first, second = (heat_maps(vit, one, texts, stride=8) for one in (image, moved))
    torch.testing.assert_close(first[:, 24:72, 16:48], second[:, 24:72, 80:112], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"stride": 33}, {"margin": -1}])
def test_wrong_windows(vit, images, wrong):
    with pytest.raises(ValueError, match="stride must be from 1 to 32 and margin at least 0"):
        heat_maps(vit, images[0], torch.randn(1, 24), **wrong)


def test_another_packages_model():
    with pytest.raises(ValueError, match=r"need a model of clipfast.create_model, got torch.nn.modules.linear.Linear"):
        heat_maps(torch.nn.Linear(1, 1), torch.zeros(3, 32, 32), torch.randn(1, 24))


def test_shares():
    maps = torch.randn(3, 4, 5)
    torch.testing.assert_close(shares(maps, 10.0).sum(0), torch.ones(4, 5))
    with pytest.raises(ValueError, match="two are needed at least, got 1"):
        shares(maps[:1], 10.0)


def test_the_picture_keeps_its_ratio_and_the_colours_their_places():
    picture = Image.new("RGB", (100, 50), "white")
    assert to_tensor(picture, 32).shape == (3, 32, 64)
    heat = torch.zeros(4, 8)
    heat[0, 7] = 1
    drawn = overlay(picture, heat, (0, 1)).convert("L")
    assert drawn.size == (100, 50)
    assert drawn.getpixel((99, 0)) > drawn.getpixel((0, 49)) + 50
    assert overlay(picture, torch.full((2, 2), 0.3), (0.3, 0.3)).size == (100, 50)
    titles = [axis.get_title() for axis in draw([(picture, heat[None], ["a $5 <b> $ cat"])]).axes]
    assert "a $5 <b> $ cat" in titles


def test_a_higher_similarity_is_brighter_in_whichever_map_of_a_picture():
    picture, values = Image.new("RGB", (4, 1), "grey"), torch.linspace(-0.1, 0.3, 16)
    maps = values[torch.randperm(16, generator=torch.Generator().manual_seed(0))].view(4, 4)[:, None, :]
    figure = draw([(picture, maps, list("abcd"))])
    panels = [Image.fromarray(np.asarray(axis.get_images()[0].get_array())).convert("L") for axis in figure.axes[1:5]]
    grey = torch.tensor([panel.getpixel((place, 0)) for panel in panels for place in range(4)])
    assert (grey[maps.flatten().argsort()].diff() > 0).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a model that was not trained, and a picture."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = clipfast.create_model("ViT-T-8-32")
    clipfast.export_open_clip(model, folder / "model")
    held_out_scene(2).picture().save(folder / "<b>$.png")
    return folder


def heatmap(run, tmp_path, *more):
    arguments = [run / "<b>$.png", "a black square", "a $5 <i>", "--model", f"local-dir:{run / 'model'}"]
    return main(["heatmap", *map(str, arguments), "--output", str(tmp_path / "o.png"), *map(str, more)])


def test_the_command(run, tmp_path, capsys):
    assert heatmap(run, tmp_path, "--html", tmp_path / "o.html", "--scores", "softmax", "--stride", 16) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["a black square", "a $5 <i>"]
    with Image.open(tmp_path / "o.png") as image:
        assert image.width > image.height
    page = (tmp_path / "o.html").read_text()
    assert page.count('<li class="card">') == 3
    assert "a $5 &lt;i&gt;" in page
    assert "<i>" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "nowhere/o.png"], "no folder nowhere to write o.png in"),
        (["--output", "o.txt"], "--output o.txt: the name must end in one of"),
        (["--stride", "64"], "stride must be from 1 to 32"),
    ],
)
def test_the_command_refuses(run, tmp_path, capsys, more, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert heatmap(run, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
