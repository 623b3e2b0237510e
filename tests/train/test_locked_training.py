"""Locked towers in training: they stay bit-equal and have no optimizer state, with every option that changes a step."""

import pytest
import torch

from clipfast import create_model
from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.models import build
from clipfast.models.registry import read_model_config
from clipfast.train.loop import train
from clipfast.train.optim import parse_arguments

from ..models.siglip import save_tokenizer
from ..small_runs import RESNET, SIGLIP, TINY
from .test_training import config, losses

BLOCKS = tuple(f"transformer.resblocks.{index}." for index in (0, 1))
PARTS = ("conv1", "class_", "positional", "ln_pre", *BLOCKS, "ln_post", "proj")
IMAGE = tuple(f"visual.{part}" for part in PARTS)
TEXT = ("token_embedding", "positional_embedding", *BLOCKS, "ln_final", "text_projection")


def run_from_weights(shards, folder, model, **options):
    """Train locked towers from weights in a file; return the model with these weights, the run, and its checkpoint."""
    torch.manual_seed(1)
    start = build(read_model_config(model))
    torch.save(start.state_dict(), folder / "start.pt")
    options |= {"model": model, "pretrained": str(folder / "start.pt"), "wd": 0.5, "epochs": 1}
    run, _ = train(config(shards, folder, **options))
    return start, run, read_checkpoint(run.latest)


def changed(before, after):
    """Return the names of the weights whose values training has changed."""
    return {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}


@pytest.mark.parametrize(
    ("model", "options", "locked"),
    [
        (TINY, "lock_image=True grad_checkpointing=True force_patch_dropout=0.5", IMAGE),
        (TINY, "lock_image=True selective_checkpointing=True opt=muon", IMAGE),
        (TINY, "lock_image=True lock_image_unlocked_groups=2 ema_decay=0.9", IMAGE[:5]),
        (TINY, "lock_text=True micro_batch_size=3 grad_checkpointing=True image_layer_decay=0.5", TEXT),
        (TINY, "lock_text=True lock_text_unlocked_layers=1 grad_clip_norm=0.1", TEXT[:-1]),
        (TINY, "lock_image=True lock_text=True micro_batch_size=3", (*IMAGE, *TEXT)),
        (
            SIGLIP, "lock_image=True lock_image_unlocked_groups=1 lock_text=True",
            ("visual.trunk.patch_embed", "visual.trunk.pos_embed", "visual.trunk.blocks", "visual.trunk.norm", "text."),
        ),
    ],
)  # fmt: skip
def test_a_locked_tower_stays_as_it_is(shards, tmp_path, model, options, locked):
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer")) if model == SIGLIP else None
    given = parse_arguments(options.split())
    start, run, checkpoint = run_from_weights(shards, tmp_path, model, tokenizer=tokenizer, **given)
    before = start.state_dict()
    trained = {name for name in before if not name.startswith(locked)}
    assert changed(before, checkpoint["state_dict"]) == trained
    assert len(checkpoint["optimizer"]["state"]) == len(trained)
    assert all(torch.isfinite(torch.tensor(losses(run))))
    if "ema_decay" in given:
        assert changed(before, checkpoint["state_dict_ema"]) == trained


@pytest.mark.long
@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norm_of_a_locked_tower(shards, tmp_path, freeze):
    options = {"lock_image": True, "lock_image_unlocked_groups": 1, "lock_image_freeze_bn_stats": freeze}
    start, run, checkpoint = run_from_weights(shards, tmp_path, RESNET, **options, ema_decay=0.5, micro_batch_size=4)
    locked = {name: x for name, x in start.state_dict().items() if "visual." in name and "attnpool" not in name}
    statistics = {name for name in locked if "running_" in name}
    moved = set() if freeze else statistics
    assert {name for name in changed(locked, checkpoint["state_dict"]) if "num_batches" not in name} == moved
    averages = checkpoint["state_dict_ema"]
    assert changed(locked, averages) & statistics == moved
    exported = create_model(f"local-dir:{run.path}").state_dict()
    assert all(torch.equal(exported[name], averages[name]) for name in statistics)


def test_batch_norm_that_is_frozen_has_the_precision_of_its_tower(shards, tmp_path):
    options = {"lock_image": True, "lock_image_freeze_bn_stats": True, "precision": "pure_bf16"}
    # The run also passes preflight, which locks a model on the device "meta".
    start, run, checkpoint = run_from_weights(shards, tmp_path, RESNET, **options)
    assert all(torch.isfinite(torch.tensor(losses(run))))
    mean = "visual.bn1.running_mean"
    assert torch.equal(checkpoint["state_dict"][mean], start.state_dict()[mean].bfloat16())
