"""Test that clipfast's SigLIP has OpenCLIP's configurations, names, initialisation, outputs and gradients."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clipfast
from clipfast import create_model, get_model_config, sigmoid_loss
from clipfast.models import CLIPConfig, SigLIP, SigLIPConfig, TextConfig, VisionConfig
from clipfast.models.siglip import SigLIPTrunk
from clipfast.models.siglip_config import PUBLISHED

from ..small_runs import assert_initialised_alike
from .siglip import CONFIGS, TEXT, inputs, known_to_timm, make_model, open_clip_model


def ours_and_theirs(config):
    """Return a SigLIP model of ours, and OpenCLIP's with the same weights."""
    ours, theirs = make_model(config), open_clip_model(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_image_features(ours, theirs, images, of_theirs):
    """Check that a SigLIP model and OpenCLIP's return equal features of images."""
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(of_theirs), rtol=1e-4, atol=1e-5)


def test_published_configurations_are_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    # OpenCLIP's main branch has NaFlex variants too, whose images keep their shapes
    published = {name for name in open_clip.list_models() if "SigLIP" in name and not name.endswith("-naflex")}
    assert set(PUBLISHED) == published
    for name in PUBLISHED:
        raw = open_clip.get_model_config(name)
        config = get_model_config(name)
        assert CLIPConfig.from_dict(raw) == config, name
        own = json.loads(json.dumps(config.to_dict()))
        assert CLIPConfig.from_dict(own) == config
        assert config.is_in_timm
        for section in ("vision_cfg", "text_cfg"):
            assert raw[section].items() <= own[section].items(), name


