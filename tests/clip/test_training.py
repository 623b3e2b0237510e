"""Training: schedule, resumption to the last bit, kill -9, Ctrl-C, and what stops a run."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipfast import create_model, load_checkpoint
from clipfast.checkpoint import read_checkpoint
from clipfast.training import TrainConfig, list_recipes, read_recipe
from clipfast.training.loop import TrainingError, train
from clipfast.training.optim import cosine_lr

from .conftest import sample, write_shard

SMALL = {
    "model": "ViT-T-8-32",
    "batch_size": 8,
    "train_num_samples": 32,
    "epochs": 2,
    "warmup": 2,
    "lr": 1e-3,
    "workers": 1,
    "log_every": 2,
}


def config(shards, tmp_path, **options):
    """Eight steps on the small shards."""
    return TrainConfig(train_data=shards, logs=str(tmp_path), name="run", **(SMALL | {"unique_by": "label"} | options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser state of a run's latest checkpoint, flat."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "epoch_latest.pt")
    moments = {
        f"{index}.{key}": value
        for index, state in checkpoint["optimizer"]["state"].items()
        for key, value in state.items()
    }
    return checkpoint["state_dict"] | moments


def command(shards, tmp_path, *extra: str) -> list[str]:
    """The command line for a run of 40 steps that saves after each."""
    options = [
        "--train-data",
        shards,
        "--logs",
        str(tmp_path),
        "--name",
        "run",
        "--model",
        "ViT-T-8-32",
        "--batch-size",
        "8",
    ]
    options += [
        "--train-num-samples",
        "160",
        "--epochs",
        "2",
        "--warmup",
        "2",
        "--save-every",
        "1",
        "--unique-by",
        "label",
    ]
    return [sys.executable, "-m", "clipfast", "train", *options, *extra]


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the run has saved ``step``."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended by itself: {process.communicate()}"
        if (folder / "checkpoints" / "epoch_latest.pt").exists() and saved_step(folder) >= step:
            return
        time.sleep(0.02)
    pytest.fail("no checkpoint after two minutes")


def saved_step(folder: Path) -> int:
    """Step of the latest checkpoint; reading it fails if it is ever broken."""
    return read_checkpoint(folder / "checkpoints" / "epoch_latest.pt")["clipfast"]["step"]


def test_schedule():
    rates = [cosine_lr(step, 1.0, 10, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert cosine_lr(0, 1.0, 0, 5) == 1.0


def test_a_run_leaves_what_it_should(shards, tmp_path):
    folder, signum = train(config(shards, tmp_path, val_data=shards, val_group_by="category", val_leave_out=("odd",)))
    assert signum is None
    results = json.loads((folder.path / "results.json").read_text())
    assert results["steps"] == 8
    assert results["images"] == 48
    assert results["without"]["groups"] == ["odd"]
    metrics = folder.metrics()
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in metrics if "eval" in line] == [4, 8]
    assert {path.name for path in folder.checkpoints.iterdir()} == {"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt"}
    for name in ("learning_curve.png", "contact_sheet.png"):
        assert (folder.path / name).stat().st_size > 10_000
    log = (folder.path / "out.log").read_text()
    assert "Train Epoch: 1 [32/32 (100%)] Data (t): " in log
    assert "Logit Scale: " in log
    assert "Contrastive_loss: " in log
    assert "Data-wait: " in log
    model = create_model(f"local-dir:{folder.path}")
    assert torch.equal(model.visual.proj, weights(folder.path)["visual.proj"])


def test_loss_goes_down(shards, tmp_path):
    folder, _ = train(config(shards, tmp_path, epochs=15))
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]


def test_backends_learn_the_same(shards, tmp_path):
    runs = [train(config(shards, tmp_path / backend, backend=backend))[0] for backend in ("auto", "torch")]
    ours, reference = ([line["loss"] for line in folder.metrics() if "loss" in line] for folder in runs)
    assert ours == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize("save_every", [3, 0], ids=["within an epoch", "after an epoch"])
def test_resumed_run_is_the_same_to_the_last_bit(shards, tmp_path, save_every):
    whole, _ = train(config(shards, tmp_path / "whole"))
    options = config(shards, tmp_path / "parts", save_every=save_every)
    step = save_every or 4
    # stop after the step that is saved, as a kill right after it would
    stopper = StopAfter(step)
    with pytest.raises(KeyboardInterrupt), stopper:
        train(options)
    part = tmp_path / "parts" / "run"
    assert saved_step(part) == step
    train(options, part / "checkpoints" / "epoch_latest.pt")
    a, b = weights(whole.path), weights(part)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    metrics = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 6, 8]


class StopAfter:
    """Raise KeyboardInterrupt in the training step after ``step`` of them, before anything more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> None:
        from clipfast.training.loop import Trainer

        self.original = original = Trainer._train_step
        limit = self.step

        def stopping(trainer, batch):
            if trainer.step == limit:
                raise KeyboardInterrupt
            return original(trainer, batch)

        Trainer._train_step = stopping

    def __exit__(self, *_: object) -> None:
        from clipfast.training.loop import Trainer

        Trainer._train_step = self.original


