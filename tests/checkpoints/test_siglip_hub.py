"""SigLIP from the hub's cache, and OpenCLIP's entry points for it."""

from pathlib import Path

import pytest
import torch

from clipfast import (
    add_model_config,
    convert_checkpoint,
    create_model,
    create_model_and_transforms,
    export_open_clip,
    get_tokenizer,
)
from clipfast.checkpoints import pretrained
from clipfast.models import registry

from ..models.siglip import CONFIGS, inputs, known_to_timm, make_model, save_tokenizer
from .conftest import PICTURE, assert_same, same_bits, save_config
from .test_hub import cache, fill, offline

__all__ = ["cache", "offline"]  # fixtures of test_hub.py, used here too


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "bare"])
def test_a_repository(kind, cache):
    open_clip = pytest.importorskip("open_clip")
    config = CONFIGS[kind]
    export_open_clip(make_model(config), "made")
    save_tokenizer(Path("made"))
    fill(cache, "org/siglip", Path("made"))
    ours, _, preprocess = create_model_and_transforms("hf-hub:org/siglip", cache_dir=cache)
    with known_to_timm(config):
        theirs, _, their_preprocess = open_clip.create_model_and_transforms("hf-hub:org/siglip", cache_dir=str(cache))
    assert_same(ours, theirs, config)
    pair = inputs(config)
    torch.testing.assert_close(ours.get_logits(*pair), theirs.get_logits(*pair), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(preprocess(PICTURE), their_preprocess(PICTURE), rtol=1e-6, atol=1e-6)
    assert get_tokenizer("hf-hub:org/siglip", cache_dir=cache)(["a red cat"]).shape == (1, config.text.context_length)
    info = convert_checkpoint("org/siglip", "own.pt", "clipfast")
    assert (info.resize_mode, info.mean) == ("squash", (0.5, 0.5, 0.5))
    assert same_bits("own.pt", ours)


def test_locking_and_precision(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    export_open_clip(make_model(CONFIGS["exact"]), tmp_path)
    name = f"local-dir:{tmp_path}"
    with known_to_timm(CONFIGS["exact"]):
        theirs = open_clip.create_model(name, precision="bf16")
    ours = create_model(name, precision="bf16")
    dtypes = {key: value.dtype for key, value in theirs.state_dict().items()}
    assert {key: value.dtype for key, value in ours.state_dict().items()} == dtypes
    for model in (theirs, ours):
        model.lock_image_tower(1)
        model.lock_text_tower(unlocked_layers=1)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in theirs.named_parameters() if not parameter.requires_grad}


def test_a_tag_brings_its_tokenizer(cache, monkeypatch):
    """A tag of SigLIP loads the tokenizer from the repository of the weights, since clipfast ships none for SigLIP."""
    config = CONFIGS["exact"]
    add_model_config(save_config(config, "tiny-siglip.json"))
    try:
        entries = {"webli": pretrained._entry("org/siglip half squash")}
        monkeypatch.setattr(pretrained, "_table", lambda: {"tiny-siglip": entries})
        export_open_clip(make_model(config), "made")
        save_tokenizer(Path("made"))
        fill(cache, "org/siglip", Path("made"))
        for layout in ("hf", "open_clip"):
            convert_checkpoint("tiny-siglip:webli", layout, layout)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                assert Path(layout, name).read_bytes() == Path("made", name).read_bytes()
    finally:
        registry._CONFIGS.pop("tiny-siglip")
