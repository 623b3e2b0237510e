"""Conversions of SigLIP between clipfast, OpenCLIP and transformers: equal bits and features, and wrong inputs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clipfast import (
    CheckpointError,
    convert_checkpoint,
    create_model,
    create_model_and_transforms,
    export_open_clip,
    get_model_config,
    load_checkpoint,
)
from clipfast.checkpoints import convert as convert_module
from clipfast.checkpoints.contents import Contents
from clipfast.checkpoints.hugging_face_layout import from_settings, to_settings
from clipfast.checkpoints.resolve import Wishes, _with_activation
from clipfast.models import CLIP, SigLIP, SigLIPConfig, TextConfig, VisionConfig

from ..models.siglip import CONFIGS, make_model, open_clip_model, save_tokenizer
from .conftest import CONFIGS as CLIP_CONFIGS
from .conftest import PICTURE, TOLERANCE, assert_same, same_bits, save_config, save_own
from .conftest import make_model as make_clip


def test_what_open_clip_trains():
    """A SigLIP checkpoint of OpenCLIP's trainer can be loaded, and converted to clipfast and back."""
    config = CONFIGS["mixed"]
    theirs = open_clip_model(config)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, "epoch_3.pt")
    model = SigLIP(config)
    load_checkpoint(model, "epoch_3.pt")
    assert_same(model, theirs, config)
    json_file = save_config(config, "small.json")
    info = convert_checkpoint("epoch_3.pt", "own.pt", "clipfast", model=str(json_file))
    assert (info.resize_mode, info.mean) == ("squash", (0.5, 0.5, 0.5))
    assert info.activation == "GELU for images, tanh GELU for texts"
    theirs.load_state_dict(torch.load("own.pt")["state_dict"])


def test_preprocessing_and_tokenizer_travel(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    model, first, hf, second = make_model(CONFIGS["mixed"]), *(tmp_path / name for name in ("first", "hf", "second"))
    model.visual.image_mean = (0.5, 0.25, 0.125)
    export_open_clip(model, first)
    convert_checkpoint(first, "bare", "hf")  # the conversion warns that there is no tokenizer
    assert f"bare has no tokenizer, because there is none beside {first}" in caplog.text
    save_tokenizer(first)
    convert_checkpoint(first, hf, "hf")
    convert_checkpoint(hf, second, "open_clip", context_length=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    prepared = [json.loads((each / "open_clip_config.json").read_text())["preprocess_cfg"] for each in (first, second)]
    assert prepared[0] == prepared[1]
    theirs = transformers.AutoImageProcessor.from_pretrained(hf)
    preprocess = create_model_and_transforms(f"local-dir:{first}")[2]
    pixels = theirs(PICTURE, return_tensors="pt")["pixel_values"][0]
    # transformers rounds at another place in its resampling, so pixels differ a little
    torch.testing.assert_close(pixels, preprocess(PICTURE), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [16, 47])
def test_positions_are_resized_as_timm_does(size):
    model, theirs = make_model(CONFIGS["exact"]), open_clip_model(CONFIGS["exact"])
    theirs.load_state_dict(model.state_dict())
    grid = size // 8
    theirs.visual.trunk.set_input_size((8 * grid, 8 * grid))
    convert_checkpoint(save_own(model, "own.pt"), "other.pt", "clipfast", image_size=size, context_length=9)
    converted = create_model("other.pt")
    assert (converted.visual.image_size, converted.context_length) == (size, 9)
    loaded = SigLIP(CONFIGS["exact"].with_vision(image_size=size))
    load_checkpoint(loaded, "own.pt")
    for name in ("visual.trunk.pos_embed", "visual.trunk.norm.weight"):
        for one in (converted, loaded):
            torch.testing.assert_close(one.state_dict()[name], theirs.state_dict()[name], **TOLERANCE)


def test_a_resnet_is_resized():
    model = make_clip(CLIP_CONFIGS["ResNet"])
    own = save_own(model, "own.pt")
    convert_checkpoint(own, "other.pt", "clipfast", image_size=96)
    other = create_model("other.pt")
    loaded = CLIP(model.config.with_vision(image_size=96))
    load_checkpoint(loaded, own)
    assert same_bits(loaded, other)
    assert other.state_dict()["visual.attnpool.positional_embedding"].shape[0] == 1 + 3 * 3


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_custom_text_of_a_clip_model(kind):
    """OpenCLIP's custom_text models, whose text towers have other parameter names, load and convert as CLIP."""
    open_clip = pytest.importorskip("open_clip")
    model = make_clip(CLIP_CONFIGS[kind])
    theirs = open_clip.CustomTextCLIP(**model.config.to_dict()).eval()
    theirs.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(model.state_dict()))
    assert "text.token_embedding.weight" in theirs.state_dict()
    torch.save({"epoch": 1, "name": "x", "state_dict": theirs.state_dict(), "optimizer": {}}, "t.pt")
    loaded = CLIP(model.config)
    load_checkpoint(loaded, "t.pt")
    assert same_bits(loaded, model)
    Path("folder").mkdir()
    torch.save(theirs.state_dict(), "folder/open_clip_pytorch_model.bin")
    raw = {"model_cfg": model.config.to_dict() | {"custom_text": True}}
    Path("folder/open_clip_config.json").write_text(json.dumps(raw))
    assert same_bits("folder", model)
    convert_checkpoint("folder", "own.pt", "clipfast")
    assert same_bits("own.pt", model)


def test_sizes_at_the_edges_belong_to_the_name():
    """Image sizes 378 and 384 have equally many patches of 14, so the named config decides, and positions are kept."""
    small = SigLIPConfig(64, VisionConfig(34, 1, 64, 32, 2.0, 8), TextConfig(12, 300, 48, 2, 1))
    model = make_model(small)
    torch.save(model.state_dict(), "w.pt")
    info = convert_checkpoint("w.pt", "own.pt", "clipfast", model=str(save_config(small, "a.json")))
    assert info.image_size == 34
    assert same_bits("own.pt", model)


def test_the_activation_of_published_weights(tmp_path):
    """If transformers' SigLIP has tanh GELU where OpenCLIP's of equal sizes has not, --activation is asked for."""
    published = get_model_config("ViT-B-16-SigLIP")
    config = dataclasses.replace(published, image_gelu="tanh", text_gelu="tanh")
    found = from_settings({"model_type": "siglip", **to_settings(config)}, tmp_path)
    assert found == config
    assert (found.tokenizer, found.is_in_timm) == ("timm/ViT-B-16-SigLIP", False)
    contents = Contents(tmp_path, "", (), {}, found, {})
    with pytest.raises(CheckpointError, match=r"siglip_224 has GELU for images, tanh GELU for texts: add --activation"
                       " gelu,gelu_tanh to write it all the same"):  # fmt: skip
        convert_module._check_open_clip(contents)
    for wish, expected in (("gelu,gelu_tanh", dataclasses.replace(config, image_gelu="none")), ("gelu", published)):
        wished = _with_activation(found, contents, Wishes(activation=wish))
        convert_module._check_open_clip(dataclasses.replace(contents, config=wished))
        assert wished == expected
