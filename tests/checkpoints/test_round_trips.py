"""Conversions of checkpoints and back: weights keep their bits, and converted models compute equal features."""

import contextlib
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipfast
from clipfast import convert_checkpoint, create_model, export_open_clip
from clipfast.models import NaFlexConfig, SigLIPConfig, get_model_config

from ..models import siglip
from .conftest import (
    CONFIGS,
    PICTURE,
    TEXT,
    TOLERANCE,
    VITS,
    assert_same,
    features,
    hugging_face_features,
    make_model,
    same_bits,
    save_config,
    save_own,
)


@pytest.mark.parametrize("kind", [*CONFIGS, *siglip.CONFIGS])
def test_clipfast_open_clip_clipfast(kind):
    model = made(kind)
    convert_checkpoint(save_own(model, "own.pt"), "folder", "open_clip")
    convert_checkpoint("local-dir:folder", "back.pt", "clipfast")
    theirs, preprocess = loaded_by_open_clip("folder", model.config)
    back, _, ours = clipfast.create_model_and_transforms("back.pt")
    assert back.config == model.config
    assert same_bits(back, model)
    assert_same(back, theirs, model.config)
    torch.testing.assert_close(ours(PICTURE), preprocess(PICTURE), **TOLERANCE)


# "bare" is left out, as transformers' SigLIP always has a projection of texts; transformers has no ResNets, either
@pytest.mark.parametrize("kind", [*VITS, *(kind for kind in siglip.CONFIGS if kind != "bare")])
def test_clipfast_hugging_face_clipfast(kind):
    model = made(kind)
    convert_checkpoint(save_own(model, "own.pt"), "hf", "hf")
    assert not Path("hf/vocab.json").exists()  # the model's vocabulary is smaller than that of clipfast's tokenizer
    convert_checkpoint("hf", "back.pt", "clipfast")
    back = create_model("back.pt")
    tokenizer = {"tokenizer": None, "clean": "canonicalize"} if isinstance(model.config, SigLIPConfig) else {}
    assert back.config == dataclasses.replace(model.config, **tokenizer)
    assert same_bits(back, model)
    theirs = hugging_face_features("hf", model.config)
    torch.testing.assert_close(features(back, model.config), theirs, **TOLERANCE)


def made(kind):
    """Return a CLIP or SigLIP model for a round trip through checkpoints."""
    return make_model(CONFIGS[kind]) if kind in CONFIGS else siglip.make_model(siglip.CONFIGS[kind])


def loaded_by_open_clip(folder, config, **options):
    """Load a converted checkpoint by OpenCLIP; return OpenCLIP's model and its preprocessing."""
    open_clip = pytest.importorskip("open_clip")
    with siglip.known_to_timm(config) if isinstance(config, SigLIPConfig) else contextlib.nullcontext():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", **options)
    return model.eval(), preprocess