def test_kill_9_again_and_again(shards, tmp_path):
    whole = subprocess.run(command(shards, tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed" / "run"
    arguments = command(shards, tmp_path / "killed")
    for step in (5, 17, 31):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
        wait_for_checkpoint(process, folder, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # whole and readable, whatever the moment
        assert saved_step(folder) >= step
        arguments = [sys.executable, "-m", "clipfast", "train", "--resume", str(folder)]
    final = subprocess.run(arguments, capture_output=True, text=True)
    assert final.returncode == 0, final.stderr
    assert "Resuming from" in final.stderr
    a, b = weights(tmp_path / "whole" / "run"), weights(folder)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list((folder / "checkpoints").glob("*.tmp*")) or saved_step(folder) == 40


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interruption_saves_and_says_where(shards, tmp_path, signum):
    process = subprocess.Popen(
        command(shards, tmp_path, "--epochs", "2000"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_for_checkpoint(process, tmp_path / "run", 3)
    process.send_signal(signum)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert f"go on with: clipfast train --resume {tmp_path / 'run'}" in log
    assert "Traceback" not in log


def test_open_clip_loads_our_checkpoint_and_we_theirs(shards, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder, _ = train(config(shards, tmp_path))
    ours = load_checkpoint(model := create_model("ViT-T-8-32"), folder.latest)
    assert ours["epoch"] == 2
    # through the exported folder, and from the training checkpoint
    exported = open_clip.create_model(f"local-dir:{folder.path}")
    (tmp_path / "emoji.json").write_text(json.dumps(model.config.to_dict()))
    open_clip.add_model_config(tmp_path / "emoji.json")
    trained = open_clip.create_model("emoji", pretrained=str(folder.latest))
    for theirs in (exported, trained):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())
    # and one of theirs, as their trainer writes it on several GPUs
    state = {"module." + name: value for name, value in open_clip.create_model("emoji").state_dict().items()}
    torch.save({"epoch": 3, "name": "theirs", "state_dict": state}, tmp_path / "epoch_3.pt")
    load_checkpoint(model, tmp_path / "epoch_3.pt")
    assert torch.equal(model.text_projection, state["module.text_projection"])


def test_open_clip_training_can_be_gone_on_with(shards, tmp_path):
    model = create_model("ViT-T-8-32")
    from clipfast.training.optim import adamw

    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2)
    checkpoint = {"epoch": 1, "name": "theirs", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "epoch_1.pt")
    folder, _ = train(config(shards, tmp_path), tmp_path / "epoch_1.pt")
    assert [line["step"] for line in folder.metrics() if "loss" in line] == [6, 8]


def test_bad_samples_are_counted_and_capped(tmp_path):
    samples = [sample(index, **({"png": b"broken"} if index % 8 == 0 else {})) for index in range(64)]
    write_shard(tmp_path / "s.tar", samples)
    options = config(f"{tmp_path}/s.tar", tmp_path, train_num_samples=256, epochs=1)
    with pytest.raises(
        TrainingError,
        match=r"of \d+ pairs could not be used, more than --max-bad-fraction 0.01; they are listed in .*skipped.tsv",
    ):
        train(options)
    listed = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert all(line.split("\t")[0].startswith("s.tar/") for line in listed)
    folder, _ = train(dataclasses.replace(options, max_bad_fraction=0.2, name="tolerant"))
    assert json.loads((folder.path / "results.json").read_text())["skipped_pairs"] == 32


def test_loss_that_is_not_finite_stops_and_spares_the_checkpoint(shards, tmp_path):
    options = config(shards, tmp_path, lr=1e8, save_every=1, epochs=40, log_every=1)
    with pytest.raises(TrainingError, match="the loss is not finite at step"):
        train(options)
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_a_run_is_not_overwritten(shards, tmp_path):
    train(config(shards, tmp_path))
    before = weights(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run already: go on with --resume .*run, or choose another --name"):
        train(config(shards, tmp_path))
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data": ""}, "--train-data is needed"),
        ({"batch_size": 0}, "--batch-size must be more than 0, got 0"),
        ({"lr": -1.0}, "--lr must be more than 0"),
        ({"warmup": -1}, "--warmup must not be negative"),
        ({"crop_scale": (0.9, 0.1)}, "--crop-scale needs two shares of the area"),
        ({"train_num_samples": 4}, "--train-num-samples 4 is less than one batch of 8"),
        ({"precision": "fp8"}, "--precision must be one of auto, fp32"),
        ({"hue": 0.7}, "--hue must be at most 0.5, got 0.7"),
        ({"keyword_prob": 1.5}, "--keyword-prob must be at most 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"train_data": "x.tar"} | SMALL | options))


def test_recipes(tmp_path):
    assert list_recipes() == ["emoji"]
    assert TrainConfig(**read_recipe("emoji")).unique_by == "label"
    (tmp_path / "mine.toml").write_text("batch-size = 4\ncrop-scale = [0.5, 1.0]")
    assert read_recipe(str(tmp_path / "mine.toml")) == {"batch_size": 4, "crop_scale": (0.5, 1.0)}
    (tmp_path / "typo.toml").write_text("bach_size = 4")
    for name, message in (("typo.toml", "unknown options: bach_size"), ("none.toml", "no recipe")):
        with pytest.raises(ValueError, match=message):
            read_recipe(str(tmp_path / name))
