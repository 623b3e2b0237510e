"""The log of a run: lines and scalars by OpenCLIP's names, and the meters behind them."""

import dataclasses
import re
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import create_model
from clipfast.cli.main import main
from clipfast.kernels.hardware import CARDS
from clipfast.models.model_flops import training_flops
from clipfast.runs import metrics
from clipfast.runs.folder import RunFolder, read_lines
from clipfast.train import reports
from clipfast.train.logs import Meters
from clipfast.train.trainer import Trainer

from ..processes import run_ranks
from .distributed import empty, on_rank
from .test_endings import log_of

# A log line of OpenCLIP's trainer, from the format string in open_clip_train/train.py.
NUMBER = r"[-+.\de]+"
OPENCLIP = re.compile(
    rf"Train Epoch: (?P<epoch>\d+) \[ *(?P<samples>\d+)/(?P<total>\d+) \((?P<percent>\d+)%\)\] "
    rf"Data \(t\): (?P<data>{NUMBER}) Batch \(t\): (?P<batch>{NUMBER}), (?P<rate>{NUMBER})/s, {NUMBER}/s/gpu "
    rf"LR: (?P<lr>\d\.\d+) Logit Scale: (?P<scale>{NUMBER}) "
    rf"Contrastive_loss: {NUMBER} \({NUMBER}\) Loss: (?P<loss>{NUMBER}) \((?P<mean>{NUMBER})\)"
)
SCALARS = {
    "data_time", "batch_time", "samples_per_second", "samples_per_second_per_gpu", "logit_scale", "lr",
    "contrastive_loss", "loss",
}  # fmt: skip


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all points of a training run in TensorBoard's files, by name, as TensorBoard shows them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), {accumulators.SCALARS: 0}).Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def lines_with(folder, key):
    """Return the lines of a training run's metrics that contain ``key``."""
    return [line for line in folder.metrics() if key in line]


def evaluations_of(folder):
    """Return the evaluations in ``results.jsonl`` of a training run."""
    return read_lines(folder.checkpoints / "results.jsonl")


def test_lines_are_openclips_with_ours_at_the_end(finished):
    lines = [line for line in log_of(finished).splitlines() if "Train Epoch" in line]
    metrics = lines_with(finished, "loss")
    assert len(lines) == len(metrics) == 4
    for line, figures in zip(lines, metrics, strict=True):
        found = OPENCLIP.search(line)
        assert float(found["mean"]) == pytest.approx(figures["loss"], rel=1e-4)
        assert float(found["rate"]) == pytest.approx(figures["pairs_per_second"], rel=1e-4)
        assert float(found["lr"]) == pytest.approx(figures["lr"], abs=1e-6)
        assert re.match(r" Mem: \d+\.\d GB Data-wait: \d+\.\d% \(\w+\)", line[found.end() :])
    assert re.search(r" ETA: 0:00:\d\d$", lines[1])
    assert [metrics[-1][key] for key in ("step", "total_steps", "epoch", "eta")] == [8, 8, 1, 0]


def test_evaluations_have_openclips_names(finished):
    results = evaluations_of(finished)
    assert [(line["epoch"], line["step"]) for line in results] == [(1, 4), (2, 8)]
    for line, found in zip(lines_with(finished, "eval"), results, strict=True):
        assert found["zeroshot-val-top1"] == line["eval"]["zero_shot"]["top1"]
        assert found["image_to_text_R@5"] == line["eval"]["retrieval"]["image_to_text"]["R@5"]
        assert found["odd-top1"] == line["eval"]["by_group"]["odd"]["top1"]
    text = log_of(finished)
    assert f"Eval Epoch: 2 zeroshot-val-top1: {results[1]['zeroshot-val-top1']:.4f}\t" in text
    assert f"\tclip_val_loss: {results[1]['clip_val_loss']:.4f}\t" in text
    assert "odd-top1" not in text  # accuracies of groups are left out of the log, since a set may have many groups


