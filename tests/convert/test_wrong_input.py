"""Wrong input is refused with a message that says what to do, and leaves nothing behind."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from clipfast import CheckpointError, checkpoint, convert, export_open_clip, files
from clipfast.conversion import hugging_face
from clipfast.models import get_model_config

from .conftest import CONFIGS, make_model, quick, save_config, save_own
from .wrong_input import OUT, Payload, Refusals, assert_refused, changed, edited

refused = Refusals()


@refused("w.pt", "w.pt does not fit the model: visual.proj is (3, 3), the model has (64, 24)")
def another_width(vit, hf):
    changed(vit, "w.pt", visual__proj=torch.zeros(3, 3))


@refused("w.pt --model small.json", "; it has the shapes of ViT-T-8-32 or ViT-T-8-32-quickgelu")
def another_model_of_known_shapes(vit, hf):
    torch.save(make_model(get_model_config("ViT-T-8-32")).state_dict(), "w.pt")
    save_config(vit.config, Path("small.json"))


@refused("w.pt", "w.pt does not fit the model: missing text_projection")
def missing_tensor(vit, hf):
    changed(vit, "w.pt", text_projection=None)


@refused("w.pt", "w.pt does not fit the model: unexpected logit_bias")
def extra_tensor(vit, hf):
    changed(vit, "w.pt", logit_bias=torch.zeros([]))


@refused("w.pt", "w.pt does not fit the model: visual.proj holds int32, the model has float32")
def wrong_dtype(vit, hf):
    changed(vit, "w.pt", visual__proj=torch.zeros(64, 24, dtype=torch.int32))


@refused(
    "folder --model small.json",
    "folder was trained with QuickGELU, but --model small.json uses GELU: name a model with QuickGELU, or add",
)
def wrong_activation(vit, hf):
    export_open_clip(make_model(quick(vit.config)), "folder")
    save_config(vit.config, Path("small.json"))


@refused("folder --model ViT-T-8-32", "take --model ViT-T-8-32-quickgelu, or add --activation gelu if")
def wrong_activation_of_a_named_model(vit, hf):
    export_open_clip(make_model(get_model_config("ViT-T-8-32-quickgelu")), "folder")


@refused("w.pt", "or name the model with --model (ViT-T-8-32 or ViT-T-8-32-quickgelu)")
def unknown_activation(vit, hf):
    torch.save(make_model(get_model_config("ViT-T-8-32")).state_dict(), "w.pt")


@refused("w.pt", "no model that clipfast knows has its shapes: name its configuration with --model")
def unknown_sizes(vit, hf):
    torch.save(vit.state_dict(), "w.pt")


@refused(
    "own.pt --model larger.json",
    "image size is 64: add --image-size 64 to resize them, or --image-size 32 to keep them",
)
def other_image_size(vit, hf):
    save_config(vit.config.with_vision(image_size=64), Path("larger.json"))


@refused(
    "own.pt --model longer.json",
    "context length 16, but the model's context length is 20: add --context-length 20",
)
def other_context_length(vit, hf):
    raw = vit.config.to_dict()
    raw["text_cfg"]["context_length"] = 20
    Path("longer.json").write_text(json.dumps(raw))


@refused("own.pt --model heads.json", "2 attention heads for images, but the model has 4: leave --model out")
def other_heads(vit, hf):
    save_config(vit.config.with_vision(head_width=16), Path("heads.json"))


@refused("rn.pt --image-size 80", "--image-size must be a multiple of the stride of a ResNet, 32, got 80")
def uneven_resnet(vit, hf):
    save_own(make_model(CONFIGS["ResNet"]), "rn.pt")


@refused("w.pt", "w.pt is not a checkpoint that can be read: it is cut off, damaged")
def truncated_pickle(vit, hf):
    Path("w.pt").write_bytes(Path("own.pt").read_bytes()[:-5000])


@refused("w.pt", "copy or download it again")
def text_file(vit, hf):
    Path("w.pt").write_text("hello")


@refused("w.safetensors", "w.safetensors is an empty folder: there is no checkpoint in it")
def folder_with_the_name_of_a_file(vit, hf):
    Path("w.safetensors").mkdir()


@refused("w.pt", "in it is wrong; copy or download it again")
def flipped_bit(vit, hf):
    content = bytearray(Path("own.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("w.pt").write_bytes(content)


@refused("evil.pt", "evil.pt is refused: it is damaged, or holds objects other than tensors and plain values")
def pickle_with_code(vit, hf):
    Path("evil.pt").write_bytes(pickle.dumps(Payload(Path("owned"))))


@refused("evil.pt", "evil.pt is refused: it is damaged, or holds objects other than tensors and plain values")
def pickle_with_code_in_an_archive(vit, hf):
    torch.save({"state_dict": vit.state_dict(), "x": Payload(Path("owned"))}, "evil.pt")


@refused("folder", "was trained with GELU: correct quick_gelu in open_clip_config.json")
def two_activations_in_a_folder(vit, hf):
    export_open_clip(vit, "folder")
    path = Path("folder/open_clip_config.json")
    edited(path, model_cfg=json.loads(path.read_text())["model_cfg"] | {"quick_gelu": True})


@refused("folder", "open_clip_config.json is not a model configuration that can be read: Expecting property name")
def unreadable_config(vit, hf):
    export_open_clip(vit, "folder")
    Path("folder/open_clip_config.json").write_text("{model_cfg}")


@refused("folder", "folder holds weights of OpenCLIP without open_clip_config.json: give the file of the weights")
def folder_without_config(vit, hf):
    export_open_clip(vit, "folder")
    Path("folder/open_clip_config.json").unlink()


@refused("folder", "folder is no checkpoint: there is neither open_clip_config.json (OpenCLIP) nor config.json")
def folder_of_something_else(vit, hf):
    Path("folder").mkdir()
    Path("folder/own.pt").touch()


@refused("folder", "folder/.metadata is refused: it is damaged, or is no list of torch.distributed.checkpoint")
def distributed_checkpoint(vit, hf):
    Path("folder").mkdir()
    Path("folder/.metadata").touch()


@refused("w.pt", "w.pt holds no CLIP model that clipfast can build: it has no 'visual.conv1.weight'")
def something_else(vit, hf):
    torch.save({"layer.weight": torch.zeros(2, 2)}, "w.pt")


refused.extend(
    (None, command, message)
    for command, message in {
        "own.pt --model ViT-T-8-32": "missing visual.transformer.resblocks.2.ln_1.weight",
        "own.pt --image-size 36": "--image-size must be a multiple of the patch size 8, got 36",
        "nowhere.pt": "there is no file or folder nowhere.pt",
        "RN50:laion": "there is no file or folder RN50:laion; RN50 has the tags openai, yfcc15m, cc12m",
        "own.pt --to timm": "--to must be one of open_clip, hf, clipfast, got 'timm'",
        "own.pt --model ViT-Z": "unknown model 'ViT-Z'",
        "own.pt own.bin": "with --to clipfast the destination is a file whose name ends in .pt, got own.bin",
        "own.pt own.pt": "own.pt exists already: ",
        "own.pt hf --to open_clip": "hf exists already: ",
        "own.pt a/b.pt": "no folder a to write b.pt in",
    }.items()
)


@pytest.mark.parametrize(("prepare", "command", "message"), refused)
def test_message(prepare, command, message, vit, own, hf_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(vit, hf_folder)
    assert_refused(capsys, command, message)


@pytest.mark.parametrize("to", OUT)
def test_a_failure_while_writing_leaves_nothing(to, own, tmp_path, monkeypatch):
    def fail(path, *args, **kwargs):
        path.write_bytes(b"half of")
        raise OSError("the cable came off")

    monkeypatch.setattr(checkpoint, "replace_text", fail)
    monkeypatch.setattr(hugging_face, "replace_text", fail)
    if to == "clipfast":
        monkeypatch.setattr(torch, "save", lambda content, path: fail(path))
    with pytest.raises(OSError, match="the cable came off"):
        convert(own, tmp_path / OUT[to], to)
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


def test_a_killed_writer_is_in_nobodys_way(own, tmp_path):
    junk = tmp_path / ".out.tmp" / "junk"
    junk.mkdir(parents=True)
    convert(own, tmp_path / "out", "open_clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own.pt"]
    assert not (tmp_path / "out" / "junk").exists()


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    def write(folder):
        (folder / "new").touch()
        (tmp_path / "out").mkdir()

    with pytest.raises(FileExistsError):
        files.write_folder(tmp_path / "out", write)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("raw", [[], {"embed_dim": 4}, {"embed_dim": 4, "vision_cfg": 3, "text_cfg": {}}, "text"])
def test_a_configuration_of_something_else_in_a_checkpoint(raw, vit, tmp_path):
    torch.save({"state_dict": vit.state_dict(), "clipfast": {"model_config": raw}}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"the model configuration in .*w.pt cannot be read"):
        convert(tmp_path / "w.pt", tmp_path / "out.pt", "clipfast")