def test_published_towers_are_those_of_timm():
    timm = pytest.importorskip("timm")
    published = [get_model_config(name) for name in PUBLISHED]
    # One of the towers that differ only in their image size is enough, since sizes are compared by
    # test_published_configurations_are_those_of_open_clip.
    configs = {(*dataclasses.astuple(config.vision)[1:], config.image_gelu): config for config in published}
    for config in configs.values():
        name = config.timm_model_name
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0, global_pool="map")
            ours = SigLIPTrunk(config)
        shapes, own = ({key: x.shape for key, x in model.state_dict().items()} for model in (theirs, ours))
        assert list(own.items()) == list(shapes.items()), name
        gelu = theirs.blocks[0].mlp.act
        is_tanh = getattr(gelu, "approximate", "none") == "tanh" or type(gelu).__name__ == "GELUTanh"
        assert is_tanh == (config.image_gelu == "tanh"), name
        assert theirs.blocks[0].attn.num_heads == theirs.attn_pool.num_heads == ours.attn_pool.num_heads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients_are_those_of_open_clip(kind, dtype):
    config = CONFIGS[kind]
    ours, theirs = ours_and_theirs(config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.to(dtype).set_backend("torch" if kind == "exact" else "auto")
    theirs.to(dtype)
    images, texts = inputs(config, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    results, gradients = [], []
    for model in (ours, theirs):
        output = tuple(model(images, texts))
        image, text, scale, bias = output
        loss = torch.nn.functional.softplus(scale * image @ text.T + bias).square().sum() + scale + bias
        loss.backward()
        results.append(output)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for own, other in zip(*results, strict=True):
        assert (own - other).abs().max() <= tolerance * other.abs().max()
    assert gradients[0].keys() == gradients[1].keys()
    for name, other in gradients[1].items():
        # The gradient of a bias that all keys share is zero, and OpenCLIP's is only rounding error.
        largest = other.abs().max().clamp(min=1e-3)
        assert (gradients[0][name] - other).abs().max() <= tolerance * largest, name


def test_initialisation_is_that_of_timm_and_open_clip():
    config = SigLIPConfig(128, VisionConfig(64, 2, 128, 64, 4.0, 8), TextConfig(64, 300, 256, 4, 3))
    assert_initialised_alike(SigLIP(config), open_clip_model(config))


@pytest.mark.parametrize("shape", [(40, 24), (33, 47), (8, 8)])
def test_images_of_other_sizes(shape):
    """Positions are resized as timm does with dynamic_img_size; pixels that fill no patch are left out."""
    model, theirs = ours_and_theirs(CONFIGS["exact"])
    height, width = (side // 8 * 8 for side in shape)
    theirs.visual.trunk.set_input_size((height, width))
    images = torch.randn(2, 3, *shape)
    assert_same_image_features(model, theirs, images, images[..., :height, :width])
    with pytest.raises(ValueError, match="patch"):
        model.encode_image(images[..., :5])


def test_more_tokens_than_the_pooling_takes():
    config = SigLIPConfig(16, VisionConfig(66, 1, 16, 8, 2.0, 2), TEXT)
    images = torch.randn(1, 3, 66, 66)
    assert_same_image_features(*ours_and_theirs(config), images, images)


def test_texts_are_read_at_their_last_position():
    model, theirs = ours_and_theirs(CONFIGS["exact"])
    _, texts = inputs(model.config)
    short = texts[:, :7]
    torch.testing.assert_close(model.encode_text(short), theirs.encode_text(short), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.encode_text(short), model.encode_text(texts))
    for wrong in (texts[0], torch.zeros(2, 13, dtype=torch.long)):
        with pytest.raises(ValueError, match="encode_text: text must be"):
            model.encode_text(wrong)


def test_patches_are_dropped_in_training():
    config = CONFIGS["exact"].with_vision(patch_dropout=0.5)
    model, (images, _) = make_model(config), inputs(CONFIGS["exact"])
    seen = []
    model.visual.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    whole = model.encode_image(images)
    assert not torch.allclose(model.train().encode_image(images), whole)
    assert seen == [16, 8]


@pytest.mark.long
def test_compiled():
    model, batch = make_model(CONFIGS["bare"]), inputs(CONFIGS["bare"])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for one in (model, compiled):
        sigmoid_loss(*one(*batch)).backward()
    for (name, own), again in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(own.grad, again.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16():
    """Features under autocast and in pure bfloat16 are near those in float32, and autocast keeps every gradient."""
    config = CONFIGS["mixed"]
    model, (images, texts) = make_model(config), inputs(config)
    image, text, *_ = model(images, texts)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, texts)
        sigmoid_loss(*output).backward()
    assert output.image_features.dtype == output.text_features.dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in model.parameters())
    pure = copy.deepcopy(model).bfloat16()
    pure.zero_grad()
    for found in (output, pure(images.bfloat16(), texts)):
        assert torch.cosine_similarity(found.image_features.float(), image).min() > 0.999
        assert torch.cosine_similarity(found.text_features.float(), text).min() > 0.999


INTERPRETED = """
import copy, torch
from tests.models.siglip import CONFIGS, inputs, make_model
torch.manual_seed(0)
model = make_model(CONFIGS["bare"])
images, texts = inputs(CONFIGS["bare"], 2)
images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
other = copy.deepcopy(model)
model.set_backend("triton")
other.set_backend("torch")
for one in (model, other):
    image, text, scale, bias = one(images, texts)
    (scale * image @ text.T + bias).square().mean().backward()
for (name, own), again in zip(model.named_parameters(), other.parameters(), strict=True):
    largest = again.grad.abs().max().clamp(min=1e-3)
    assert (own.grad - again.grad).abs().max() <= 1e-5 * largest, name
"""


@pytest.mark.long
def test_triton_kernels_interpreted():
    """A whole model has the gradients of the PyTorch backend if its Triton kernels are interpreted.

    The model takes images as bytes, has no class token, and pools every image by one query.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, root = [sys.executable, "-c", INTERPRETED], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_by_name(tmp_path):
    model = create_model("ViT-B-16-SigLIP", device="meta")
    assert isinstance(model, SigLIP)
    assert set(PUBLISHED) <= set(clipfast.list_models())
    with pytest.raises(ValueError, match="a SigLIP model has GELU: leave quick_gelu out"):
        create_model("ViT-B-16-SigLIP", device="meta", force_quick_gelu=True)
    with pytest.raises(ValueError, match=r"open_clip\.create_model\('PE-Core-B-16'\).*clipfast\.apply_to_open_clip"):
        create_model("PE-Core-B-16")
    assert create_model("ViT-B-16-SigLIP", device="meta", force_image_size=320).visual.trunk.grid_size == (20, 20)


def changed(section, **changes):
    """Return the configuration of a SigLIP model with changes in one section."""
    raw = CONFIGS["exact"].to_dict()
    raw[section] = {key: value for key, value in (raw[section] | changes).items() if value is not None}
    return raw


WRONG = [
    (changed("vision_cfg", timm_pool="avg"), "vision_cfg has settings that clipfast does not implement in a SigLIP"),
    (changed("vision_cfg", layers=None), "does not know the tower 'vit_w64_d2_h2_patch8_siglip_32'"),
    (changed("vision_cfg", timm_model_name="vit_base_patch16_siglip_224"), "has other sizes than"),
    (changed("vision_cfg", act_kwargs={"approximate": "erf"}), "GELU is none (exact) or tanh, got 'erf'"),
    (changed("vision_cfg", width=32), "is as wide as embed_dim, got 32 and 64"),
    (changed("text_cfg", pool_type="argmax"), "{'pool_type': 'argmax'}"),
    (changed("text_cfg", tokenizer_kwargs={"clean": "soap"}), "clean must be one of canonicalize, lower, whitespace"),
    (CONFIGS["exact"].to_dict() | {"multimodal_cfg": {}}, "the config of a SigLIP model needs embed_dim, vision_cfg"),
]


@pytest.mark.parametrize(("raw", "message"), WRONG)
def test_other_configurations_are_refused(raw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIPConfig.from_dict(raw)


@pytest.mark.parametrize("kind", CONFIGS)
def test_own_configurations_come_back_and_open_clip_builds_no_other_model(kind):
    config = CONFIGS[kind]
    raw = config.to_dict()
    assert CLIPConfig.from_dict(json.loads(json.dumps(raw))) == config
    pytest.importorskip("timm")
    assert not config.is_in_timm
    del raw["custom_text"]
    with known_to_timm(), pytest.raises(RuntimeError, match="Unknown model"):
        pytest.importorskip("open_clip").CustomTextCLIP(**raw)
    # With the other activation, the image tower of a published configuration has another name.
    other = dataclasses.replace(get_model_config("ViT-B-16-SigLIP"), image_gelu="tanh")
    assert other.timm_model_name.endswith("siglip_224_gelu_tanh")
