"""SigLIP between clipfast, OpenCLIP and transformers: the same bits and features both ways, and wrong inputs."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from clipfast import (
    CheckpointError,
    convert,
    create_model,
    create_model_and_transforms,
    export_open_clip,
    get_model_config,
    inspect_checkpoint,
    load_checkpoint,
)
from clipfast.conversion import siglip_hugging_face
from clipfast.models import CLIP, SigLIP, SigLIPConfig, TextConfig, VisionConfig

from ..clip.conftest import run_command
from ..clip.siglip import CONFIGS, inputs, known_to_timm, make_model, open_clip_model, save_tokenizer
from .conftest import CONFIGS as CLIP_CONFIGS
from .conftest import hugging_face_output, same_bits, save_config, save_own
from .conftest import make_model as make_clip

TOLERANCE = {"rtol": 0, "atol": 1e-6}
PROJECTED = [kind for kind in CONFIGS if kind != "bare"]  # transformers has no text tower without a projection


@torch.no_grad()
def features(model, config):
    torch.manual_seed(1)
    return tuple(model(*inputs(config)))


@torch.no_grad()
def hugging_face_features(folder, config):
    torch.manual_seed(1)
    model, output = hugging_face_output("SiglipModel", folder, *inputs(config))
    return output.image_embeds, output.text_embeds, model.logit_scale.exp()[0], model.logit_bias[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_clipfast_open_clip_clipfast(kind, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model = make_model(CONFIGS[kind])
    convert(save_own(model, tmp_path / "own.pt"), tmp_path / "folder", "open_clip")
    convert(f"local-dir:{tmp_path}/folder", tmp_path / "back.pt", "clipfast")
    with known_to_timm(model.config):
        theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/folder")
    assert same_bits(theirs.state_dict(), model.state_dict())
    back, _, ours = create_model_and_transforms(str(tmp_path / "back.pt"))
    assert back.config == model.config
    assert same_bits(back.state_dict(), model.state_dict())
    torch.testing.assert_close(features(back, model.config), features(theirs.eval(), model.config), **TOLERANCE)
    picture = Image.radial_gradient("L").resize((70, 50)).convert("RGB")
    torch.testing.assert_close(ours(picture), preprocess(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PROJECTED)
def test_clipfast_hugging_face_clipfast(kind, tmp_path):
    model = make_model(CONFIGS[kind])
    convert(save_own(model, tmp_path / "own.pt"), tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back.pt", "clipfast")
    back = create_model(str(tmp_path / "back.pt")).eval()
    assert back.config == dataclasses.replace(model.config, tokenizer=None, clean="canonicalize")
    assert same_bits(back.state_dict(), model.state_dict())
    theirs = hugging_face_features(tmp_path / "hf", model.config)
    torch.testing.assert_close(features(back, model.config), theirs, **TOLERANCE)


def test_what_open_clip_trains(tmp_path):
    """A training checkpoint of OpenCLIP with its prefixes, to clipfast by load_checkpoint and by convert, and back."""
    config = CONFIGS["mixed"]
    theirs = open_clip_model(config)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    model = SigLIP(config).eval()
    load_checkpoint(model, tmp_path / "epoch_3.pt")
    assert same_bits(model.state_dict(), theirs.state_dict())
    torch.testing.assert_close(features(model, config), features(theirs, config), **TOLERANCE)
    json_file = save_config(config, tmp_path / "small.json")
    info = convert(tmp_path / "epoch_3.pt", tmp_path / "own.pt", "clipfast", model=str(json_file))
    assert (info.activation, info.resize_mode, info.mean) == (
        "GELU for images, tanh GELU for texts", "squash", (0.5, 0.5, 0.5)
    )  # fmt: skip
    theirs.load_state_dict(torch.load(tmp_path / "own.pt")["state_dict"])
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    theirs.load_state_dict(torch.load(tmp_path / "bare.pt"))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_what_transformers_saves(activation, tmp_path):
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": activation}  # fmt: skip
    config = transformers.SiglipConfig(
        text_config=tower | {"max_position_embeddings": 12, "vocab_size": 300, "projection_size": 32},
        vision_config=tower | {"image_size": 30, "patch_size": 8},
    )
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    info = convert(tmp_path / "theirs", tmp_path / "folder", "open_clip")
    assert info.activation == {"gelu": "GELU", "gelu_pytorch_tanh": "tanh GELU"}[activation]
    assert (info.resize_mode, info.mean, info.std) == ("squash", (0.5,) * 3, (0.5,) * 3)
    convert(tmp_path / "folder", tmp_path / "again", "hf")
    again = transformers.SiglipModel.from_pretrained(tmp_path / "again")
    assert same_bits(again.state_dict(), model.state_dict())
    ours = create_model(f"local-dir:{tmp_path}/folder").eval()
    other = open_clip_model(ours.config)
    other.load_state_dict(ours.state_dict())
    for one in (ours, other):
        theirs = hugging_face_features(tmp_path / "theirs", ours.config)
        torch.testing.assert_close(features(one, ours.config), theirs, **TOLERANCE)


def test_preprocessing_and_tokenizer_travel(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    model = make_model(CONFIGS["mixed"])
    model.visual.image_mean = (0.5, 0.25, 0.125)
    export_open_clip(model, tmp_path / "first")
    for layout in ("hf", "open_clip"):  # without one, it is said
        convert(tmp_path / "first", tmp_path / f"bare_{layout}", layout)
        assert f"bare_{layout} has no tokenizer, because there is none beside {tmp_path / 'first'}" in caplog.text
    caplog.clear()
    save_tokenizer(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "hf", "hf")
    assert caplog.text == ""
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "SiglipImageProcessor"
    convert(tmp_path / "hf", tmp_path / "second", "open_clip", context_length=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    first, second = (
        json.loads((tmp_path / name / "open_clip_config.json").read_text())["preprocess_cfg"]
        for name in ("first", "second")
    )
    assert first == second
    assert first["resize_mode"] == "squash"
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.radial_gradient("L").resize((70, 50)).convert("RGB")
    preprocess = create_model_and_transforms(f"local-dir:{tmp_path}/first")[2]
    pixels = theirs(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, preprocess(picture), rtol=0, atol=0.02)  # their resampling rounds elsewhere


@pytest.mark.parametrize("size", [16, 47, 64])
def test_positions_are_resized_as_timm_does(size, tmp_path):
    model, theirs = make_model(CONFIGS["exact"]), open_clip_model(CONFIGS["exact"])
    theirs.load_state_dict(model.state_dict())
    grid = size // 8
    theirs.visual.trunk.set_input_size((8 * grid, 8 * grid))
    convert(save_own(model, tmp_path / "own.pt"), tmp_path / "other.pt", "clipfast", image_size=size, context_length=9)
    converted = create_model(str(tmp_path / "other.pt"))
    assert (converted.visual.image_size, converted.context_length) == (size, 9)
    loaded = SigLIP(CONFIGS["exact"].with_vision(image_size=size))
    load_checkpoint(loaded, tmp_path / "own.pt")
    for name in ("visual.trunk.pos_embed", "visual.trunk.norm.weight"):
        for one in (converted, loaded):
            torch.testing.assert_close(one.state_dict()[name], theirs.state_dict()[name], **TOLERANCE)


def test_a_resnet_is_resized(tmp_path):
    model = make_clip(CLIP_CONFIGS["ResNet"])
    own = save_own(model, tmp_path / "own.pt")
    convert(own, tmp_path / "other.pt", "clipfast", image_size=96)
    other = create_model(str(tmp_path / "other.pt"))
    name = "visual.attnpool.positional_embedding"
    assert other.state_dict()[name].shape[0] == 1 + 3 * 3
    loaded = CLIP(model.config.with_vision(image_size=96))
    load_checkpoint(loaded, own)
    assert same_bits(loaded.state_dict(), other.state_dict())
    assert torch.equal(other.state_dict()[name][0], model.state_dict()[name][0])
    convert(tmp_path / "other.pt", tmp_path / "same.pt", "clipfast")
    assert other.encode_image(torch.randn(2, 3, 96, 96)).shape == (2, 24)


@pytest.mark.parametrize("kind", ["ViT", "QuickGELU", "ResNet"])
def test_custom_text_of_a_clip_model(kind, tmp_path):
    """OpenCLIP with custom_text has the text tower of CLIP under other names."""
    open_clip = pytest.importorskip("open_clip")
    model = make_clip(CLIP_CONFIGS[kind])
    theirs = open_clip.CustomTextCLIP(**model.config.to_dict()).eval()
    theirs.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(model.state_dict()))
    assert "text.token_embedding.weight" in theirs.state_dict()
    torch.save({"epoch": 1, "name": "x", "state_dict": theirs.state_dict(), "optimizer": {}}, tmp_path / "t.pt")
    loaded = CLIP(model.config)
    load_checkpoint(loaded, tmp_path / "t.pt")
    assert same_bits(loaded.state_dict(), model.state_dict())
    (tmp_path / "folder").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "folder" / "open_clip_pytorch_model.bin")
    raw = {"model_cfg": model.config.to_dict() | {"custom_text": True}}
    (tmp_path / "folder" / "open_clip_config.json").write_text(json.dumps(raw))
    assert same_bits(create_model(f"local-dir:{tmp_path}/folder").state_dict(), model.state_dict())
    convert(tmp_path / "folder", tmp_path / "own.pt", "clipfast")
    assert same_bits(create_model(str(tmp_path / "own.pt")).state_dict(), model.state_dict())


def test_inspection(tmp_path, capsys):
    model = make_model(CONFIGS["mixed"])
    export_open_clip(model, tmp_path / "folder")
    info = inspect_checkpoint(tmp_path / "folder")
    assert (info.models, info.activation) == ((), "GELU for images, tanh GELU for texts")
    assert (info.image_size, info.context_length, info.resize_mode) == (40, 12, "squash")
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    code, out, _ = run_command(capsys, "inspect-checkpoint", tmp_path / "w.pt")
    assert code == 0
    shown = " ".join(out.split())
    for text in (
        "weights with OpenCLIP's names",
        "activation not said",
        "40 x 40, resize mode squash",
        "0.5, 0.5, 0.5;",
    ):
        assert text in shown


def test_sizes_at_the_edges_belong_to_the_name(tmp_path):
    """384 pixels have as many patches of 14 as 378: weights do not say which, and no position is resized."""
    small = SigLIPConfig(64, VisionConfig(34, 1, 64, 32, 2.0, 8), TextConfig(12, 300, 48, 2, 1))
    model = make_model(small)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    info = convert(
        tmp_path / "w.pt", tmp_path / "own.pt", "clipfast", model=str(save_config(small, tmp_path / "a.json"))
    )
    assert info.image_size == 34
    assert same_bits(create_model(str(tmp_path / "own.pt")).state_dict(), model.state_dict())


def published_tanh(root):
    """The configuration of a published model as transformers has it, whose towers have tanh."""
    config = dataclasses.replace(get_model_config("ViT-B-16-SigLIP"), image_gelu="tanh", text_gelu="tanh")
    (root / "config.json").write_text(json.dumps({"model_type": "siglip"} | siglip_hugging_face.to_settings(config)))
    return config


def test_the_activation_of_published_weights(tmp_path):
    """Transformers computes GELU by tanh where OpenCLIP's tower of these sizes does not: nothing is guessed."""
    config = published_tanh(tmp_path)
    found = siglip_hugging_face.from_settings(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    assert found == config
    assert (found.tokenizer, found.is_in_timm) == ("timm/ViT-B-16-SigLIP", False)
    from clipfast.conversion.contents import Contents
    from clipfast.conversion.convert import _check_open_clip
    from clipfast.conversion.resolve import Wishes, _with_activation

    contents = Contents(tmp_path, "", (), {}, found, {})
    with pytest.raises(CheckpointError, match=r"siglip_224 has GELU for images, tanh GELU for texts: add --activation"
                       " gelu,gelu_tanh to write it all the same"):  # fmt: skip
        _check_open_clip(contents)
    wished = _with_activation(found, contents, Wishes(activation="gelu,gelu_tanh"))
    _check_open_clip(dataclasses.replace(contents, config=wished))
    assert wished == dataclasses.replace(config, image_gelu="none")
    assert _with_activation(found, contents, Wishes(activation="gelu")) == get_model_config("ViT-B-16-SigLIP")


def test_loading_into_another_kind_of_model(tmp_path):
    siglip, clip = make_model(CONFIGS["exact"]), make_clip(CLIP_CONFIGS["ViT"])
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    save_own(siglip, tmp_path / "siglip.pt")
    with pytest.raises(CheckpointError, match="it holds a SigLIP model, and the model is a CLIP model"):
        load_checkpoint(clip, tmp_path / "siglip.pt")
    assert same_bits(clip.state_dict(), before)
    other = SigLIP(dataclasses.replace(CONFIGS["exact"], text_gelu="tanh"))
    with pytest.raises(
        CheckpointError, match="was trained with GELU, but the model uses GELU for images, tanh GELU for"
    ):
        load_checkpoint(other, tmp_path / "siglip.pt")
