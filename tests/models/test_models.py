"""Test CLIP models: the published ones have OpenCLIP's layout, and with OpenCLIP's weights they have its outputs."""

import gzip
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast import (
    CLIP,
    CheckpointError,
    add_model_config,
    create_model,
    create_model_from_pretrained,
    get_model_config,
)
from clipfast.models import CLIPConfig, TextConfig, VisionConfig, build
from clipfast.models.registry import read_model_config
from clipfast.train.optim import adamw

from ..small_runs import NAFLEX, RESNET, SIGLIP, TINY, assert_initialised_alike

PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parent.parent / "data" / "published_models.json.gz").read_bytes())
)


# QuickGELU does not change the layout of a model's parameters, so models with it are left out.
@pytest.mark.parametrize("name", [name for name in PUBLISHED if "quickgelu" not in name])
def test_published_layout_and_weight_decay(name):
    facts = PUBLISHED[name]
    model = create_model(name, device="meta")
    parameters = {key: list(value.shape) for key, value in model.named_parameters()}
    assert parameters == facts["params"]
    # The optimizer state in a checkpoint depends on the order of the parameters.
    assert [key for key in model.state_dict() if key in parameters] == list(facts["params"])
    assert {key: list(value.shape) for key, value in model.named_buffers()} == facts["buffers"]
    assert set(model.state_dict()) <= facts["params"].keys() | facts["buffers"].keys()
    groups = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    parts = {"total": model.parameters(), "image": model.visual.parameters(), "decayed": groups[1]["params"]}
    assert {part: sum(p.numel() for p in of) for part, of in parts.items()} == {part: facts[part] for part in parts}


def test_initialisation_is_the_published_one():
    open_clip = pytest.importorskip("open_clip")
    for vision in (VisionConfig(32, 2, 128, 64, patch_size=8), VisionConfig(64, (1, 2, 1, 1), 16, 32, patch_size=None)):
        model = CLIP(CLIPConfig(64, vision, TextConfig(width=256, heads=4, layers=3)))
        assert_initialised_alike(model, open_clip.CLIP(**model.config.to_dict()))


def test_logit_scale_is_clamped():
    model = create_model("ViT-T-8-32")
    for value, expected in ((10.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2.0))):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(expected)


def small(kind="vit", quick_gelu=False):
    """Return a CLIP model whose small ViT or ResNet has every kind of layer that the large ones have."""
    resnet = VisionConfig(64, (1, 2, 1, 1), 16, 32, patch_size=None)
    vision = VisionConfig(64, 2, 96, 32, 4.3637, 16) if kind == "vit" else resnet
    return CLIP(CLIPConfig(48, vision, TextConfig(width=64, heads=4, layers=2), quick_gelu))


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quickgelu"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_same_embeddings_as_open_clip(kind, quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    ours = small(kind, quick_gelu).eval()
    theirs = open_clip.CLIP(**ours.config.to_dict()).eval()
    for module in theirs.modules():
        # A norm with its initial weights and statistics changes little, so a missing one might not be noticed.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 64, 64)
    texts = open_clip.tokenize(["a photo of a cat", "two dogs and a very long caption about them " * 20, ""])
    with torch.no_grad():
        for normalize in (False, True):
            for encode, inputs in (("encode_image", images), ("encode_text", texts)):
                found, expected = (getattr(model, encode)(inputs, normalize) for model in (ours, theirs))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_backends_and_checkpointing_agree_on_values_and_gradients(kind):
    # The models are compared in float64, because BatchNorm over four images amplifies rounding errors.
    model = small(kind).double()
    images, texts = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.randint(1, 49406, (4, 12))
    texts[:, -1] = 49407
    results = []
    for backend, recomputes in (("torch", False), ("auto", False), ("auto", True)):
        model.set_backend(backend)
        model.set_grad_checkpointing(recomputes)
        model.zero_grad()
        image_features, text_features, scale = model(images, texts)
        (scale * (image_features @ text_features.T)).square().mean().backward()
        results.append((image_features, text_features, *(p.grad.clone() for p in model.parameters())))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=1e-8, atol=1e-10)


