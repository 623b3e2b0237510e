"""``clipfast inspect-checkpoint``: the layout, model and numbers that it reports of a checkpoint."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from clipfast import convert_checkpoint, export_open_clip, inspect_checkpoint, list_models
from clipfast.models import CLIP, build, get_model_config
from clipfast.models.siglip_config import PUBLISHED

from ..small_runs import output_of
from .conftest import CONFIGS, make_model, same_bits, save_own


def parameters(model):
    """Return the number of parameters of the model that a checkpoint's inspection describes."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_layouts(kind):
    model = make_model(CONFIGS[kind])
    progress = {"step": 123, "seconds": 1.0}
    save_own(model, "own.pt", progress=progress)
    found = {"own.pt": "clipfast checkpoint of a training run"}
    for to, name, layout in (
        ("clipfast", "bare.pt", "clipfast checkpoint"),
        ("open_clip", "folder", "OpenCLIP folder (local-dir)"),
        ("hf", "hf", "transformers folder (CLIPModel)"),
    ):
        if kind != "ResNet" or to != "hf":
            convert_checkpoint("own.pt", name, to)
            found[name] = layout
    for name, layout in found.items():
        info = inspect_checkpoint(name)
        assert info.layout == layout
        assert info.parameters == parameters(model)
        assert info.activation == ("QuickGELU" if model.config.quick_gelu else "GELU")
        assert (info.image_size, info.context_length) == (model.visual.image_size, 16)
        assert (info.epoch, info.step) == ((2, 123) if name == "own.pt" else (None, None))
        (checksum,) = info.sha256.items()
        weights = Path(name if name.endswith(".pt") else f"{name}/{checksum[0]}")
        assert checksum == (weights.name, hashlib.sha256(weights.read_bytes()).hexdigest())
        assert info.file_bytes == weights.stat().st_size


def test_training_checkpoint_of_open_clip():
    model = make_model(get_model_config("ViT-T-8-32"))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    saved = {"epoch": 1, "name": "n", "state_dict": state, "optimizer": optimizer.state_dict()}
    saved["optimizer"]["state"][0] = {}
    saved["clipfast"] = {"progress": {"step": float("inf")}}
    torch.save(saved, "epoch_1.pt")
    info = inspect_checkpoint("epoch_1.pt")
    assert info.layout == "OpenCLIP checkpoint of a training run (names begin with module.)"
    assert info.models == ("ViT-T-8-32", "ViT-T-8-32-quickgelu")
    assert (info.activation, info.epoch, info.step) == (None, 1, 3)
    assert info.parameters == parameters(model)


def test_shapes_name_every_published_model(tmp_path):
    from clipfast.checkpoints.tensor_shapes import config_of_weights, models_of_shapes

    # Both models have equally many patches, and so equal shapes.
    twins = {"ViT-SO400M-14-SigLIP-378", "ViT-SO400M-14-SigLIP-384"}
    quick = {name for name in list_models() if f"{name}-quickgelu" in list_models()}
    for name in {*PUBLISHED, *quick}:
        expected = twins if name in twins else {name} | ({f"{name}-quickgelu"} if name in quick else set())
        assert set(models_of_shapes(get_model_config(name))) & {*PUBLISHED, *quick, *expected} == expected
    for name in ("RN101", "RN50x4", "ViT-B-32", "ViT-L-14-336", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-378"):
        with torch.device("meta"):
            state = build(get_model_config(name)).state_dict()
        assert name in models_of_shapes(config_of_weights(state, tmp_path))


def test_command(own, capsys, monkeypatch):
    monkeypatch.setattr(CLIP, "__init__", None)  # the command fails if it builds a model
    out, _ = output_of(capsys, "inspect-checkpoint", own, "--json", "info.json")
    info = json.loads(Path("info.json").read_text())
    shown = " ".join(out.split())
    for words in (f"{info['parameters']:,} (tensors: 62 float32)", "32 x 32, shortest side", info["sha256"]["own.pt"]):
        assert words in shown


def test_a_folder_with_both_configurations(hf_folder, vit):
    """In a checkpoint folder with two configurations, the one counts whose weights are in the folder."""
    raw = {"model_cfg": CONFIGS["ResNet"].to_dict()}
    (hf_folder / "open_clip_config.json").write_text(json.dumps(raw))
    assert inspect_checkpoint(hf_folder).layout == "transformers folder (CLIPModel)"
    assert same_bits(hf_folder, vit)
    resnet = make_model(CONFIGS["ResNet"])
    export_open_clip(resnet, hf_folder)
    assert inspect_checkpoint(hf_folder).layout == "OpenCLIP folder (local-dir)"
    assert same_bits(hf_folder, resnet)
