"""Wrong input is refused with a message that says what to do, and leaves nothing behind."""

import json
import pickle

import pytest
import torch

from clipfast import CheckpointError, checkpoint, convert, export_open_clip, files
from clipfast.conversion import hugging_face
from clipfast.models import get_model_config

from .conftest import CONFIGS, make_model, quick, save_config, save_own
from .wrong_input import OUT, Payload, assert_refused, changed, edited


def another_width(vit, hf, root):
    changed(vit, root / "w.pt", visual__proj=torch.zeros(3, 3))
    return ["w.pt"], "w.pt does not fit the model: visual.proj is (3, 3), the model has (64, 24)"


def another_model(vit, hf, root):
    return ["own.pt", "--model", "ViT-T-8-32"], (
        "own.pt (taken for ViT-T-8-32) does not fit the model: missing visual.transformer.resblocks.2.ln_1.weight; "
        "missing visual.transformer.resblocks.2.ln_1.bias; "
        "missing visual.transformer.resblocks.2.attn.in_proj_weight; "
        "missing visual.transformer.resblocks.2.attn.in_proj_bias; "
        "missing visual.transformer.resblocks.2.attn.out_proj.weight; …; "
        "the checkpoint says which model it holds: leave --model out"
    )


def another_model_of_known_shapes(vit, hf, root):
    torch.save(make_model(get_model_config("ViT-T-8-32")).state_dict(), root / "w.pt")
    save_config(vit.config, root / "small.json")
    return ["w.pt", "--model", "small.json"], "; it has the shapes of ViT-T-8-32 or ViT-T-8-32-quickgelu\n"


def missing_tensor(vit, hf, root):
    changed(vit, root / "w.pt", text_projection=None)
    return ["w.pt"], "w.pt does not fit the model: missing text_projection"


def extra_tensor(vit, hf, root):
    changed(vit, root / "w.pt", logit_bias=torch.zeros([]))
    return ["w.pt"], "w.pt does not fit the model: unexpected logit_bias"


def wrong_dtype(vit, hf, root):
    changed(vit, root / "w.pt", visual__proj=torch.zeros(64, 24, dtype=torch.int32))
    return ["w.pt"], "w.pt does not fit the model: visual.proj holds int32, the model has float32"


def wrong_activation(vit, hf, root):
    export_open_clip(make_model(quick(vit.config)), root / "folder")
    save_config(vit.config, root / "small.json")
    return ["folder", "--model", "small.json"], (
        "folder was trained with QuickGELU, but --model small.json uses GELU: name a model with QuickGELU, or add "
        "--activation gelu if the checkpoint is wrong"
    )


def wrong_activation_of_a_named_model(vit, hf, root):
    export_open_clip(make_model(get_model_config("ViT-T-8-32-quickgelu")), root / "folder")
    return ["folder", "--model", "ViT-T-8-32"], (
        "folder was trained with QuickGELU, but --model ViT-T-8-32 uses GELU: take --model ViT-T-8-32-quickgelu, or "
        "add --activation gelu if the checkpoint is wrong"
    )


def unknown_activation(vit, hf, root):
    torch.save(make_model(get_model_config("ViT-T-8-32")).state_dict(), root / "w.pt")
    return ["w.pt"], (
        "w.pt does not say whether the model has GELU or QuickGELU, and weights do not show it: add --activation gelu "
        "or --activation quick_gelu, or name the model with --model (ViT-T-8-32 or ViT-T-8-32-quickgelu)"
    )


def unknown_sizes(vit, hf, root):
    torch.save(vit.state_dict(), root / "w.pt")
    return ["w.pt"], (
        "w.pt does not say which model it holds, and no model that clipfast knows has its shapes: name its "
        "configuration with --model"
    )


def other_image_size(vit, hf, root):
    save_config(vit.config.with_vision(image_size=64), root / "larger.json")
    return ["own.pt", "--model", "larger.json"], (
        "own.pt (taken for larger.json) has positions for image size 32, but the model's image size is 64: add "
        "--image-size 64 to resize them, or --image-size 32 to keep them"
    )


def other_context_length(vit, hf, root):
    raw = vit.config.to_dict()
    raw["text_cfg"]["context_length"] = 20
    (root / "longer.json").write_text(json.dumps(raw))
    return ["own.pt", "--model", "longer.json"], (
        "has positions for context length 16, but the model's context length is 20: add --context-length 20"
    )


def other_heads(vit, hf, root):
    save_config(vit.config.with_vision(head_width=16), root / "heads.json")
    return ["own.pt", "--model", "heads.json"], (
        "own.pt (taken for heads.json) has 2 attention heads for images, but the model has 4: leave --model out"
    )


def indivisible_image_size(vit, hf, root):
    return ["own.pt", "--image-size", "36"], "--image-size must be a multiple of the patch size 8, got 36"


def uneven_resnet(vit, hf, root):
    save_own(make_model(CONFIGS["ResNet"]), root / "rn.pt")
    return ["rn.pt", "--image-size", "80"], "--image-size must be a multiple of the stride of a ResNet, 32, got 80"