@pytest.mark.parametrize(
    ("family", "activation", "name"),
    [
        ("CLIP", "quick_gelu", "QuickGELU"),
        ("Siglip", "gelu_pytorch_tanh", "tanh GELU"),
    ],
)
def test_what_transformers_saves(family, activation, name):
    """A checkpoint of transformers, in several files by save_pretrained, is converted to OpenCLIP and back."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": activation}  # fmt: skip
    text, vision, options = {"max_position_embeddings": 12, "vocab_size": 300}, {"image_size": 30, "patch_size": 8}, {}
    if family == "CLIP":
        text |= {"vocab_size": 5000, "bos_token_id": 0, "eos_token_id": 2}
        vision, options = vision | {"image_size": 32}, {"projection_dim": 24}
    else:
        text["projection_size"] = 32
    config = getattr(transformers, f"{family}Config")(text_config=tower | text, vision_config=tower | vision, **options)
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained("theirs", max_shard_size="60KB")
    assert len(list(Path("theirs").glob("*.safetensors"))) > 1
    info = convert_checkpoint("theirs", "folder", "open_clip")
    assert info.activation == name
    if family == "Siglip":
        assert (info.resize_mode, info.mean, info.std) == ("squash", (0.5,) * 3, (0.5,) * 3)
    convert_checkpoint("folder", "again", "hf")
    again = type(model).from_pretrained("again")
    assert same_bits(again, model)
    ours = create_model("local-dir:folder")
    theirs = hugging_face_features("theirs", ours.config)
    for one in (ours, loaded_by_open_clip("folder", ours.config)[0]):
        torch.testing.assert_close(features(one, ours.config), theirs, **TOLERANCE)


def test_hidden_units_come_back():
    from clipfast.checkpoints.tensor_shapes import mlp_ratio

    for width in range(1, 200):
        assert all(int(width * mlp_ratio(hidden, width)) == hidden for hidden in range(width, 5 * width))


def test_published_configurations_come_back(tmp_path):
    from clipfast.checkpoints.hugging_face_layout import from_settings, to_settings

    for name in clipfast.list_models():
        config = get_model_config(name)
        is_siglip = isinstance(config, SigLIPConfig)
        if isinstance(config.vision, NaFlexConfig):
            continue  # clipfast writes no NaFlex model for transformers
        if config.text_proj if is_siglip else isinstance(config.vision.layers, int):
            raw = {"model_type": "siglip" if is_siglip else "clip", **to_settings(config)}
            assert from_settings(json.loads(json.dumps(raw)), tmp_path) == config, name


def test_training_checkpoints_of_open_clip_and_bare_weights(vit, tmp_path):
    """Prefixes of DDP and torch.compile are removed; shapes of bare weights tell the model, but not the activation."""
    json_file = str(save_config(vit.config, "small.json"))
    for prefix in ("module.", "module._orig_mod.", "_orig_mod.module."):
        state = {prefix + name: value for name, value in vit.state_dict().items()}
        torch.save({"epoch": 4, "name": "x", "state_dict": state, "optimizer": {}}, "epoch_4.pt")
        shutil.rmtree("folder", ignore_errors=True)
        convert_checkpoint("epoch_4.pt", "folder", "open_clip", model=json_file)
        assert same_bits("folder", vit)
    model = make_model(get_model_config("ViT-T-8-32"))
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(model.state_dict(), "w.safetensors")
    torch.save(model.state_dict(), "w.bin", _use_new_zipfile_serialization=False)
    for name, wish, known in (
        ("w.safetensors", "gelu", "ViT-T-8-32"),
        ("w.bin", "quick_gelu", "ViT-T-8-32-quickgelu"),
    ):
        path = tmp_path / f"{wish}.pt"
        assert convert_checkpoint(tmp_path / name, path, "clipfast", activation=wish).models == (known,)
        own = create_model(str(path))
        assert own.config == get_model_config(known)
        assert same_bits(own, model)


def test_dtypes_are_kept(vit, tmp_path):
    state = {name: value.half() if value.ndim > 1 else value for name, value in vit.state_dict().items()}
    own = {"model_config": vit.config.to_dict()}
    torch.save({"state_dict": state, "clipfast": own}, "half.pt")
    for to, name in (("open_clip", "folder"), ("hf", "hf"), ("clipfast", "own.pt")):
        convert_checkpoint("half.pt", tmp_path / name, to)
        convert_checkpoint(tmp_path / name, tmp_path / f"{to}-back.pt", "clipfast")
        assert same_bits(torch.load(tmp_path / f"{to}-back.pt")["state_dict"], state), to
    # transformers loads all weights in one dtype, so the config must name one that rounds none of them
    assert json.loads(Path("hf/config.json").read_text())["torch_dtype"] == "float32"


def processor_of(folder):
    """Return the preprocessing settings for transformers in the folder of a converted checkpoint."""
    return json.loads((folder / "preprocessor_config.json").read_text())


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_and_tokenizer_travel(mode, vit, tmp_path):
    vit.visual.image_mean, vit.visual.image_std = (0.5, 0.25, 0.125), (0.1, 0.2, 0.3)
    first, hf, second = (tmp_path / name for name in ("first", "hf", "second"))
    export_open_clip(vit, first)
    raw = json.loads((first / "open_clip_config.json").read_text())
    raw["preprocess_cfg"] |= {"interpolation": "bilinear", "resize_mode": mode}
    (first / "open_clip_config.json").write_text(json.dumps(raw))
    # If a folder has its own tokenizer, the conversion copies it, and not clipfast's.
    (first / "tokenizer.json").write_text("{}")
    convert_checkpoint(first, "own.pt", "clipfast")
    assert create_model("own.pt").visual.image_mean == (0.5, 0.25, 0.125)
    convert_checkpoint(first, hf, "hf")
    # transformers has Pillow's numbers for resampling filters
    assert processor_of(hf)["resample"] == Image.Resampling.BILINEAR
    convert_checkpoint(hf, second, "open_clip")
    assert json.loads((second / "open_clip_config.json").read_text()) == raw
    assert (second / "tokenizer.json").read_text() == "{}"
    convert_checkpoint(first, "longer", "open_clip", context_length=20)  # a tokenizer for another length is not copied
    assert not Path("longer/tokenizer.json").exists()
    # Newer versions of transformers write processor_config.json.
    (hf / "processor_config.json").write_text(json.dumps({"image_processor": processor_of(hf)}))
    (hf / "preprocessor_config.json").unlink()
    assert convert_checkpoint(hf, "third", "open_clip").resize_mode == mode


def test_old_configurations_name_a_tower_twice(hf_folder):
    path = hf_folder / "config.json"
    raw = json.loads(path.read_text())
    raw["vision_config_dict"], raw["text_config_dict"] = raw["vision_config"], None
    raw["vision_config"] = {"hidden_size": 768}
    path.write_text(json.dumps(raw))
    convert_checkpoint(hf_folder, "again", "hf")
    assert json.loads(Path("again/config.json").read_text())["vision_config"] == raw["vision_config_dict"]


def test_transformers_prepares_images_and_texts_as_clipfast_does():
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIGS["ViT"], text=dataclasses.replace(TEXT, vocab_size=49408))
    convert_checkpoint(save_own(make_model(config), "own.pt"), "hf", "hf")
    processor = transformers.CLIPProcessor.from_pretrained("hf")
    texts = ["a photo of a cat", "It's 3 o'clock; Zürich!", "word " * 40]
    ids = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ours = clipfast.Tokenizer(TEXT.context_length)(texts)
    assert ids.shape == ours.shape
    padding = (ours == 0).cumsum(-1) > 0
    assert torch.equal(ids.where(~padding, 0), ours)
    _, _, preprocess = clipfast.create_model_and_transforms("ViT-T-8-32")
    pixels = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"][0]
    # transformers rounds at another place in its resampling, so pixels differ a little
    torch.testing.assert_close(pixels, preprocess(PICTURE), rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [16, 64])
def test_positions_are_resized_as_open_clip_does(size, own, vit):
    convert_checkpoint(own, "folder", "open_clip")
    convert_checkpoint(own, "other", "open_clip", image_size=size, context_length=size // 2)
    options = {"force_image_size": size, "force_context_length": size // 2}
    theirs, _ = loaded_by_open_clip("folder", vit.config, **options)
    ours = create_model("local-dir:other")
    assert (ours.visual.image_size, ours.context_length) == (size, size // 2)
    changed = {"positional_embedding", "visual.positional_embedding"}
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6 if name in changed else 0)


def test_a_size_that_differs_from_a_named_model_is_kept_or_resized_on_request():
    model = make_model(get_model_config("ViT-T-8-32").with_vision(image_size=48))
    torch.save(model.state_dict(), "w.pt")
    kept = convert_checkpoint("w.pt", "a.pt", "clipfast", model="ViT-T-8-32", image_size=48)
    resized = convert_checkpoint("w.pt", "b.pt", "clipfast", model="ViT-T-8-32", image_size=32)
    assert (kept.image_size, resized.image_size) == (48, 32)
    assert same_bits("a.pt", model)


def test_old_pickles_and_transformers_bin(vit, hf_folder):
    """A transformers folder may have its weights in a .bin file, with buffers of old versions of transformers."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = hf_folder / "model.safetensors"
    state = load_file(weights) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(state, hf_folder / "pytorch_model.bin")
    assert zipfile.is_zipfile(hf_folder / "pytorch_model.bin")
    weights.unlink()
    convert_checkpoint(hf_folder, "back.pt", "clipfast")
    assert same_bits("back.pt", vit)
