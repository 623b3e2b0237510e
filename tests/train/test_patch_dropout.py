"""Patch dropout of vision transformers: the number of kept patches, and their gradients."""

import copy
import json

import pytest
import torch

from clipfast import CLIP, create_model
from clipfast.models import CLIPConfig, TextConfig, VisionConfig, get_model_config
from clipfast.models.vision import draw_kept_patches
from clipfast.train import TrainConfig
from clipfast.train.build import bare_model

SMALL = CLIPConfig(
    16, VisionConfig(32, 2, 32, 16, patch_size=8, patch_dropout=0.5), TextConfig(width=32, heads=2, layers=1)
)


def tokens_seen(model, height=32, width=32):
    """Return the number of tokens that the blocks of the image tower see in a training step with patch dropout."""
    seen = []
    hook = model.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.encode_image(torch.zeros(2, 3, height, width)).sum().backward()
    hook.remove()
    return seen.pop()


# the kept number of 16 patches is rounded down, as in OpenCLIP, but is at least one
KEPT = {0.0: 16, 0.01: 15, 0.25: 12, 0.3: 11, 0.5: 8, 0.55: 7, 0.9: 1, 0.999: 1}


@pytest.mark.parametrize(("share", "kept"), KEPT.items())
def test_as_many_patches_as_in_open_clip(share, kept):
    theirs = pytest.importorskip("open_clip.transformer").PatchDropout(share).train()
    assert theirs(torch.zeros(1, 17, 4)).shape[1] == 1 + kept
    model = create_model("ViT-T-8-32", force_patch_dropout=share)
    assert tokens_seen(model.train()) == 1 + kept
    assert tokens_seen(model.eval()) == 17


def test_each_image_and_each_time_has_others():
    kept = [draw_kept_patches(64, (4, 4), 0.5, torch.device("cpu")) for _ in range(2)]
    assert kept[0].shape == (64, 8)
    assert len({tuple(sorted(row.tolist())) for row in torch.cat(kept)}) > 100
    # every patch is kept equally often
    counts = torch.cat(kept).flatten().bincount(minlength=16)
    assert counts.min() > 40
    assert counts.max() < 90


@pytest.mark.parametrize(("uint8", "checkpointing"), [(True, False), (False, True)])
def test_gradients_are_of_all_embedded_and_some_gathered(uint8, checkpointing):
    model = CLIP(SMALL).double()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    images = images if uint8 else images.double() / 255
    truth = copy.deepcopy(model)
    truth.set_backend("torch")  # PyTorch's backend embeds all patches before it drops some
    for each in (model, truth):
        torch.manual_seed(3)
        each.encode_image(images, normalize=True).square().mul(torch.arange(16)).sum().backward()
    for (name, ours), theirs in zip(model.visual.named_parameters(), truth.visual.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert ours.grad.any(), name


def test_config_of_open_clip():
    raw = SMALL.to_dict()
    assert raw["vision_cfg"]["patch_dropout"] == 0.5
    assert CLIPConfig.from_dict(json.loads(json.dumps(raw))) == SMALL
    # The config of a model without patch dropout has no patch_dropout, as in OpenCLIP's files.
    for plain in (get_model_config("ViT-B-32"), get_model_config("RN50-quickgelu")):
        assert "patch_dropout" not in plain.to_dict()["vision_cfg"]
        assert CLIPConfig.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    pytest.importorskip("open_clip").CLIP(**raw)


def test_resnets_have_no_patches():
    with pytest.raises(ValueError, match="patch_dropout is for vision transformers"):
        create_model("RN50", device="meta", force_patch_dropout=0.5)
    create_model("RN50", device="meta", force_patch_dropout=0.0)


@pytest.mark.parametrize(("forced", "expected"), [(None, 0.5), (0.75, 0.75), (0.0, 0.0)])
def test_the_dropout_of_a_checkpoint_is_kept_unless_another_is_forced(forced, expected):
    options = TrainConfig("x.tar", force_patch_dropout=forced)
    model = bare_model(options, {"model_config": SMALL.to_dict()}, torch.device("cpu"))
    assert model.visual.patch_dropout == model.config.vision.patch_dropout == expected
    assert tokens_seen(model.train()) == 1 + 16 * (1 - expected)