def test_settings_of_other_libraries_are_left_alone():
    model, head = small("vit"), nn.Linear(4, 4)
    head.backend, head.grad_checkpointing = "cudnn", False
    model.visual.head = head
    model.set_backend("torch")
    model.set_grad_checkpointing(selective=True)
    assert (head.backend, head.grad_checkpointing) == ("cudnn", False)
    assert model.visual.transformer.grad_checkpointing == "selective"


@pytest.mark.parametrize("config", [TINY, RESNET, NAFLEX, SIGLIP])
def test_the_backend_torch_runs_none_of_our_ops(config):
    model, seen = build(read_model_config(config)), []
    model.set_backend("torch")

    class Ours(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.extend([str(function)] * str(function).startswith("clipfast"))
            return function(*args, **(kwargs or {}))

    side = model.visual.image_size
    side = side if isinstance(side, int) else 64
    with Ours():
        image, text, *_ = model(torch.rand(2, 3, side, side), torch.randint(1, 9, (2, model.context_length)))
        (image.sum() + text.sum()).backward()
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, RESNET, SIGLIP, NAFLEX])
def test_bytes_and_normalised_floats_agree(config):
    model = build(read_model_config(config)).eval()
    side = model.visual.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    v2 = pytest.importorskip("torchvision.transforms.v2")
    floats = v2.Normalize(model.visual.image_mean, model.visual.image_std)(images.float() / 255)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(floats), rtol=1e-4, atol=1e-5)


def test_padding_may_be_cut():
    model = create_model("ViT-T-8-32").eval()
    texts = torch.tensor([[49406, 320, 1125, 49407], [49406, 320, 49407, 0]])
    with torch.no_grad():
        padded = model.encode_text(torch.nn.functional.pad(texts, (0, 73)))
        torch.testing.assert_close(model.encode_text(texts), padded, rtol=1e-5, atol=1e-6)


def test_outputs():
    model = create_model("ViT-T-8-32", output_dict=True)
    image, text = torch.zeros(1, 3, 32, 32), torch.tensor([[49406, 49407]])
    assert sorted(model(image, text)) == ["image_features", "logit_scale", "text_features"]
    model.output_dict = False
    # The model can compute one tower at a time.
    assert model(image).text_features is None
    assert model(text=text).image_features is None


def test_options_of_create_model():
    assert create_model("ViT-B/32", device="meta").config == get_model_config("ViT-B-32")
    model = create_model("ViT-T-8-32", force_image_size=64, precision="amp_bf16")
    assert (model.visual.positional_embedding.shape, model.visual.proj.dtype) == ((65, 128), torch.float32)
    model = create_model("ViT-T-8-32", precision="pure_bf16")
    outputs = (
        model.visual.proj,
        model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
        model.encode_text(torch.tensor([[49406, 49407]])),
    )
    assert {x.dtype for x in outputs} == {torch.bfloat16}


def config_with(section, key, value):
    """Return a model's configuration with another value of one key."""
    raw = get_model_config("ViT-T-8-32").to_dict()
    raw[section][key] = value
    return CLIPConfig.from_dict(raw)


