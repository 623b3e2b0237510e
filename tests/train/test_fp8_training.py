"""Training with --precision amp_fp8: bit-equal resumption, several processes, refused options, and the metrics."""

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
from clipfast.train.optim import parse_arguments

from .distributed import folder_of, trained
from .test_training import config, losses, same, train

FP8 = {"precision": "amp_fp8", "fp8_skip": (0, 0)}


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Return the losses of a training run in float32, with which runs in FP8 are compared."""
    folder, _ = train(config(shards, tmp_path_factory.mktemp("plain")))
    return losses(folder)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        "fp8_recipe=full", "micro_batch_size=3", "grad_checkpointing=True opt=stableadamw",
        "torchcompile=True torchcompile_backend=aot_eager",
    ],
    ids=["full", "accumulation", "checkpointing", "compiled"],
)  # fmt: skip
def test_it_learns_like_float32(options, plain, run_small):
    torch.compiler.reset()
    found = losses(run_small(**FP8, **parse_arguments(options.split())))
    assert found == pytest.approx(plain, rel=0.05)
    assert found != plain


@pytest.mark.long
def test_two_processes_train_as_one(options, together, tmp_path):
    """Losses are near, not equal: tiny differences round a value to another FP8 number, at least a sixteenth away."""
    given = [options(tmp_path, name, **FP8, opt="sgd", lr=0.03, fsdp=name == "fsdp") for name in ("one", "ddp", "fsdp")]
    assert trained(ALONE, given[0]) is None
    assert together(2, *((each,) for each in given[1:])) == [[None] * 2] * 2
    one, *others = (losses(folder_of(each)) for each in given)
    for other in others:
        assert other == pytest.approx(one, rel=5e-3)


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
    getattr(model, lock)(3)  # the projection and the last two blocks are trained, and the last block is in 16 bits
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


@pytest.mark.parametrize(
    ("arch", "version", "said"),
    [
        (80, "2.12.0a0+nv26.01", r"8\.9 .* A100 has 8\.0: compute in 16 bits"),
        (86, "2.12.0", r"8\.9 .* A100 has 8\.6: compute in 16 bits"),
        (89, "2.11.0+cu130", r"on a NVIDIA A100 need PyTorch 2\.12 or newer"),
        (89, "2.12.0a0+nv26.01", None),
        (90, "2.11.0+cu130", None),
    ],
)
def test_a_gpu_without_fp8_is_refused_before_anything_is_built(arch, version, said, monkeypatch):
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA A100"}.items():
        monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=value))
    monkeypatch.setattr("clipfast.kernels.fp8.support.arch_of", lambda _: arch)
    monkeypatch.setattr("torch.__version__", TorchVersion(version))
    refused = pytest.raises(ValueError, match=f"--precision amp_fp8: .*{said}") if said else contextlib.nullcontext()
    with refused:
        assert build_device(TrainConfig(train_data="x.tar", precision="amp_fp8", device="cuda")).type == "cuda"
