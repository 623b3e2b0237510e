"""TorchScript archives like OpenAI's checkpoints: read only if the user trusts them, since they are code."""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from clipfast import CheckpointError, convert_checkpoint, create_model, inspect_checkpoint
from clipfast.models import CLIPConfig, TextConfig, VisionConfig

from .conftest import make_model, same_bits

CONFIG = CLIPConfig(24, VisionConfig(32, 2, 128, patch_size=8), TextConfig(16, 600, 64, 1, 2), quick_gelu=True)


class Published(nn.Module):
    """A module like those in OpenAI's archives: weights under CLIP's names, and a few numbers beside them."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *folders, last = name.split(".")
            module = self
            for folder in folders:
                if not hasattr(module, folder):
                    module.add_module(folder, nn.Module())
                module = getattr(module, folder)
            module.register_buffer(last, value.clone())
        for name, number in {"input_resolution": 32, "context_length": 16, "vocab_size": 600}.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x):
        """Use a parameter, so that the traced archive of the checkpoint holds it."""
        return x + self.logit_scale


@pytest.fixture
def published():
    """Write a TorchScript archive like OpenAI's checkpoints; return the model and the name of the file."""
    model = make_model(CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Published(model.state_dict()), torch.zeros(1)).save("ViT.pt")
    return model, "ViT.pt"


def test_without_trust_it_is_not_loaded(published, tmp_path, monkeypatch):
    _, path = published
    monkeypatch.setattr(torch.jit, "load", None)
    for act in (lambda: inspect_checkpoint(path), lambda: convert_checkpoint(path, "out", "open_clip")):
        with pytest.raises(CheckpointError, match=r"ViT.pt is a TorchScript archive, .* it is code, .* add --trust"):
            act()
    assert [entry.name for entry in tmp_path.iterdir()] == ["ViT.pt"]


def test_with_trust(published):
    model, path = published
    info = inspect_checkpoint(path, trust=True)
    assert (info.layout, info.activation) == ("OpenAI's TorchScript archive", "QuickGELU")
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    convert_checkpoint(path, "own.pt", "clipfast", trust=True)
    own = create_model("own.pt")
    assert own.config == CONFIG
    assert same_bits(own, model)


def test_a_broken_archive(published):
    _, path = published
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile("broken.pt", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, b"def forward(" if name.endswith(".py") else whole.read(name))
    with pytest.raises(CheckpointError, match=r"broken.pt is a TorchScript archive that cannot be loaded: "):
        convert_checkpoint("broken.pt", "out", "open_clip", trust=True)
    assert not Path("out").exists()