def assert_shown(folder):
    """Assert that TensorBoard shows all points of a run's metrics once, on OpenCLIP's axes."""
    found = read_back(folder.path / "tensorboard")
    assert {f"train/{name}" for name in SCALARS} <= set(found)
    for name, key in (("loss", "loss"), ("contrastive_loss", "loss"), ("samples_per_second", "pairs_per_second")):
        points = [(line["step"] - 1, pytest.approx(line[key])) for line in lines_with(folder, "loss")]
        assert found[f"train/{name}"] == points
    top1 = [(line["epoch"], line["eval"]["zero_shot"]["top1"]) for line in lines_with(folder, "eval")]
    assert found["val/zeroshot-val-top1"] == [(epoch, pytest.approx(value)) for epoch, value in top1]
    assert found["val/num_samples"] == [(epoch, 48) for epoch, _ in top1]
    assert found["val/odd-top1"]
    assert [line["epoch"] for line in evaluations_of(folder)] == [epoch for epoch, _ in top1]


def test_tensorboard_has_what_the_metrics_have(finished, copied):
    """TensorBoard shows all metrics, also of a run that was resumed after a kill had lost TensorBoard's data."""
    assert_shown(finished)
    for path in (copied.path / "tensorboard").iterdir():
        path.unlink()
    assert main(["train", "--resume", str(copied.checkpoints / "step_6.pt")]) == 0
    assert [line["step"] for line in copied.metrics()] == [2, 4, 4, 6, 8, 8]
    assert_shown(copied)
    assert len(list((copied.path / "tensorboard").iterdir())) == 1


def test_a_run_without_tensorboard_or_space_for_it_says_so_once(run_small, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    full = OSError(28, "No space left on device")
    with mock.patch.object(tensorboard.SummaryWriter, "flush", side_effect=full):
        folder = run_small(name="full", epochs=1)
    assert log_of(folder).count("TensorBoard's files cannot be written") == 1
    assert len(folder.metrics()) == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = run_small(name="without", epochs=1)
    assert log_of(folder).count(reports.NO_TENSORBOARD) == 1
    assert len(folder.metrics()) == 2


def fake_wandb(key="key"):
    """Return a stand-in for the module wandb, which records what training reports to it."""
    return mock.Mock(**{"api.api_key": key})


def test_wandb_gets_the_scalars(shards, run_small, monkeypatch):
    fake = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"report_to": "all", "wandb_project_name": "mine", "wandb_notes": "a note", "val_data": shards}
    folder = run_small(**options, epochs=1)
    given, run = fake.init.call_args.kwargs, fake.init.return_value
    assert [given[key] for key in ("project", "notes", "name", "resume")] == ["mine", "a note", "run", "allow"]
    assert given["config"]["lr"] == 1e-3
    lines = [(call.kwargs["step"], call.args[0]) for call in run.log.call_args_list]
    assert [step for step, _ in lines] == [1, 3, 3]
    assert lines[0][1]["train/loss"] == folder.metrics()[0]["loss"]
    assert "val/image_to_text_R@1" in lines[2][1]
    run.finish.assert_called_once()


