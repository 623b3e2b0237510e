"""Small models whose every tensor is random, and their checkpoints in each layout."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipfast import CLIP, convert_checkpoint, create_model
from clipfast.models import CLIPConfig, SigLIPConfig, TextConfig, VisionConfig

from ..models import siglip
from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401

TEXT = TextConfig(16, 600, 32, 2, 2)
CONFIGS = {
    "ViT": CLIPConfig(24, VisionConfig(32, 2, 64, 32, patch_size=8), TEXT),
    "QuickGELU": CLIPConfig(24, VisionConfig(32, 2, 64, 16, 2.5, patch_size=8), TEXT, quick_gelu=True),
    "ResNet": CLIPConfig(24, VisionConfig(64, (1, 2, 1, 1), 8, patch_size=None), TEXT),
}
VITS = ["ViT", "QuickGELU"]
TOLERANCE = {"rtol": 0, "atol": 1e-6}
PICTURE = Image.radial_gradient("L").resize((70, 50)).convert("RGB")


def make_model(config: CLIPConfig) -> CLIP:
    """Return a model to write as checkpoints, in evaluation mode; its biases, norms and statistics are random, too."""
    model = CLIP(config).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim < 2:
            value.add_(torch.rand_like(value) * 0.2)
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
    return model


def save_own(model: CLIP, path: str | Path, **more: object) -> str | Path:
    """Write a clipfast checkpoint with the model's configuration, and return its path."""
    own = {"model_config": model.config.to_dict(), **more}
    torch.save({"epoch": 2, "name": "run", "state_dict": model.state_dict(), "clipfast": own}, path)
    return path


def save_config(config: CLIPConfig, path: str | Path) -> str | Path:
    """Write the configuration of a checkpoint's model as a JSON file of OpenCLIP, and return its path."""
    Path(path).write_text(json.dumps(config.to_dict()))
    return path


Source = CLIP | str | Path | dict[str, torch.Tensor]


def weights_of(source: Source) -> dict[str, torch.Tensor]:
    """Return the weights of a model or of the checkpoint at a path; a dict of weights is returned as it is."""
    if isinstance(source, str | Path):
        source = create_model(f"local-dir:{source}" if Path(source).is_dir() else str(source))
    return source if isinstance(source, dict) else source.state_dict()


def same_bits(one: Source, two: Source) -> bool:
    """Return whether two models or checkpoints have the same tensors by name, shape, dtype and content."""
    state, other = weights_of(one), weights_of(two)
    return state.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in state.items()
    )


def inputs(config: CLIPConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised images, and texts of different lengths, for models that were read from checkpoints."""
    images = torch.randn(3, 3, config.vision.image_size, config.vision.image_size)
    texts = torch.randint(1, config.text.vocab_size - 2, (3, config.text.context_length))
    for row, end in enumerate((3, 9, config.text.context_length - 1)):
        texts[row, end:] = 0
        texts[row, end] = config.text.vocab_size - 1
    return images, texts


def inputs_of(config: CLIPConfig) -> tuple[torch.Tensor, ...]:
    """Return inputs, equal in each call, for a model of this configuration and the model of its checkpoint."""
    torch.manual_seed(1)
    return (siglip.inputs if isinstance(config, SigLIPConfig) else inputs)(config)


@torch.no_grad()
def features(model: torch.nn.Module, config: CLIPConfig) -> tuple[torch.Tensor, ...]:
    """Return all outputs for pairs of a model that was read from a checkpoint of clipfast or OpenCLIP."""
    return tuple(model.eval()(*inputs_of(config)))


def assert_same(one: torch.nn.Module, other: torch.nn.Module, config: CLIPConfig) -> None:
    """Check that two models that were read from checkpoints have equal weights and outputs."""
    assert same_bits(one, other)
    torch.testing.assert_close(features(one, config), features(other, config), **TOLERANCE)


@torch.no_grad()
def hugging_face_features(folder: Path | str, config: CLIPConfig) -> tuple[torch.Tensor, ...]:
    """Return the outputs of transformers' model that is loaded from a converted checkpoint."""
    transformers, is_siglip = pytest.importorskip("transformers"), isinstance(config, SigLIPConfig)
    model = (transformers.SiglipModel if is_siglip else transformers.CLIPModel).from_pretrained(folder).eval()
    images, texts = inputs_of(config)
    output = model(input_ids=texts, pixel_values=images)
    bias = (model.logit_bias[0],) if is_siglip else ()
    return output.image_embeds, output.text_embeds, model.logit_scale.exp().view([]), *bias


@pytest.fixture(autouse=True)
def safetensors() -> None:
    """Skip a test of checkpoints if safetensors is not installed."""
    pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """Run each checkpoint test in its own folder, so that checkpoints have short names."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def vit() -> CLIP:
    """Return the ViT that the tests write as checkpoints of all layouts."""
    return make_model(CONFIGS["ViT"])


@pytest.fixture
def own(vit, tmp_path) -> Path:
    """Write the ViT as a clipfast checkpoint, own.pt, and return its path."""
    return save_own(vit, tmp_path / "own.pt")


@pytest.fixture
def hf_folder(own, tmp_path) -> Path:
    """Write the ViT as a checkpoint of transformers, the folder hf, and return its path."""
    convert_checkpoint(own, tmp_path / "hf", "hf")
    return tmp_path / "hf"


class Payload:
    """An object whose pickle makes a folder when it is loaded, as malicious code in a checkpoint could."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def quick(config: CLIPConfig) -> CLIPConfig:
    """Return a configuration of a checkpoint's model with QuickGELU in place of GELU."""
    return dataclasses.replace(config, quick_gelu=True)
