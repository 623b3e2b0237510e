"""Wrong input of SigLIP is refused with a message that says what to do, and leaves nothing behind."""

import dataclasses
import json
import shutil

import pytest
import torch

from clipfast import convert, export_open_clip

from ..clip.siglip import CONFIGS, make_model
from .conftest import CONFIGS as CLIP_CONFIGS
from .conftest import make_model as make_clip
from .conftest import save_config, save_own
from .wrong_input import assert_refused, changed, edited, edited_tower


def siglip_for_clip(model, hf, root):
    torch.save(model.state_dict(), root / "w.pt")
    return ["w.pt", "--model", "ViT-T-8-32"], "it holds a SigLIP model, and the model is a CLIP model: choose the name"


def clip_for_siglip(model, hf, root):
    torch.save(make_clip(CLIP_CONFIGS["ViT"]).state_dict(), root / "w.pt")
    return ["w.pt", "--model", "ViT-B-16-SigLIP"], "it holds a CLIP model, and the model is a SigLIP model: choose the"


def missing_bias(model, hf, root):
    changed(model, root / "w.pt", logit_bias=None)
    return ["w.pt"], "w.pt does not fit the model: missing logit_bias"


def another_width(model, hf, root):
    changed(model, root / "w.pt", visual__trunk__norm__weight=torch.zeros(3))
    return ["w.pt"], "visual.trunk.norm.weight is (3,), the model has (64,)"


def missing_pooling(model, hf, root):
    changed(model, root / "w.pt", visual__trunk__attn_pool__latent=None)
    return ["w.pt"], "missing visual.trunk.attn_pool.latent"


def wrong_activation(model, hf, root):
    other = dataclasses.replace(model.config, text_gelu="none")
    save_config(other, root / "other.json")
    return ["own.pt", "--model", "other.json"], (
        "own.pt was trained with GELU for images, tanh GELU for texts, but --model other.json uses GELU: name a model "
        "with GELU for images, tanh GELU for texts, or add --activation gelu if the checkpoint is wrong"
    )


def activation_of_clip(model, hf, root):
    return [
        "own.pt",
        "--activation",
        "quick_gelu",
    ], "a SigLIP model has gelu or gelu_tanh, but --activation is quick_gelu"


def activation_of_siglip(model, hf, root):
    save_own(make_clip(CLIP_CONFIGS["ViT"]), root / "clip.pt")
    return [
        "clip.pt",
        "--activation",
        "gelu_tanh",
    ], "a CLIP model has gelu or quick_gelu: --activation gelu_tanh is for"


def unknown_activation(model, hf, root):
    return ["own.pt", "--activation", "relu"], "such as gelu,gelu_tanh; got 'relu'"


def wrong_image_size(model, hf, root):
    save_config(model.config.with_vision(image_size=64), root / "larger.json")
    return ["own.pt", "--model", "larger.json"], (
        "own.pt (taken for larger.json) has positions for image size 40, but the model's image size is 64: add "
        "--image-size 64 to resize them, or --image-size 40 to keep them"
    )


def too_small(model, hf, root):
    return ["own.pt", "--image-size", "7"], "--image-size must be at least one patch, 8, got 7"


def naflex(model, hf, root):
    edited(hf / "config.json", model_type="siglip2", architectures=["Siglip2Model"])
    return ["hf"], "config.json describes Siglip2Model, whose images keep their shapes (NaFlex); of transformers, clip"


def no_head(model, hf, root):
    edited_tower(hf, "vision_config", vision_use_head=False)
    return ["hf"], "vision_use_head must be true"


def other_epsilon(model, hf, root):
    edited_tower(hf, "text_config", layer_norm_eps=1e-5)
    return ["hf"], "layer_norm_eps must be 1e-06, got 1e-05"


def other_hidden_act(model, hf, root):
    edited_tower(hf, "vision_config", hidden_act="quick_gelu")
    return ["hf"], "hidden_act must be one of gelu, gelu_pytorch_tanh, got 'quick_gelu'"


def no_projection_in_transformers(model, hf, root):
    save_own(make_model(CONFIGS["bare"]), root / "bare.pt")
    return ["bare.pt", "--to", "hf"], "texts in the end, and this model does not: convert it --to open_clip or"


def transformers_file_alone(model, hf, root):
    shutil.copy(hf / "model.safetensors", root / "w.safetensors")
    return ["w.safetensors"], "w.safetensors holds the weights of a transformers model without its configuration"


def unknown_sizes(model, hf, root):
    torch.save(model.state_dict(), root / "w.pt")
    return ["w.pt"], "w.pt does not say which model it holds, and no model that clipfast knows has its shapes"


def other_timm_tower(model, hf, root):
    state = {"visual.trunk.stem.weight": torch.zeros(3), "text.ln_final.weight": torch.zeros(3)}
    torch.save(state, root / "w.pt")
    return [
        "w.pt"
    ], "w.pt holds no CLIP model that clipfast can build: it has no 'visual.trunk.patch_embed.proj.weight'"


def other_activation_beside_the_weights(model, hf, root):
    export_open_clip(model, root / "folder")
    path = root / "folder" / "open_clip_config.json"
    raw = json.loads(path.read_text())
    del raw["model_cfg"]["text_cfg"]["act_kwargs"]
    path.write_text(json.dumps(raw))
    return ["folder"], "trained with GELU for images, tanh GELU for texts: correct act_kwargs in open_clip_config.json"


WRONG = [
    siglip_for_clip, clip_for_siglip, missing_bias, another_width, missing_pooling, wrong_activation,
    activation_of_clip, activation_of_siglip, unknown_activation, wrong_image_size, too_small, naflex, no_head,
    other_epsilon,
    other_hidden_act, no_projection_in_transformers, transformers_file_alone, unknown_sizes, other_timm_tower,
    other_activation_beside_the_weights,
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case.__name__ for case in WRONG])
def test_message(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_model(CONFIGS["mixed"])
    save_own(model, tmp_path / "own.pt")
    convert(tmp_path / "own.pt", tmp_path / "hf", "hf")
    assert_refused(capsys, *case(model, tmp_path / "hf", tmp_path))
