"""--precision amp_fp8: runs that go on to the last bit, on several processes too, what is refused, and the metrics."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.torch_version import TorchVersion

from clipfast import ClipLoss, create_model, get_tokenizer
from clipfast.distributed.world import ALONE
from clipfast.train import TrainConfig
from clipfast.train.build import build_device
from clipfast.train.fp8_figures import Fp8Figures

from ..small_runs import cases
from .distributed import folder_of, trained
from .test_training import config, losses, same, train, whole_and_resumed

FP8 = {"precision": "amp_fp8", "fp8_skip": (0, 0)}


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Return the losses of a run in float32."""
    folder, _ = train(config(shards, tmp_path_factory.mktemp("plain")))
    return losses(folder)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"fp8_recipe": "full"}, {"micro_batch_size": 3}, {"grad_checkpointing": True, "opt": "stableadamw"},
        {"selective_checkpointing": True}, {"torchcompile": True, "torchcompile_backend": "aot_eager"},
    ],
    ids=["full", "accumulation", "checkpointing", "selective", "compiled"],
)  # fmt: skip
def test_training_learns_and_goes_on_to_the_last_bit(options, plain, shards, tmp_path):
    torch.compiler.reset()
    whole, folder = whole_and_resumed(shards, tmp_path, **FP8, **options)
    assert same(whole.path, folder.path)
    assert losses(whole) == pytest.approx(plain, rel=0.05)
    assert losses(whole) != plain


@pytest.mark.long
def test_two_processes_train_as_one(options, together, tmp_path):
    """A number that is rounded to the other side by an earlier rounding moves by a sixteenth, so losses are near."""
    runs = {"one": {}, "ddp": {}, "fsdp": {"fsdp": True}}
    given = {
        name: options(tmp_path, name, precision="amp_fp8", fp8_skip=(0, 0), val_data=None, **changes)
        for name, changes in runs.items()
    }
    assert trained(ALONE, given["one"]) is None
    assert together(2, (given["ddp"],), (given["fsdp"],)) == [[None] * 2] * 2
    one, *others = (losses(folder_of(each)) for each in given.values())
    for other in others:
        assert other == pytest.approx(one, rel=2e-3)


def test_the_metrics_tell_what_8_bits_lose(shards, tmp_path):
    folder, _ = train(config(shards, tmp_path, force_patch_dropout=0.5, **FP8))
    lines = [line for line in folder.metrics() if "loss" in line]
    assert len(lines) == 4
    for found in (line["fp8"] for line in lines):
        assert len(found["scale"]) == 16
        for kind in ("input", "weight", "gradient"):
            assert 1 / 256 <= found["saturated"][kind] < 0.1
            assert 0 <= found["zero"][kind] < 0.3
            assert all(0 < scale[kind] < 0.1 for scale in found["scale"].values())


@pytest.mark.parametrize("lock", ["lock_image_tower", "lock_text_tower"])
def test_trained_blocks_of_a_locked_tower_have_gradients_in_the_metrics(lock):
    model = create_model("ViT-T-8-32")
    model.set_fp8("switchback")
    getattr(model, lock)(3)  # the projection and the last two blocks are trained, and the last one is in 16 bits
    measure = Fp8Figures(model, ClipLoss(), contextlib.nullcontext)
    scale = measure(torch.randn(4, 3, 32, 32), get_tokenizer("ViT-T-8-32")(["a", "b", "c", "d"]))["scale"]
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("gradient" in scale[name] for name in trained & {*scale})


def test_measuring_changes_nothing(shards, tmp_path):
    options = {"force_patch_dropout": 0.5, "log_every_n_steps": 1, **FP8}
    found = []
    for name, pairs in (("measured", 16), ("not", 0)):
        measure = (lambda *_: {}) if pairs == 0 else Fp8Figures.__call__
        with mock.patch.object(Fp8Figures, "__call__", measure):
            found.append(train(config(shards, tmp_path / name, **options))[0])
    assert same(found[0].path, found[1].path)


@cases("""
precision=fp32 fp8_recipe=full: --fp8-recipe needs --precision amp_fp8
precision=amp_fp8 fp8_recipe=half: --fp8-recipe must be one of switchback, full
precision=amp_fp8 fp8_skip=(1,): --fp8-skip needs two numbers of blocks, got 1
precision=amp_fp8 fp8_skip=3: --fp8-skip must be a list of int, got 3
""")
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(train_data="x.tar", **options)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_a_gpu_without_fp8_is_refused_before_anything_is_built(capability, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA A100")
    monkeypatch.setattr("clipfast.kernels.fp8.support.arch_of", lambda _: 10 * capability[0] + capability[1])
    config = TrainConfig(train_data="x.tar", precision="amp_fp8", device="cuda")
    monkeypatch.setattr("torch.__version__", TorchVersion("2.11.0+cu130"))
    if capability == (8, 9):
        with pytest.raises(ValueError, match=r"--precision amp_fp8: .* on a NVIDIA A100 need PyTorch 2\.12 or newer"):
            build_device(config)
        monkeypatch.setattr("torch.__version__", TorchVersion("2.12.0a0+nv26.01"))
    if capability < (8, 9):
        with pytest.raises(ValueError, match=r"--precision amp_fp8: .* 8\.9 .* A100 has 8\.\d: compute in 16 bits"):
            build_device(config)
    else:
        assert build_device(config).type == "cuda"
