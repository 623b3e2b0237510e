"""Locked towers in training: they stay bit-equal and have no optimizer state, with every option that changes a step."""

import json
from pathlib import Path

import pytest
import torch

from clipfast import create_model
from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.models import CLIPConfig, build
from clipfast.runs.folder import RunFolder
from clipfast.train.loop import train

from ..models.siglip import CONFIGS, save_tokenizer
from ..models.siglip import make_model as make_siglip
from ..small_runs import TINY
from .test_ema import RESNET, averages
from .test_training import config, losses, same, stopped_after

VIT = json.loads(Path(TINY).read_text())
BLOCKS = tuple(f"transformer.resblocks.{index}." for index in (0, 1))
PARTS = ("conv1", "class_", "positional", "ln_pre", *BLOCKS, "ln_post", "proj")
IMAGE = tuple(f"visual.{part}" for part in PARTS)
TEXT = ("token_embedding", "positional_embedding", *BLOCKS, "ln_final", "text_projection")


def run_from_weights(shards, folder, raw, **options):
    """Train locked towers from weights in a file; return these weights, the run, and its final weights."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = build(CLIPConfig.from_dict(raw))
    (folder / "small.json").write_text(json.dumps(raw))
    torch.save(model.state_dict(), folder / "start.pt")
    files = {"model": str(folder / "small.json"), "pretrained": str(folder / "start.pt")}
    run, _ = train(config(shards, folder, **({"workers": 0, "wd": 0.5, "epochs": 1} | files | options)))
    return model, run, read_checkpoint(run.latest)


@pytest.mark.parametrize(
    ("options", "locked"),
    [
        ({"lock_image": True, "grad_checkpointing": True, "force_patch_dropout": 0.5}, IMAGE),
        ({"lock_image": True, "selective_checkpointing": True, "opt": "muon"}, IMAGE),
        ({"lock_image": True, "lock_image_unlocked_groups": 2, "ema_decay": 0.9}, IMAGE[:5]),
        ({"lock_text": True, "micro_batch_size": 3, "grad_checkpointing": True, "image_layer_decay": 0.5}, TEXT),
        ({"lock_text": True, "lock_text_unlocked_layers": 1, "grad_clip_norm": 0.1}, TEXT[:-1]),
        ({"lock_image": True, "lock_text": True, "micro_batch_size": 3}, (*IMAGE, *TEXT)),
    ],
)  # fmt: skip
def test_a_locked_tower_stays_as_it_is(shards, tmp_path, options, locked):
    model, run, checkpoint = run_from_weights(shards, tmp_path, VIT, **options)
    before, after = model.state_dict(), checkpoint["state_dict"]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if not name.startswith(locked)}
    assert len(checkpoint["optimizer"]["state"]) == len(changed)
    assert all(torch.isfinite(torch.tensor(losses(run))))
    if "ema_decay" in options:
        assert {name for name, value in averages(run).items() if not torch.equal(value, before[name])} == changed


@pytest.mark.long
@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norm_of_a_locked_tower(shards, tmp_path, freeze):
    options = {
        "lock_image": True, "lock_image_unlocked_groups": 1, "lock_image_freeze_bn_stats": freeze, "ema_decay": 0.5,
        "micro_batch_size": 4,
    }  # fmt: skip
    model, whole, checkpoint = run_from_weights(shards, tmp_path / "whole", RESNET, **options)
    before, after = model.state_dict(), checkpoint["state_dict"]
    locked = {name for name in before if name.startswith("visual.") and "attnpool" not in name}
    statistics = {name for name in locked if "running_" in name}
    changed = {name for name in locked if name in after and not torch.equal(before[name], after[name])}
    assert {name for name in changed if not name.endswith("num_batches_tracked")} == (set() if freeze else statistics)
    assert {name for name in statistics if not torch.equal(before[name], averages(whole)[name])} == changed & statistics
    exported = create_model(f"local-dir:{whole.path}").state_dict()
    assert all(torch.equal(exported[name], averages(whole)[name]) for name in statistics)
    if not freeze:
        return  # test_ema.py goes on with a run whose BatchNorm is of this kind
    files = {"model": str(tmp_path / "whole" / "small.json"), "pretrained": str(tmp_path / "whole" / "start.pt")}
    part = config(shards, tmp_path, **({"workers": 0, "wd": 0.5, "epochs": 1, "save_every": 1} | files | options))
    with stopped_after(2):
        train(part)
    folder = RunFolder(tmp_path / "run")
    train(part, folder.latest)
    assert same(whole.path, folder.path)


def test_batch_norm_that_is_frozen_has_the_precision_of_its_tower(shards, tmp_path):
    options = {"lock_image": True, "lock_image_freeze_bn_stats": True, "precision": "pure_bf16"}
    model, run, checkpoint = run_from_weights(shards, tmp_path, RESNET, **options)  # preflight works on "meta", too
    assert all(torch.isfinite(torch.tensor(losses(run))))
    after = checkpoint["state_dict"]
    mean = "visual.bn1.running_mean"
    assert torch.equal(after[mean], model.state_dict()[mean].bfloat16())


def test_the_towers_of_siglip(shards, tmp_path):
    pytest.importorskip("tokenizers")
    model, options = make_siglip(CONFIGS["exact"]), {"tokenizer": str(save_tokenizer(tmp_path / "tokenizer"))}
    (tmp_path / "siglip.json").write_text(json.dumps(CONFIGS["exact"].to_dict()))
    torch.save(model.state_dict(), tmp_path / "start.pt")
    options |= {"model": str(tmp_path / "siglip.json"), "pretrained": str(tmp_path / "start.pt"), "workers": 0}
    options |= {"lock_image": True, "lock_image_unlocked_groups": 1, "lock_text": True, "epochs": 1}
    run, _ = train(config(shards, tmp_path, **options))
    after = read_checkpoint(run.latest)["state_dict"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, after[name])}
    trained = ("visual.trunk.attn_pool.", "logit_")
    assert changed == {name for name in after if name.startswith(trained)}