@pytest.mark.parametrize(
    ("report_to", "module", "message"),
    [
        ("wandb", None, r"pip install 'clipfast\[wandb\]'"),
        ("all", fake_wandb(key=None), "wandb has no key: .*WANDB_API_KEY"),
        ("wandb, comet", None, "--report-to must be of tensorboard, wandb, all, .*comet"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_at_the_start(
    report_to, module, message, run_small, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=message):
        run_small(report_to=report_to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ViT-T-8-32", "RN50"])
def test_flops_are_three_forward_passes_and_the_loss(name):
    from clipfast.bench.suites.step import forward_flops

    forward, embed_dim = forward_flops(name, published=False)
    expected = 64 * 3 * forward + 6 * 64**2 * embed_dim
    # pixels need no gradient, so the first matrix product has one backward product, not two
    assert training_flops(create_model(name, device="meta"), 64) == pytest.approx(expected, rel=0.03)


def test_flops_of_naflex_are_those_of_as_many_patches():
    model = create_model("naflex_ViT-B-16", device="meta")
    square = training_flops(create_model("ViT-B-16", device="meta"), 64)
    assert training_flops(model, 64) == training_flops(model, 64, 196) == pytest.approx(square, rel=0.02)
    # Images take three quarters of the FLOPs of square images and texts.
    assert training_flops(model, 64, 784) > 2.9 * square


def fake_nvml(reasons=0, error=None):
    """Return a stand-in for NVML with one GPU, for the meters of a training run; ``error`` is raised at its start."""
    return mock.Mock(**{
        "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "nvmlInit.side_effect": error,
        "nvmlDeviceGetCurrentClocksEventReasons.return_value": reasons,
        "nvmlDeviceGetClockInfo.side_effect": lambda card, clock: {1: 1755, 2: 2619}[clock],
        "nvmlDeviceGetPowerUsage.return_value": 612_000, "nvmlDeviceGetTemperature.return_value": 64,
    })  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Fake a GPU for the meters of training: the second H100 of a machine, which the process sees as ``cuda:0``."""
    for name, value in {
        "get_device_name": f"NVIDIA {CARDS['h100'].name}", "get_device_properties": mock.Mock(uuid="1234-second"),
        "max_memory_allocated": 31_400_000_000, "max_memory_reserved": 40_000_000_000,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=value))

    def meters_with(nvml):
        """Return the meters of a training run on a GPU, which ask the stand-in ``nvml`` for its figures."""
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return Meters(torch.device("cuda", 0))

    return meters_with


def test_a_gpu_is_found_by_its_uuid_and_told_once_to_be_slow(gpu, caplog):
    # The clock is slowed by the power cap (normal under load), by heat, and by the power brake.
    nvml = fake_nvml(reasons=0x4 | 0x20 | 0x80)
    meters = gpu(nvml)
    found = [meters.read(0.5) for _ in range(3)][-1]
    nvml.nvmlDeviceGetHandleByUUID.assert_called_with("GPU-1234-second")
    assert found["memory"] == {"allocated": 31_400_000_000, "reserved": 40_000_000_000}
    assert {"power_w": 612.0, "sm_mhz": 1755, "temperature_c": 64, "throttled": True}.items() <= found["gpu"].items()
    scalars = metrics.train_scalars({"step": 1, **found})
    assert (scalars["gpu/power_w"], scalars["gpu/sm_mhz"], scalars["memory/allocated_gb"]) == (612.0, 1755, 31.4)
    assert len(caplog.records) == 1
    assert re.search("cuda:0 .* heat, power brake: 1755 MHz, 612 W, 64 °C", caplog.text)


@pytest.mark.parametrize("nvml", [None, fake_nvml(error=RuntimeError("Driver Not Loaded"))])
def test_without_nvml_a_run_goes_on_silently(nvml, gpu, caplog):
    assert set(gpu(nvml).read(0.5)) == {"memory"}
    assert caplog.text == ""


def test_mfu_is_of_the_card_s_peak(gpu, monkeypatch):
    found = gpu(None)
    text = found.count_flops(lambda: create_model("ViT-B-32", device="meta"), {None: 4096}, 8, half=True)
    flops = training_flops(create_model("ViT-B-32", device="meta"), 4096)
    assert found.read(0.25)["mfu"] == pytest.approx(flops / 0.25 / (8 * 989.4e12))
    assert f"{flops / 1e12:,.4g} TFLOP of the model, with all padding of texts, and without what is" in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce 9800")
    unknown = gpu(None)
    assert unknown.count_flops(mock.Mock(side_effect=AssertionError), {None: 4096}, 8, half=True) is None
    assert "mfu" not in unknown.read(0.25)


def trained_slowly(rank, size, given):
    """Train on several ranks, where the last gradient of rank 1 is half a second late."""
    original = Trainer.__init__

    def slowed(trainer, *args):
        """Make a trainer; on rank 1, its gradients come half a second late."""
        original(trainer, *args)
        if rank == 1:
            next(trainer.model.visual.parameters()).register_hook(lambda gradient: time.sleep(0.5))

    with mock.patch.object(Trainer, "__init__", slowed):
        on_rank(rank, size, [(given,)])


@pytest.mark.long
def test_the_wait_for_gradients_of_a_slow_rank_is_communication(small, tmp_path):
    given = dataclasses.asdict(small(global_batch_size=8, log_every_n_steps=1))
    run_ranks(trained_slowly, 2, 2, given, folder=empty(tmp_path))
    folder = RunFolder(tmp_path / "run")
    lines = lines_with(folder, "communication")
    assert len(lines) > 3  # PyTorch does not measure the first steps of a run
    assert statistics.median(line["communication"] * line["batch_time"] for line in lines) > 0.25
    assert re.search(r" Comm: \d+\.\d% Data-wait: ", log_of(folder))
