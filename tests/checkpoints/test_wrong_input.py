"""Wrong checkpoints and options are refused by a message that says what to do, and no file is left behind."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from clipfast import CheckpointError, convert_checkpoint, export_open_clip
from clipfast.checkpoints import hugging_face, open_clip_folder
from clipfast.io import files
from clipfast.models import get_model_config

from ..models import siglip
from ..small_runs import run_command
from .conftest import CONFIGS, Payload, make_model, quick, save_config, save_own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write checkpoints of each kind of model, and named.pt, which has the shapes of the known model ViT-T-8-32."""
    folder = tmp_path_factory.mktemp("made")
    vit, mixed = make_model(CONFIGS["ViT"]), siglip.make_model(siglip.CONFIGS["mixed"])
    convert_checkpoint(save_own(vit, folder / "own.pt"), folder / "hf", "hf")
    convert_checkpoint(save_own(mixed, folder / "siglip.pt"), folder / "siglip", "hf")
    save_own(make_model(CONFIGS["ResNet"]), folder / "rn.pt")
    save_own(siglip.make_model(siglip.CONFIGS["bare"]), folder / "bare.pt")
    torch.save(make_model(get_model_config("ViT-T-8-32")).state_dict(), folder / "named.pt")
    export_open_clip(vit, folder / "folder")
    export_open_clip(mixed, folder / "siglip_folder")
    export_open_clip(make_model(quick(vit.config)), folder / "quick")
    config = vit.config
    longer = dataclasses.replace(config, text=dataclasses.replace(config.text, context_length=20))
    for name, changed in (
        ("small", config),
        ("larger", config.with_vision(image_size=64)),
        ("longer", longer),
        ("heads", config.with_vision(head_width=16)),
    ):
        save_config(changed, folder / f"{name}.json")
    return folder


def weights(source="own.pt", **changes):
    """Write w.pt, a checkpoint with changed tensors; names have "__" for ".", and None removes a tensor."""
    saved = torch.load(source)
    state = saved["state_dict"] | {name.replace("__", "."): value for name, value in changes.items()}
    saved["state_dict"] = {name: value for name, value in state.items() if value is not None}
    torch.save(saved, "w.pt")


def edited(path, section=None, **changes):
    """Change settings in a JSON file of a checkpoint's folder, or in a section of this file."""
    raw = json.loads(Path(path).read_text())
    (raw if section is None else raw[section]).update(changes)
    Path(path).write_text(json.dumps(raw))


