"""Wrong input of SigLIP is refused with a message that says what to do, and leaves nothing behind."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clipfast import convert, export_open_clip

from ..clip.siglip import CONFIGS, make_model
from .conftest import CONFIGS as CLIP_CONFIGS
from .conftest import make_model as make_clip
from .conftest import save_config, save_own
from .wrong_input import Refusals, assert_refused, changed, edited, edited_tower

refused = Refusals()


@refused("w.pt --model ViT-T-8-32", "it holds a SigLIP model, and the model is a CLIP model: choose the name")
def siglip_for_clip(model, hf):
    torch.save(model.state_dict(), "w.pt")


@refused("w.pt --model ViT-B-16-SigLIP", "it holds a CLIP model, and the model is a SigLIP model: choose the")
def clip_for_siglip(model, hf):
    torch.save(make_clip(CLIP_CONFIGS["ViT"]).state_dict(), "w.pt")


@refused("w.pt", "w.pt does not fit the model: missing logit_bias")
def missing_bias(model, hf):
    changed(model, "w.pt", logit_bias=None)


@refused(
    "own.pt --model other.json",
    "trained with GELU for images, tanh GELU for texts, but --model other.json uses GELU",
)
def wrong_activation(model, hf):
    other = dataclasses.replace(model.config, text_gelu="none")
    save_config(other, Path("other.json"))


@refused("clip.pt --activation gelu_tanh", "a CLIP model has gelu or quick_gelu: --activation gelu_tanh is for")
def activation_of_siglip(model, hf):
    save_own(make_clip(CLIP_CONFIGS["ViT"]), "clip.pt")


@refused("hf", "config.json describes Siglip2Model, whose images keep their shapes (NaFlex); of transformers, clip")
def naflex(model, hf):
    edited(hf / "config.json", model_type="siglip2", architectures=["Siglip2Model"])


@refused("hf", "vision_use_head must be true")
def no_head(model, hf):
    edited_tower(hf, "vision_config", vision_use_head=False)


@refused("hf", "layer_norm_eps must be 1e-06, got 1e-05")
def other_epsilon(model, hf):
    edited_tower(hf, "text_config", layer_norm_eps=1e-5)


@refused("hf", "hidden_act must be one of gelu, gelu_pytorch_tanh, got 'quick_gelu'")
def other_hidden_act(model, hf):
    edited_tower(hf, "vision_config", hidden_act="quick_gelu")


@refused("bare.pt --to hf", "texts in the end, and this model does not: convert it --to open_clip or")
def no_projection_in_transformers(model, hf):
    save_own(make_model(CONFIGS["bare"]), "bare.pt")


@refused("w.pt", "w.pt holds no CLIP model that clipfast can build: it has no 'visual.trunk.patch_embed.proj.weight'")
def other_timm_tower(model, hf):
    state = {"visual.trunk.stem.weight": torch.zeros(3), "text.ln_final.weight": torch.zeros(3)}
    torch.save(state, "w.pt")


@refused("folder", "trained with GELU for images, tanh GELU for texts: correct act_kwargs in open_clip_config.json")
def other_activation_beside_the_weights(model, hf):
    export_open_clip(model, "folder")
    path = Path("folder/open_clip_config.json")
    raw = json.loads(path.read_text())
    del raw["model_cfg"]["text_cfg"]["act_kwargs"]
    path.write_text(json.dumps(raw))


refused.extend(
    (None, command, message)
    for command, message in {
        "own.pt --activation quick_gelu": "a SigLIP model has gelu or gelu_tanh, but --activation is quick_gelu",
        "own.pt --activation relu": "such as gelu,gelu_tanh; got 'relu'",
        "own.pt --image-size 7": "--image-size must be at least one patch, 8, got 7",
    }.items()
)


@pytest.mark.parametrize(("prepare", "command", "message"), refused)
def test_message(prepare, command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_model(CONFIGS["mixed"])
    convert(save_own(model, tmp_path / "own.pt"), tmp_path / "hf", "hf")
    if prepare is not None:
        prepare(model, tmp_path / "hf")
    assert_refused(capsys, command, message)