def truncated_pickle(vit, hf, root):
    (root / "w.pt").write_bytes((root / "own.pt").read_bytes()[:-5000])
    return ["w.pt"], (
        "w.pt is not a checkpoint that can be read: it is cut off, damaged or of another kind (RuntimeError: "
        "PytorchStreamReader failed reading zip archive: failed finding central directory); copy or download it again\n"
    )


def text_file(vit, hf, root):
    (root / "w.pt").write_text("hello")
    return ["w.pt"], "it is cut off, damaged or of another kind (KeyError: 101); copy or download it again\n"


def folder_with_the_name_of_a_file(vit, hf, root):
    (root / "w.safetensors").mkdir()
    return ["w.safetensors"], "w.safetensors is an empty folder: there is no checkpoint in it"


def flipped_bit(vit, hf, root):
    content = bytearray((root / "own.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (root / "w.pt").write_bytes(content)
    return ["w.pt"], "in it is wrong; copy or download it again\n"


def pickle_with_code(vit, hf, root):
    (root / "evil.pt").write_bytes(pickle.dumps(Payload(root / "owned")))
    return ["evil.pt"], "evil.pt is refused: it is damaged, or holds objects other than tensors and plain values"


def pickle_with_code_in_an_archive(vit, hf, root):
    torch.save({"state_dict": vit.state_dict(), "x": Payload(root / "owned")}, root / "evil.pt")
    return ["evil.pt"], "evil.pt is refused: it is damaged, or holds objects other than tensors and plain values"


def two_activations_in_a_folder(vit, hf, root):
    export_open_clip(vit, root / "folder")
    path = root / "folder" / "open_clip_config.json"
    edited(path, model_cfg=json.loads(path.read_text())["model_cfg"] | {"quick_gelu": True})
    return ["folder"], (
        "open_clip_config.json says QuickGELU, but open_clip_model.safetensors says that it was trained with GELU: "
        "correct quick_gelu in open_clip_config.json"
    )


def unreadable_config(vit, hf, root):
    export_open_clip(vit, root / "folder")
    (root / "folder" / "open_clip_config.json").write_text("{model_cfg}")
    return ["folder"], "open_clip_config.json is not a model configuration that can be read: Expecting property name"


def folder_without_config(vit, hf, root):
    export_open_clip(vit, root / "folder")
    (root / "folder" / "open_clip_config.json").unlink()
    return ["folder"], "folder holds weights of OpenCLIP without open_clip_config.json: give the file of the weights"


def empty_folder(vit, hf, root):
    (root / "empty").mkdir()
    return ["empty"], "empty is an empty folder: there is no checkpoint in it"


def folder_of_something_else(vit, hf, root):
    (root / "folder").mkdir()
    (root / "folder" / "own.pt").touch()
    return ["folder"], "folder is no checkpoint: there is neither open_clip_config.json (OpenCLIP) nor config.json"


def distributed_checkpoint(vit, hf, root):
    (root / "folder").mkdir()
    (root / "folder" / ".metadata").touch()
    return ["folder"], "folder/.metadata is refused: it is damaged, or is no list of torch.distributed.checkpoint"


def no_such_file(vit, hf, root):
    return ["nowhere.pt"], "there is no file or folder nowhere.pt\n"


def no_such_tag(vit, hf, root):
    return ["RN50:laion"], "there is no file or folder RN50:laion; RN50 has the tags openai, yfcc15m, cc12m\n"


def something_else(vit, hf, root):
    torch.save({"layer.weight": torch.zeros(2, 2)}, root / "w.pt")
    return ["w.pt"], "w.pt holds no CLIP model that clipfast can build: it has no 'visual.conv1.weight'"


def unknown_layout(vit, hf, root):
    return ["own.pt", "--to", "timm"], "--to must be one of open_clip, hf, clipfast, got 'timm'"


def unknown_model(vit, hf, root):
    return ["own.pt", "--model", "ViT-Z"], "unknown model 'ViT-Z'"


def wrong_ending(vit, hf, root):
    return ["own.pt", "own.bin"], "with --to clipfast the destination is a file whose name ends in .pt, got own.bin"


def destination_exists(vit, hf, root):
    return ["own.pt", "own.pt"], "own.pt exists already: "


def folder_exists(vit, hf, root):
    return ["own.pt", "hf", "--to", "open_clip"], "hf exists already: "


def no_folder_to_write_in(vit, hf, root):
    return ["own.pt", "a/b.pt"], "no folder a to write b.pt in"


WRONG = [
    another_width, another_model, another_model_of_known_shapes, text_file, folder_with_the_name_of_a_file,
    no_such_tag, missing_tensor, extra_tensor, wrong_dtype, wrong_activation, wrong_activation_of_a_named_model,
    unknown_activation, unknown_sizes, other_image_size, other_context_length, other_heads, indivisible_image_size,
    uneven_resnet, truncated_pickle, flipped_bit, pickle_with_code, pickle_with_code_in_an_archive,
    two_activations_in_a_folder, unreadable_config, folder_without_config, empty_folder, folder_of_something_else,
    distributed_checkpoint, no_such_file, something_else, unknown_layout, unknown_model, wrong_ending,
    destination_exists, folder_exists, no_folder_to_write_in,
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case.__name__ for case in WRONG])
def test_message(case, vit, own, hf_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, *case(vit, hf_folder, tmp_path))


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
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "junk").touch()
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