NO_SIZE = "must be a positive whole number, got "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("ViT-Z-99"), r"unknown model 'ViT-Z-99' \(did you mean ViT-g-14 or .*\?\)\. Another"),
        (lambda: create_model("ViT-B-32", precision="int4"), "unknown precision 'int4'; known: fp32, amp"),
        (lambda: create_model("ViT-T-8-32", force_image_size=30), "image_size must be a multiple of patch_size"),
        (lambda: create_model("ViT-T-8-32", force_image_size=(64, 32)), rf"image_size {NO_SIZE}\(64, 32\)"),
        (lambda: config_with("vision_cfg", "width", 0), f"^vision_cfg: width {NO_SIZE}0"),
        (lambda: config_with("text_cfg", "heads", 1.5), f"^text_cfg: heads {NO_SIZE}1.5"),
        (lambda: small().encode_image(torch.zeros(1, 3, 30, 32)), "image size 30x32 is not a multiple"),
        (lambda: small().encode_image(torch.zeros(1, 1, 32, 32)), r"image must be \[B, 3, H, W\], RGB; got shape \("),
        (lambda: small().encode_image("a.png"), r"image must be a tensor \[B, 3, H, W\], got a str"),
        (lambda: small().encode_text(torch.zeros(1, 78, dtype=torch.int64)), r"L at most 77, got shape \(1, 78\)"),
        (lambda: small().encode_text(["a"]), r"text must be a tensor of token ids \[B, L\], got a list"),
        (lambda: CLIPConfig.from_dict({"embed_dim": 8}), "needs embed_dim, vision_cfg and text_cfg"),
        (lambda: CLIPConfig.from_dict({"embed_dim": 8, "vision_cfg": {"timm_model_name": "x"}, "text_cfg": {}}),
         "vision_cfg has settings that clipfast does not implement: {'timm_model_name': 'x'}"),
        (lambda: add_model_config(__file__), r"test_models\.py is not a model configuration"),
        (lambda: create_model_from_pretrained("RN50"), "RN50 has no weights of its own: pass the path of a checkpoint"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_hook_or_an_adapter_of_the_table_is_called():
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            """Look up token embeddings as an adapter of the model's table does."""
            return super().forward(ids) + 1

    model, texts = small(), torch.randint(1, 49408, (6, 12))
    expected = model.encode_text(texts)
    hook = model.token_embedding.register_forward_hook(lambda module, args, out: out + 1)
    hooked = model.encode_text(texts)
    hook.remove()
    shifted = Shifted(*model.token_embedding.weight.shape)
    shifted.weight = model.token_embedding.weight
    model.token_embedding = shifted
    assert torch.equal(hooked, model.encode_text(texts))
    assert not torch.allclose(hooked, expected)


@pytest.mark.parametrize("name", ["load_checkpoint", "image_transform"])
def test_signatures_are_those_of_open_clip(name):
    ours, theirs = (
        [(each.name, each.default) for each in inspect.signature(getattr(library, name)).parameters.values()]
        for library in (clipfast, pytest.importorskip("open_clip"))
    )
    assert ours[: len(theirs)] == theirs


def test_load_checkpoint_takes_what_fits(tmp_path):
    saved, model = small(), small()
    state = saved.state_dict() | {"head": torch.zeros(3)}
    del state["visual.proj"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt does not fit .*missing visual\.proj; unexpected head"):
        clipfast.load_checkpoint(model, tmp_path / "w.pt")
    found = clipfast.load_checkpoint(model, tmp_path / "w.pt", strict=False, device="cpu")
    assert (found.missing_keys, found.unexpected_keys) == (["visual.proj"], ["head"])
    assert torch.equal(model.text_projection, saved.text_projection)
    assert not torch.equal(model.visual.proj, saved.visual.proj)
    with pytest.raises(ValueError, match="weights_only must be True"):
        clipfast.load_checkpoint(model, tmp_path / "w.pt", weights_only=False)


def test_a_pretrained_model_infers(tmp_path):
    """A pretrained model drops no patches and updates no statistics, since all its modules are in evaluation mode."""
    torch.save(create_model("ViT-T-8-32").state_dict(), tmp_path / "w.pt")
    model, preprocess = create_model_from_pretrained("ViT-T-8-32", tmp_path / "w.pt", force_patch_dropout=0.5)
    assert not any(module.training for module in model.modules())
    images = preprocess(Image.new("RGB", (40, 50), "red"))[None]
    assert torch.equal(model.encode_image(images), model.encode_image(images))
