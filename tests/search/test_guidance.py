"""Gradients to pixels: equal to the reference's, and they lead an image towards a text."""

import pytest
import torch
import torch.nn.functional as F

from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig, build
from clipfast.search.guidance import guide, roughness, similarity, strip

TEXT = TextConfig(context_length=16, vocab_size=512, width=64, heads=1, layers=1)
VISION = VisionConfig(image_size=32, patch_size=8, width=64, layers=2, head_width=32)


def model_of(config):
    torch.manual_seed(0)
    return build(config).eval()


@pytest.fixture(scope="module")
def vit():
    return model_of(CLIPConfig(embed_dim=64, vision=VISION, text=TEXT))


@pytest.fixture(scope="module")
def text():
    return torch.randn(64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [CLIPConfig, SigLIPConfig])
def test_gradients_of_pixels_are_those_of_the_reference(config, text):
    model = model_of(config(embed_dim=64, vision=VISION, text=TEXT))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = {}
    for backend in ("auto", "torch"):
        model.set_backend(backend)
        (found[backend],) = torch.autograd.grad(similarity(model, images, text).sum(), images)
    exact = model_of(config(embed_dim=64, vision=VISION, text=TEXT)).double()
    exact.set_backend("torch")
    double = images.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(similarity(exact, double, text.double()).sum(), double)
    largest = truth.abs().max()
    assert largest > 1e-4
    for gradient in found.values():
        torch.testing.assert_close(gradient.double(), truth, rtol=0, atol=1e-4 * float(largest))
    # The similarity really rises along it.
    step = 1e-4 * truth / truth.norm()
    with torch.no_grad():
        rise = similarity(exact, double + step, text.double()).sum() - similarity(exact, double, text.double()).sum()
    torch.testing.assert_close(rise, (step * truth).sum(), rtol=1e-2, atol=0)


def test_the_image_comes_nearer_to_the_text(vit, text):
    guided = guide(vit, text, steps=30, every=10, views=4)
    assert guided.images.shape == (4, 3, 32, 32)
    assert len(guided.similarities) == 30
    assert guided.images.min() >= 0
    assert guided.images.max() <= 1
    with torch.no_grad():
        first, *_, last = similarity(vit, guided.images, text)
    assert last > first + 0.1
    assert sum(guided.similarities[-5:]) > sum(guided.similarities[:5]) + 0.2
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_the_same_seed_gives_the_same_image(vit, text):
    first, again, other = (guide(vit, text, steps=2, every=2, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_smoothness_makes_smooth(vit, text):
    rough, smooth = (guide(vit, text, steps=20, every=20, smoothness=weight).images[-1:] for weight in (0.0, 20.0))
    assert roughness(smooth) < 0.7 * roughness(rough)
    stripes = F.pad(torch.ones(1, 1, 2, 1), (0, 1))
    assert roughness(stripes) == 0.5


@pytest.mark.parametrize("name", ["steps", "views", "every"])
def test_wrong_numbers(vit, text, name):
    with pytest.raises(ValueError, match=f"guide: {name} must be at least 1, got 0"):
        guide(vit, text, **{name: 0})


def test_the_strip():
    red, blue = torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1, 1
    picture = strip([red, blue], side=16)
    assert picture.size == (32, 32)
    places = ((0, 0), (31, 15), (0, 16), (31, 31))
    assert [picture.getpixel(place) for place in places] == [(255, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)]
