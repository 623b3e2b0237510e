"""What a run says of itself: log lines and scalars by OpenCLIP's names, and the meters behind them."""

import dataclasses
import json
import os
import re
import shutil
import statistics
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import create_model
from clipfast.flops import training_flops
from clipfast.kernels.hardware import CARDS
from clipfast.ranks import run_ranks
from clipfast.training import TrainConfig, reports
from clipfast.training.loop import train
from clipfast.training.meters import Meters, Remaining
from clipfast.training.run import RunFolder
from clipfast.training.trainer import Trainer
from clipfast.training.world import joined

from .test_training import config, stopped_after

# A line of OpenCLIP's trainer, as its format string stands in open_clip_train/train.py.
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
    """All points in TensorBoard's files of a folder, by name, as TensorBoard shows them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), {accumulators.SCALARS: 0}).Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def close(points):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run of eight steps with two evaluations."""
    given = config(shards, tmp_path_factory.mktemp("whole"), val_data=shards, val_group_by="category")
    return train(given)[0]


def test_lines_are_openclips_with_ours_at_the_end(whole):
    lines = [line for line in (whole.path / "out.log").read_text().splitlines() if "Train Epoch" in line]
    metrics = [line for line in whole.metrics() if "loss" in line]
    assert len(lines) == len(metrics) == 4
    for line, figures in zip(lines, metrics, strict=True):
        found = OPENCLIP.search(line)
        assert float(found["mean"]) == pytest.approx(figures["loss"], rel=1e-4)
        assert float(found["rate"]) == pytest.approx(figures["pairs_per_second"], rel=1e-4)
        assert float(found["lr"]) == pytest.approx(figures["lr"], abs=1e-6)
        assert re.match(r" Mem: \d+\.\d GB Data-wait: \d+\.\d% \(\w+\)", line[found.end() :])
    assert re.search(r" ETA: 0:00:0\d$", lines[1])
    assert [metrics[-1][key] for key in ("step", "total_steps", "epoch", "eta")] == [8, 8, 1, 0]


