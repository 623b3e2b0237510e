"""Wrong folders of transformers, and models that it does not have, are refused with a message that says what to do."""

import json

import pytest
import torch

from clipfast import export_open_clip

from .conftest import CONFIGS, make_model, save_own
from .wrong_input import Payload, assert_refused, edited, edited_tower


def resnet_for_transformers(vit, hf, root):
    save_own(make_model(CONFIGS["ResNet"]), root / "rn.pt")
    return ["rn.pt", "--to", "hf"], (
        "Hugging Face's CLIP has no ResNets, only vision transformers: convert it --to open_clip or --to clipfast"
    )


def truncated_safetensors(vit, hf, root):
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:-8])
    return ["hf"], "model.safetensors is not a checkpoint that can be read: it is cut off, damaged or of another kind ("


def pickle_with_code_in_a_folder(vit, hf, root):
    (hf / "model.safetensors").unlink()
    torch.save({"x": Payload(root / "owned")}, hf / "pytorch_model.bin")
    return ["hf"], "pytorch_model.bin is refused: it is damaged, or holds objects other than tensors and plain values"


def without_config(vit, hf, root):
    (hf / "config.json").unlink()
    return ["hf"], "hf holds weights of transformers without config.json, which says what model they belong to"


def file_alone(vit, hf, root):
    return ["hf/model.safetensors"], "holds the weights of a transformers model without its configuration: give the"


def without_weights(vit, hf, root):
    (hf / "model.safetensors").unlink()
    return ["hf"], "hf holds no weights: neither model.safetensors, nor model.safetensors.index.json, nor pytorch_mod"


def index_leads_outside(vit, hf, root):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../own.pt"}}))
    return ["hf"], "model.safetensors.index.json names no files of weights in its folder"


def other_width(vit, hf, root):
    edited(hf / "config.json", projection_dim=12)
    return ["hf"], "hf does not fit the model: text_projection.weight is (24, 32), the model has (12, 32)"


def other_model(vit, hf, root):
    edited(hf / "config.json", model_type="blip", architectures=["BlipModel"])
    return ["hf"], "config.json describes BlipModel; of transformers, clipfast reads only CLIPModel and SiglipModel"


def other_activation(vit, hf, root):
    edited_tower(hf, "text_config", hidden_act="gelu_new")
    return ["hf"], "hidden_act must be one of quick_gelu, gelu, got 'gelu_new'"


def two_activations(vit, hf, root):
    edited_tower(hf, "text_config", hidden_act="quick_gelu")
    return ["hf"], "both towers must have one activation, got quick_gelu for texts and gelu for images"


def unreadable_config(vit, hf, root):
    (hf / "config.json").write_text('{"model_type": ')
    return ["hf"], "config.json cannot be read: Expecting value"


def images_padded(vit, hf, root):
    edited(hf / "preprocessor_config.json", do_center_crop=False)
    return ["hf"], "prepares images in a way that OpenCLIP's configuration cannot express for a model of images of 32"


def other_epsilon(vit, hf, root):
    edited_tower(hf, "vision_config", layer_norm_eps=1e-6)
    return ["hf"], "layer_norm_eps must be 1e-05, got 1e-06"


def other_channels(vit, hf, root):
    edited_tower(hf, "vision_config", num_channels=1)
    return ["hf"], "num_channels must be 3, got 1"


def other_end_of_text(vit, hf, root):
    edited_tower(hf, "text_config", eos_token_id=7)
    return ["hf"], "eos_token_id must be the last of the 600 tokens, where a text is read, got 7"


def uneven_heads(vit, hf, root):
    edited_tower(hf, "vision_config", num_attention_heads=3)
    return ["hf"], "hidden_size must be a multiple of num_attention_heads, got 64 and 3"


def images_not_normalised(vit, hf, root):
    edited(hf / "preprocessor_config.json", do_normalize=False)
    return ["hf"], "json has do_normalize false, but CLIP's images are resized, scaled and normalised"


def longest_side_for_transformers(vit, hf, root):
    export_open_clip(vit, root / "folder")
    path = root / "folder" / "open_clip_config.json"
    edited(path, preprocess_cfg=json.loads(path.read_text())["preprocess_cfg"] | {"resize_mode": "longest"})
    return ["folder", "--to", "hf"], "processor of CLIP cannot resize with resize_mode 'longest' and interpolation"


def images_cropped_smaller(vit, hf, root):
    edited(hf / "preprocessor_config.json", size={"shortest_edge": 36})
    return ["hf"], "cannot express for a model of images of 32 pixels: size {'shortest_edge': 36}, crop_size {'height'"


def other_crop(vit, hf, root):
    edited(hf / "preprocessor_config.json", crop_size=24)
    return ["hf"], "size {'shortest_edge': 32}, crop_size 24, do_center_crop True, resample 3"


def lanczos_for_clipfast(vit, hf, root):
    edited(hf / "preprocessor_config.json", resample=1)
    return ["hf"], "hf preprocesses images with interpolation 'lanczos', clipfast only with 'bicubic' or 'bilinear'"


WRONG = [
    resnet_for_transformers, truncated_safetensors, pickle_with_code_in_a_folder, without_config, file_alone,
    without_weights, index_leads_outside, other_width, other_model, other_activation, two_activations,
    unreadable_config, images_padded, other_epsilon, other_channels, other_end_of_text, uneven_heads,
    images_not_normalised, longest_side_for_transformers, images_cropped_smaller, other_crop, lanczos_for_clipfast,
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case.__name__ for case in WRONG])
def test_message(case, vit, own, hf_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, *case(vit, hf_folder, tmp_path))