def flipped():
    """Write a checkpoint in which one bit has flipped."""
    content = bytearray(Path("own.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("w.pt").write_bytes(content)


def without_safetensors(index):
    """Replace the weights of a checkpoint of transformers by an index file with the weight map ``index``."""
    Path("hf/model.safetensors").unlink()
    Path("hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def tower(name, folder="hf", **changes):
    """Return a function that changes a tower's settings in a checkpoint of transformers."""
    return lambda: edited(f"{folder}/config.json", f"{name}_config", **changes)


def processor(**changes):
    """Return a function that changes the preprocessing settings in a checkpoint of transformers."""
    return lambda: edited("hf/preprocessor_config.json", **changes)


# Each case has a function that prepares a checkpoint, the source to convert, and a part of the message.
REFUSED = [
    # Cases of weights that do not fit their model.
    (lambda: weights(visual__proj=torch.zeros(3, 3)), "w.pt", "visual.proj is (3, 3), the model has (64, 24)"),
    (lambda: weights(text_projection=None), "w.pt", "w.pt does not fit the model: missing text_projection"),
    (lambda: weights(logit_bias=torch.zeros([])), "w.pt", "w.pt does not fit the model: unexpected logit_bias"),
    (lambda: weights(visual__proj=torch.zeros(64, 24).int()), "w.pt", "holds torch.int32, the model has torch.float32"),
    (None, "named.pt --model small.json", "; it has the shapes of ViT-T-8-32 or ViT-T-8-32-quickgelu"),
    (
        None,
        "siglip.pt --model ViT-T-8-32 --activation gelu",
        "it holds a SigLIP model, and the model is a CLIP",
    ),
    (None, "own.pt --model ViT-B-16-SigLIP", "it holds a CLIP model, and the model is a SigLIP model: choose the"),
    # Cases of settings that weights do not determine, such as the activation.
    (None, "named.pt", "or name the model with --model (ViT-T-8-32 or ViT-T-8-32-quickgelu)"),
    (lambda: torch.save(torch.load("own.pt")["state_dict"], "w.pt"), "w.pt", "no model that clipfast knows has its"),
    (lambda: torch.save({"layer.weight": torch.zeros(2, 2)}, "w.pt"), "w.pt", "it has no 'visual.conv1.weight'"),
    (None, "quick --model small.json", "but --model small.json uses GELU: name a model with QuickGELU, or add"),
    (None, "own.pt --activation gelu_tanh", "a CLIP model has gelu or quick_gelu, but --activation is gelu_tanh"),
    (None, "own.pt --activation relu", "or gelu_tanh,gelu or gelu_tanh; got 'relu'"),
    (None, "own.pt --model larger.json", "image size is 64: add --image-size 64 to resize them, or --image-size 32"),
    (None, "own.pt --model longer.json", "the model's context length is 20: add --context-length 20"),
    (None, "own.pt --model heads.json", "2 attention heads for images, but the model has 4: leave --model out"),
    (None, "rn.pt --image-size 80", "--image-size must be a multiple of the stride of a ResNet, 32, got 80"),
    (None, "own.pt --image-size 36", "--image-size must be a multiple of the patch size 8, got 36"),
    (None, "siglip.pt --image-size 7", "--image-size must be at least one patch, 8, got 7"),
    # Cases of files that are damaged or missing.
    (lambda: Path("w.pt").write_bytes(Path("own.pt").read_bytes()[:-5000]), "w.pt", "it is cut off, damaged"),
    (flipped, "w.pt", "in it is wrong; copy or download it again"),
    (lambda: Path("w.pt").write_bytes(pickle.dumps(Payload(Path("owned")))), "w.pt", "w.pt is refused: it is damaged"),
    (lambda: torch.save({"x": Payload(Path("owned"))}, "w.pt"), "w.pt", "w.pt is refused: it is damaged, or holds"),
    (lambda: os.truncate("hf/model.safetensors", 5000), "hf", "model.safetensors is not a checkpoint that can be read"),
    (lambda: Path("hf/config.json").unlink(), "hf", "hf holds weights of transformers without config.json"),
    (lambda: Path("hf/config.json").write_text("{"), "hf", "config.json cannot be read: Expecting property name"),
    (lambda: Path("hf/model.safetensors").unlink(), "hf", "hf holds no weights: neither model.safetensors, nor"),
    (lambda: without_safetensors({"x": "../own.pt"}), "hf", "index.json names no files of weights in its folder"),
    (None, "hf/model.safetensors", "holds the weights of a transformers model without its configuration: give the"),
    (lambda: Path("folder/open_clip_config.json").unlink(), "folder", "give the file of the weights, and the model's"),
    (
        lambda: shutil.copy("quick/open_clip_config.json", "folder"),
        "folder",
        "was trained with GELU: correct quick_",
    ),
    (lambda: Path("w.pt").mkdir(), "w.pt", "w.pt is an empty folder: there is no checkpoint in it"),
    (lambda: (Path("w").mkdir(), Path("w/own.pt").touch()), "w", "w is no checkpoint: there is neither open_clip_conf"),
    (None, "nowhere.pt", "there is no file or folder nowhere.pt"),
    (None, "RN50:laion", "there is no file or folder RN50:laion; RN50 has the tags openai, yfcc15m, cc12m"),
    # Cases of settings of transformers.
    (
        lambda: edited("hf/config.json", model_type="blip", architectures=["Blip"]),
        "hf",
        "describes Blip; of",
    ),
    (lambda: edited("siglip/config.json", model_type="siglip2"), "siglip", "whose images keep their shapes (NaFlex)"),
    (tower("text", hidden_act="gelu_new"), "hf", "hidden_act must be one of quick_gelu, gelu, got 'gelu_new'"),
    (tower("text", hidden_act="quick_gelu"), "hf", "got quick_gelu for texts and gelu for images"),
    (tower("vision", layer_norm_eps=1e-6), "hf", "layer_norm_eps must be 1e-05, got 1e-06"),
    (tower("text", eos_token_id=7), "hf", "must be the last of the 600 tokens, where a text is read, got 7"),
    (tower("vision", num_attention_heads=3), "hf", "must be a multiple of num_attention_heads, got 64 and 3"),
    (tower("vision", "siglip", vision_use_head=False), "siglip", "vision_use_head must be true"),
    (processor(do_normalize=False), "hf", "json has do_normalize false, but CLIP's images are resized, scaled"),
    (processor(do_center_crop=False), "hf", "in a way that OpenCLIP's configuration cannot express"),
    (processor(size={"shortest_edge": 36}), "hf", "images of 32 pixels: size {'shortest_edge': 36}"),
    (processor(resample=1), "hf", "hf preprocesses images with interpolation 'lanczos', clipfast only with 'bicubic'"),
    # Cases of layouts that cannot hold a model.
    (None, "rn.pt --to hf", "has no ResNets, only vision transformers: convert it --to open_clip"),
    (None, "bare.pt --to hf", "texts in the end, and this model does not: convert it --to open_clip or"),
    (
        lambda: edited("folder/open_clip_config.json", "preprocess_cfg", resize_mode="longest"),
        "folder --to hf",
        "processor of CLIP cannot resize with resize_mode 'longest' and interpolation",
    ),
    # Cases of destinations that cannot be written.
    (None, "own.pt --to timm", "--to must be one of open_clip, hf, clipfast, got 'timm'"),
    (None, "own.pt own.bin", "with --to clipfast the destination is a file whose name ends in .pt, got own.bin"),
    (None, "own.pt own.pt", "own.pt exists already: "),
    (None, "own.pt hf --to open_clip", "hf exists already: "),
    (None, "own.pt a/b.pt", "no folder a to write b.pt in"),
]


@pytest.mark.parametrize(("prepare", "command", "message"), REFUSED)
def test_message(prepare, command, message, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "copy"))
    if prepare is not None:
        prepare()
    source, *rest = command.split()
    if not rest or rest[0].startswith("--"):
        rest.insert(0, "out" if "--to" in rest else "out.pt")
    if "--to" not in rest:
        rest += ["--to", "clipfast"]
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code, out, error = run_command(capsys, "convert", source, *rest)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(("to", "name"), [("open_clip", "out"), ("hf", "out"), ("clipfast", "out.pt")])
def test_a_failure_while_writing_leaves_nothing(to, name, own, tmp_path, monkeypatch):
    def fail(path, *args, **kwargs):
        """Fail in the middle of the write of a checkpoint."""
        path.write_bytes(b"half of")
        raise OSError("the cable came off")

    monkeypatch.setattr(open_clip_folder, "replace_text", fail)
    monkeypatch.setattr(hugging_face, "replace_text", fail)
    if to == "clipfast":
        monkeypatch.setattr(torch, "save", lambda content, path: fail(path))
    with pytest.raises(OSError, match="the cable came off"):
        convert_checkpoint(own, tmp_path / name, to)
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


def test_a_killed_writer_is_in_nobodys_way_and_a_folder_that_appears_meanwhile_stays(own, tmp_path):
    (tmp_path / ".out.tmp" / "junk").mkdir(parents=True)
    convert_checkpoint(own, tmp_path / "out", "open_clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own.pt"]
    assert not (tmp_path / "out" / "junk").exists()
    with pytest.raises(FileExistsError):
        files.write_folder(tmp_path / "new", lambda folder: (tmp_path / "new").mkdir())
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("raw", [[], {"embed_dim": 4, "vision_cfg": 3, "text_cfg": {}}])
def test_a_configuration_of_something_else_in_a_checkpoint(raw, vit, tmp_path):
    torch.save({"state_dict": vit.state_dict(), "clipfast": {"model_config": raw}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"the model configuration in .*w.pt cannot be read"):
        convert_checkpoint(tmp_path / "w.pt", tmp_path / "out.pt", "clipfast")
