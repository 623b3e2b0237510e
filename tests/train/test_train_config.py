"""Training options: impossible values are refused, and recipes are read."""

from pathlib import Path

import pytest

from clipfast.cli.train import _saved_options
from clipfast.train import TrainConfig, read_recipe

from ..small_runs import cases
from .test_training import SMALL


@cases(r"""
lr=-1.0: --lr must be more than 0
beta2=1.0: --beta2 must be less than 1, got 1.0
grad_clip_norm=0.0: --grad-clip-norm must be more than 0, got 0.0
eps=1e999: --eps must be a finite number, got inf
seed=9223372036854775808: --seed must be at most
name=../x: --name .*'../x'
name=..: --name must be the name of a folder in --logs
warmup=-1: --warmup must not be negative
crop_scale=(0.9,0.1): --crop-scale needs two shares of the area
train_num_samples=4: --train-num-samples 4 is less than one batch of 8
precision=fp8: --precision must be one of auto, fp32
hue=0.7: --hue must be at most 0.5, got 0.7
keyword_prob=1.5: --keyword-prob must be at most 1
epochs=1.5: --epochs must be int, got 1.5
samples_seen=0: --samples-seen must be more than 0, got 0
samples_seen=64: --samples-seen 64 and --epochs 2 .* leave one out
batch_size='256': --batch-size must be int, got '256'
val_leave_out=Flags: --val-leave-out must be a list of str, got 'Flags'
val_leave_out=('Flags',): --val-leave-out needs --val-group-by
cuda_graphs=True micro_batch_size=4: --cuda-graphs .* leave out --micro-batch
micro_batch_size=many: --micro-batch-size must be int or 'auto', got 'many'
micro_batch_size=True: --micro-batch-size must be int or 'auto', got True
force_patch_dropout=-0.1: --force-patch-dropout must not be negative, got -0.1
force_patch_dropout=1.0: --force-patch-dropout must be less than 1, got 1.0
force_image_size=(0,): --force-image-size must be more than 0, got 0
train_data_upsampling_factors=(1.0,1e999): --train-data-upsampling-factors must be a finite number, got inf
naflex_seq_lens=(64,) naflex_loss_scale=sqrt: --naflex-seq-lens, --naflex-loss-scale without --use-naflex
use_naflex=True naflex_seq_lens=(64,0): --naflex-seq-lens must be more than 0, got 0
use_naflex=True naflex_seq_lens=(64,64): --naflex-seq-lens names a number twice: 64 64
use_naflex=True naflex_seq_lens=(64,128) naflex_seq_len_probs=(1.0,): --naflex-seq-len-probs .* got 1 for 2 of
use_naflex=True naflex_seq_len_probs=(1.0,2.0): --naflex-seq-len-probs .* got 2 for no --naflex-seq-lens
use_naflex=True naflex_patch_size_probs=(1.0,): --naflex-patch-size-probs .* got 1 for no --naflex-patch-sizes
use_naflex=True naflex_patch_sizes=(16,) naflex_patch_size_probs=(0.0,): --naflex-patch-size-probs must not all be 0
use_naflex=True naflex_patch_sizes=(16,) naflex_patch_size_probs=(-1.0,): --naflex-patch-size-probs must not be neg
use_naflex=True naflex_max_tokens_per_batch=1000: --naflex-max-tokens-per-batch 1000 is less than .* 1024 patches
use_naflex=True train_num_samples=9 naflex_num_train_image_tokens=9: --train-num-samples 9 and .* leave one out
use_naflex=True global_batch_size=64: --global-batch-size 64 with --use-naflex
use_naflex=True cuda_graphs=True: --cuda-graphs does not work with --use-naflex
use_naflex=True decode_on_device=True: --decode-on-device does not work with --use-naflex
use_naflex=True force_image_size=(64,): --force-image-size does not work with --use-naflex
lr_scheduler=linear: --lr-scheduler must be one of cosine, const, const-cooldown, wsd, got 'linear'
lr_scheduler=const-cooldown: const-cooldown needs --epochs-cooldown
warmup=1.5: --warmup must be a number of steps, or a share .* 1.5
warmup=some: --warmup must be float or 'auto', got 'some'
warmup=1e999: --warmup must be a finite number
decay_fraction=1.1: --decay-fraction must be at most 1, got 1.1
epochs_cooldown=2: --epochs-cooldown needs --lr-scheduler const-cooldown, and it is cosine
decay_fraction=0.2 lr_scheduler=const-cooldown epochs_cooldown=2: --decay-fraction needs .*wsd
lr_cooldown_end=1e-5 lr_scheduler=const: --lr-cooldown-end needs .* const-cooldown or wsd
lr_cooldown_power=2.0: --lr-cooldown-power needs --lr-scheduler const-cooldown or wsd
lr_cooldown_power=0.0: --lr-cooldown-power must be more than 0
precision=fp32 fp8_recipe=full: --fp8-recipe needs --precision amp_fp8
precision=amp_fp8 fp8_recipe=half: --fp8-recipe must be one of switchback, full
precision=amp_fp8 fp8_skip=(1,): --fp8-skip needs two numbers of blocks, got 1
precision=amp_fp8 fp8_skip=3: --fp8-skip must be a list of int, got 3
fsdp=False fsdp_offload_cpu=True: --fsdp-offload-cpu needs --fsdp
fsdp=False fsdp_checkpoint=sharded: --fsdp-checkpoint sharded needs --fsdp
fsdp=True use_bn_sync=True: --use-bn-sync does not work with --fsdp
fsdp=True micro_batch_size=auto: --micro-batch-size auto does not work with --fsdp
fsdp=True opt=timm.optim:Lamb: --opt timm.optim:Lamb does not work with --fsdp, .* one of adamw
use_naflex=True image_resize_mode=longest: --image-resize-mode does not work with --use-naflex
""")
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**({"train_data": "x.tar"} | SMALL | options))


def test_recipes(tmp_path):
    (tmp_path / "mine.toml").write_text("batch-size = 4\ncrop-scale = [0.5, 1.0]")
    assert read_recipe(str(tmp_path / "mine.toml")) == {"batch_size": 4, "crop_scale": (0.5, 1.0)}
    (tmp_path / "typo.toml").write_text("bach_size = 4")
    for name, message in (("typo.toml", "unknown options: bach_size"), ("none.toml", "no recipe")):
        with pytest.raises(ValueError, match=message):
            read_recipe(str(tmp_path / name))


def test_a_resumed_run_keeps_the_form_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("r", None):  # None: the user gave no name, and the folder is named after the time
        content = {"clipfast": {"config": {"logs": "runs", "name": name}}}
        for folder in (Path("runs/r"), tmp_path / "runs" / "r"):
            assert _saved_options(folder / "checkpoints" / "step_1.pt", content) == {"logs": "runs", "name": "r"}
    moved = _saved_options(Path("other/s/checkpoints/step_1.pt"), content)
    assert moved == {"logs": str(tmp_path / "other"), "name": "s"}
