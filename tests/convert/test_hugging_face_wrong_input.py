"""Wrong folders of transformers, and models that it does not have, are refused with a message that says what to do."""

import json
from pathlib import Path

import pytest
import torch

from clipfast import export_open_clip

from .conftest import CONFIGS, make_model, save_own
from .wrong_input import Payload, Refusals, assert_refused, edited, edited_tower

refused = Refusals()


@refused("rn.pt --to hf", "has no ResNets, only vision transformers: convert it --to open_clip")
def resnet_for_transformers(vit, hf):
    save_own(make_model(CONFIGS["ResNet"]), "rn.pt")


@refused("hf", "model.safetensors is not a checkpoint that can be read: it is cut off, damaged or of another kind (")
def truncated_safetensors(vit, hf):
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:-8])


@refused("hf", "pytorch_model.bin is refused: it is damaged, or holds objects other than tensors and plain values")
def pickle_with_code_in_a_folder(vit, hf):
    (hf / "model.safetensors").unlink()
    torch.save({"x": Payload(Path("owned"))}, hf / "pytorch_model.bin")


@refused("hf", "hf holds weights of transformers without config.json, which says what model they belong to")
def without_config(vit, hf):
    (hf / "config.json").unlink()


@refused("hf", "hf holds no weights: neither model.safetensors, nor model.safetensors.index.json, nor pytorch_mod")
def without_weights(vit, hf):
    (hf / "model.safetensors").unlink()


@refused("hf", "model.safetensors.index.json names no files of weights in its folder")
def index_leads_outside(vit, hf):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../own.pt"}}))


@refused("hf", "hf does not fit the model: text_projection.weight is (24, 32), the model has (12, 32)")
def other_width(vit, hf):
    edited(hf / "config.json", projection_dim=12)


@refused("hf", "config.json describes BlipModel; of transformers, clipfast reads only CLIPModel and SiglipModel")
def other_model(vit, hf):
    edited(hf / "config.json", model_type="blip", architectures=["BlipModel"])


@refused("hf", "hidden_act must be one of quick_gelu, gelu, got 'gelu_new'")
def other_activation(vit, hf):
    edited_tower(hf, "text_config", hidden_act="gelu_new")


@refused("hf", "both towers must have one activation, got quick_gelu for texts and gelu for images")
def two_activations(vit, hf):
    edited_tower(hf, "text_config", hidden_act="quick_gelu")


@refused("hf", "config.json cannot be read: Expecting value")
def unreadable_config(vit, hf):
    (hf / "config.json").write_text('{"model_type": ')


@refused("hf", "prepares images in a way that OpenCLIP's configuration cannot express for a model of images of 32")
def images_padded(vit, hf):
    edited(hf / "preprocessor_config.json", do_center_crop=False)


@refused("hf", "layer_norm_eps must be 1e-05, got 1e-06")
def other_epsilon(vit, hf):
    edited_tower(hf, "vision_config", layer_norm_eps=1e-6)


@refused("hf", "num_channels must be 3, got 1")
def other_channels(vit, hf):
    edited_tower(hf, "vision_config", num_channels=1)


@refused("hf", "eos_token_id must be the last of the 600 tokens, where a text is read, got 7")
def other_end_of_text(vit, hf):
    edited_tower(hf, "text_config", eos_token_id=7)


@refused("hf", "hidden_size must be a multiple of num_attention_heads, got 64 and 3")
def uneven_heads(vit, hf):
    edited_tower(hf, "vision_config", num_attention_heads=3)


@refused("hf", "json has do_normalize false, but CLIP's images are resized, scaled and normalised")
def images_not_normalised(vit, hf):
    edited(hf / "preprocessor_config.json", do_normalize=False)


@refused("folder --to hf", "processor of CLIP cannot resize with resize_mode 'longest' and interpolation")
def longest_side_for_transformers(vit, hf):
    export_open_clip(vit, "folder")
    path = Path("folder/open_clip_config.json")
    edited(path, preprocess_cfg=json.loads(path.read_text())["preprocess_cfg"] | {"resize_mode": "longest"})


@refused("hf", "cannot express for a model of images of 32 pixels: size {'shortest_edge': 36}, crop_size {'height'")
def images_cropped_smaller(vit, hf):
    edited(hf / "preprocessor_config.json", size={"shortest_edge": 36})


@refused("hf", "size {'shortest_edge': 32}, crop_size 24, do_center_crop True, resample 3")
def other_crop(vit, hf):
    edited(hf / "preprocessor_config.json", crop_size=24)


@refused("hf", "hf preprocesses images with interpolation 'lanczos', clipfast only with 'bicubic' or 'bilinear'")
def lanczos_for_clipfast(vit, hf):
    edited(hf / "preprocessor_config.json", resample=1)


message = "holds the weights of a transformers model without its configuration: give the"
refused.append((None, "hf/model.safetensors", message))


@pytest.mark.parametrize(("prepare", "command", "message"), refused)
def test_message(prepare, command, message, vit, own, hf_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(vit, hf_folder)
    assert_refused(capsys, command, message)