def test_evaluations_have_openclips_names(whole):
    evaluations = [line for line in whole.metrics() if "eval" in line]
    results = [json.loads(line) for line in (whole.checkpoints / "results.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in results] == [(1, 4), (2, 8)]
    for line, found in zip(evaluations, results, strict=True):
        assert found["zeroshot-val-top1"] == line["eval"]["zero_shot"]["top1"]
        assert found["image_to_text_R@5"] == line["eval"]["retrieval"]["image_to_text"]["R@5"]
        assert found["odd-top1"] == line["eval"]["by_group"]["odd"]["top1"]
    text = (whole.path / "out.log").read_text()
    assert f"Eval Epoch: 2 zeroshot-val-top1: {results[1]['zeroshot-val-top1']:.4f}\t" in text
    assert f"\tclip_val_loss: {results[1]['clip_val_loss']:.4f}\t" in text
    assert "odd-top1" not in text  # groups can be many


def test_tensorboard_has_what_the_metrics_have(whole):
    found = read_back(whole.path / "tensorboard")
    assert {f"train/{name}" for name in SCALARS} <= set(found)
    metrics = whole.metrics()
    losses = [(line["step"] - 1, line["loss"]) for line in metrics if "loss" in line]
    assert found["train/loss"] == found["train/contrastive_loss"] == close(losses)
    rates = [(line["step"] - 1, line["pairs_per_second"]) for line in metrics if "loss" in line]
    assert found["train/samples_per_second"] == close(rates)
    top1 = [(line["epoch"], line["eval"]["zero_shot"]["top1"]) for line in metrics if "eval" in line]
    assert [epoch for epoch, _ in top1] == [1, 2]
    assert found["val/zeroshot-val-top1"] == close(top1)
    assert found["val/num_samples"] == [(1, 48), (2, 48)]
    assert found["val/odd-top1"]


def test_a_run_that_goes_on_has_no_point_twice(shards, tmp_path, whole):
    given = config(shards, tmp_path, val_data=shards, val_group_by="category", save_every=2)
    folder, aside = RunFolder(tmp_path / "run"), tmp_path / "aside.pt"
    with stopped_after(3):
        train(given)
    shutil.copy(folder.latest, aside)
    with stopped_after(7):
        train(given, folder.latest)
    assert [line["step"] for line in folder.metrics()] == [2, 4, 4, 6]
    shutil.copy(aside, folder.latest)  # before the first evaluation
    train(given, folder.latest)
    found, expected = (read_back(run.path / "tensorboard") for run in (folder, whole))
    assert found.keys() == expected.keys()
    for name in ("train/loss", "train/lr", "val/zeroshot-val-top1", "val/num_samples"):
        assert found[name] == expected[name]
    assert [step for step, _ in found["train/batch_time"]] == [1, 3, 5, 7]
    assert len(list((folder.path / "tensorboard").iterdir())) == 1
    results = [json.loads(line) for line in (folder.checkpoints / "results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in results] == [1, 2]


def test_what_tensorboard_lost_by_a_kill_is_there_again(shards, tmp_path):
    given = config(shards, tmp_path, save_every=1)
    with stopped_after(6):
        train(given)
    folder = RunFolder(tmp_path / "run")
    for path in (folder.path / "tensorboard").iterdir():
        path.unlink()
    train(given, folder.latest)
    assert [step for step, _ in read_back(folder.path / "tensorboard")["train/loss"]] == [1, 3, 5, 7]


def test_a_run_without_tensorboard_says_so_once(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder, _ = train(config(shards, tmp_path))
    assert (folder.path / "out.log").read_text().count(reports.NO_TENSORBOARD) == 1
    assert not (folder.path / "tensorboard").exists()
    assert len(folder.metrics()) == 4


def test_a_full_disk_under_tensorboard_does_not_stop_a_run(shards, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with mock.patch.object(tensorboard.SummaryWriter, "flush", side_effect=OSError(28, "No space left on device")):
        folder, _ = train(config(shards, tmp_path))
    assert (folder.path / "out.log").read_text().count("TensorBoard's files cannot be written") == 1
    assert len(folder.metrics()) == 4


class FakeWandb(types.ModuleType):
    """As much of wandb as a run needs, which writes down what it is given."""

    def __init__(self, key="key"):
        super().__init__("wandb")
        self.api, self.given, self.lines, self.finished = types.SimpleNamespace(api_key=key), None, [], False

    def init(self, **given):
        self.given = given
        return self

    def log(self, line, step):
        self.lines.append((step, line))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("", set()), ("tensorboard", {"tensorboard"}), ("wandb", {"wandb"}), ("all", {"tensorboard", "wandb"}),
        ("wandb, tensorboard", {"tensorboard", "wandb"}),
    ],
)  # fmt: skip
def test_backends_have_openclips_names(report_to, expected):
    assert reports.backends(report_to) == expected


def test_wandb_gets_the_scalars(shards, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"report_to": "wandb", "wandb_project_name": "mine", "wandb_notes": "a note", "val_data": shards}
    folder, _ = train(config(shards, tmp_path, **options))
    assert [fake.given[key] for key in ("project", "notes", "name", "resume")] == ["mine", "a note", "run", "allow"]
    assert fake.given["config"]["lr"] == 1e-3
    assert [step for step, _ in fake.lines] == [1, 3, 3, 5, 7, 7]
    assert fake.lines[0][1]["train/loss"] == folder.metrics()[0]["loss"]
    assert "val/image_to_text_R@1" in fake.lines[2][1]
    assert fake.finished


@pytest.mark.parametrize(
    ("report_to", "module", "mode", "message"),
    [
        ("wandb", None, "online", "needs the package wandb: pip install 'clipfast[wandb]'"),
        ("all", FakeWandb(key=None), "online", "wandb has no key: run wandb login, set WANDB_API_KEY"),
        ("comet", None, "online", "--report-to must be of tensorboard, wandb, all, joined by commas, got 'comet'"),
        ("trackio", None, "online", "trackio has no backend here"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_at_the_start(
    report_to, module, mode, message, shards, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config(shards, tmp_path / "logs", report_to=report_to))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("report_to", "mode"), [("", "online"), ("tensorboard", "online"), ("wandb", "offline")])
def test_a_key_is_only_wanted_where_it_is_needed(report_to, mode, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(key=None))
    monkeypatch.setenv("WANDB_MODE", mode)
    reports.check_wandb(report_to)


class TestRemaining:
    def test_steps_of_equal_length(self):
        remaining = Remaining()
        assert remaining.at(10, 100, 50.0) is None
        assert remaining.at(20, 100, 60.0) == pytest.approx(80)

    def test_evaluations_are_spread_over_the_steps(self):
        remaining, now = Remaining(), 0.0
        for step in range(0, 1001, 10):
            found = remaining.at(step, 3000, now)
            now += 10 + (50 if step and step % 100 == 0 else 0)
        assert found == pytest.approx(2000 * 1.45, rel=0.05)  # the evaluation at step 1000 comes after it

    def test_a_stall_counts_once(self):
        remaining, now, found = Remaining(), 0.0, []
        for step in range(0, 501, 10):
            now += 10 + (600 if step == 100 else 0)
            found.append(remaining.at(step, 10_000, now))
        assert found[-1] < 1.3 * 9_500 + 600 * 9_500 / 490

    def test_another_speed_is_soon_believed(self):
        remaining, now = Remaining(), 0.0
        for step in range(0, 2001, 10):
            found = remaining.at(step, 3000, now)
            now += 10 if step < 1000 else 40
        assert found == pytest.approx(1000 * 4, rel=0.15)

    def test_the_end(self):
        assert Remaining().at(8, 8, 1.0) == 0


@pytest.mark.parametrize("name", ["ViT-T-8-32", "RN50"])
def test_flops_are_three_forward_passes_and_the_loss(name):
    from clipfast.bench.flops import forward_flops

    forward, embed_dim = forward_flops(name, published=False)
    expected = 64 * 3 * forward + 6 * 64**2 * embed_dim
    # pixels need no gradient, so the first product has one backward product and not two
    assert training_flops(create_model(name, device="meta"), 64) == pytest.approx(expected, rel=0.03)


def test_a_locked_tower_and_dropped_patches_need_fewer_flops():
    def flops(lock=False, **options):
        model = create_model("ViT-B-32", device="meta", **options)
        if lock:
            model.lock_image_tower()
        return training_flops(model, 2)

    assert flops(lock=True) < 0.75 * flops()
    assert flops(force_patch_dropout=0.5) < 0.75 * flops()


class FakeNVML(types.ModuleType):
    """As much of NVML as the meters ask, for one GPU; it can fail as drivers do."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, reasons=0, error=None):
        super().__init__("pynvml")
        self.reasons, self.error, self.asked = reasons, error, []

    def nvmlInit(self):  # noqa: N802
        if self.error:
            raise self.error

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetCurrentClocksEventReasons(self, card):  # noqa: N802
        return self.reasons

    def nvmlDeviceGetClockInfo(self, card, clock):  # noqa: N802
        return {1: 1755, 2: 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, card):  # noqa: N802
        return 612_000

    def nvmlDeviceGetTemperature(self, card, sensor):  # noqa: N802
        return 64


@pytest.fixture
def gpu(monkeypatch):
    """Meters of a GPU that is not there: the second of an H100 machine, which CUDA_VISIBLE_DEVICES shows first."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {CARDS['h100'].name}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234-second"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 31_400_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 40_000_000_000)

    def meters_with(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return Meters(torch.device("cuda", 0))

    return meters_with


def test_a_gpu_is_found_by_its_uuid(gpu):
    nvml = FakeNVML(reasons=0x4)  # the power cap, which is normal under load
    found = gpu(nvml).read(0.5)
    assert nvml.asked == ["GPU-1234-second"]
    assert found["memory"] == {"allocated": 31_400_000_000, "reserved": 40_000_000_000}
    state = {"power_w": 612.0, "sm_mhz": 1755, "temperature_c": 64, "reasons": 4, "throttled": False}
    assert state.items() <= found["gpu"].items()
    scalars = reports.train_scalars({"step": 1, **found})
    assert (scalars["gpu/power_w"], scalars["gpu/sm_mhz"], scalars["memory/allocated_gb"]) == (612.0, 1755, 31.4)


def test_a_gpu_that_is_slowed_down_is_told_once(gpu, caplog):
    slowed = gpu(FakeNVML(reasons=0x4 | 0x20 | 0x80))
    for _ in range(3):
        assert slowed.read(0.5)["gpu"]["throttled"]
    assert len(caplog.records) == 1
    assert "cuda:0 runs slower than it could, by heat, power brake: 1755 MHz, 612 W, 64 °C" in caplog.text


@pytest.mark.parametrize("nvml", [None, FakeNVML(error=RuntimeError("Driver Not Loaded"))])
def test_without_nvml_a_run_goes_on_silently(nvml, gpu, caplog):
    assert set(gpu(nvml).read(0.5)) == {"memory"}
    assert caplog.text == ""


def test_mfu_is_of_the_card_s_peak(gpu, monkeypatch):
    found = gpu(None)
    text = found.count_flops(lambda: create_model("ViT-B-32", device="meta"), 4096, 8, half=True)
    flops = training_flops(create_model("ViT-B-32", device="meta"), 4096)
    assert found.read(0.25)["mfu"] == pytest.approx(flops / 0.25 / (8 * 989.4e12))
    assert f"{flops / 1e12:,.4g} TFLOP of the model, without what is computed a second time" in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce 9800")
    unknown = gpu(None)
    assert unknown.count_flops(mock.Mock(side_effect=AssertionError), 4096, 8, half=True) is None
    assert "mfu" not in unknown.read(0.25)


def test_a_cpu_has_no_peak_and_no_nvml():
    found = Meters(torch.device("cpu"))
    assert found.count_flops(mock.Mock(side_effect=AssertionError), 8, 1, half=False) is None
    assert set(found.read(0.1)) == {"memory"}
    assert found.read(0.1)["memory"]["resident"] > 50e6


def trained_slowly(rank, size, given, seconds):
    """Train on several ranks, of which rank 1 has the last of its gradients so much later."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    original = Trainer.__init__

    def slowed(trainer, *args):
        original(trainer, *args)
        if rank == 1:
            next(trainer.model.visual.parameters()).register_hook(lambda gradient: time.sleep(seconds))

    with mock.patch.object(Trainer, "__init__", slowed), joined("cpu", 30) as world:
        train(TrainConfig(**given), world=world)


@pytest.mark.long
def test_the_wait_for_gradients_of_a_slow_rank_is_communication(shards, tmp_path):
    slow = config(shards, tmp_path, global_batch_size=8, log_every_n_steps=1, workers=0)
    waits = {}
    for seconds in (0.0, 0.5):
        given = dataclasses.asdict(slow) | {"name": f"late by {seconds}"}
        (tmp_path / given["name"] / "ranks").mkdir(parents=True)
        run_ranks(trained_slowly, 2, 2, given, seconds, folder=tmp_path / given["name"] / "ranks")
        lines = [line for line in RunFolder(tmp_path / given["name"]).metrics() if "communication" in line]
        assert len(lines) > 3  # PyTorch does not look at the first steps
        assert all(0 <= line["communication"] <= 1 for line in lines)
        waits[seconds] = statistics.median(line["communication"] * line["batch_time"] for line in lines)
        assert re.search(r" Comm: \d+\.\d% Data-wait: ", (tmp_path / given["name"] / "out.log").read_text())
    assert waits[0.5] - waits[0.0] > 0.25  # a busy machine holds up both runs
