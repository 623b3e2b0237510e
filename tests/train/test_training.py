"""Training: the files of a run, bit-equal resumption, kill -9, Ctrl-C, and options of a resumed run."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import add_model_config, create_model, get_model_config, load_checkpoint
from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.cli.main import main
from clipfast.distributed.ending import TrainingError
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig
from clipfast.train.loop import train
from clipfast.train.optim import parse_arguments
from clipfast.train.option_checks import flag_name
from clipfast.train.trainer import Trainer

from ..small_runs import NAFLEX, RESNET, TINY, everything, output_of, refusal_of, sample, write_shard

SMALL = {
    "model": TINY, "batch_size": 8, "train_num_samples": 32, "epochs": 2, "warmup": 2, "lr": 1e-3, "workers": 0,
    "log_every_n_steps": 2, "save_frequency": 0,
}  # fmt: skip


def config(shards, tmp_path, **options):
    """Return the options of a training run of eight steps on the small shards."""
    return TrainConfig(
        **{"train_data": shards, "logs": str(tmp_path), "name": "run", "unique_by": "label"} | SMALL | options
    )


def losses(folder: RunFolder) -> list[float]:
    """Return the losses in the metrics of a training run."""
    return [line["loss"] for line in folder.metrics() if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights, their average and optimizer state of a training run's latest checkpoint, by name."""
    checkpoint = read_checkpoint(RunFolder(folder).latest)
    states = checkpoint["optimizer"]["state"].items()
    moments = {f"{index}.{key}": torch.as_tensor(value) for index, state in states for key, value in state.items()}
    averages = {f"average of {name}": value for name, value in checkpoint.get("state_dict_ema", {}).items()}
    return checkpoint["state_dict"] | averages | moments


def same(a: Path, b: Path) -> bool:
    """Return True if the latest checkpoints of two training runs are equal to the last bit."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def before_step(step, do):
    """Call ``do`` with the trainer before the training step that follows ``step``."""
    original = Trainer._train_step

    def interrupted(trainer, batch):
        """Call ``do`` if training has reached ``step``, then take the next step."""
        if trainer.progress.step == step:
            do(trainer)
        return original(trainer, batch)

    return mock.patch.object(Trainer, "_train_step", interrupted)


@contextlib.contextmanager
def stopped_after(step: int):
    """Stop a training run after ``step`` steps without any further save, as a kill would."""

    def stop(trainer):
        """Stop training once its checkpoints are written."""
        trainer.checkpoints.wait()
        raise KeyboardInterrupt

    with before_step(step, stop), pytest.raises(KeyboardInterrupt):
        yield


def command(shards, tmp_path, *extra: str) -> list[str]:
    """Return the command line of a run of 24 steps that saves after each, and keeps only the last checkpoints."""
    options = "--name run --batch-size 8 --train-num-samples 96 --epochs 2 --warmup 2 --save-every 1 --unique-by label"
    options += " --save-frequency 0"
    return ["train", "--train-data", shards, "--model", TINY, "--logs", str(tmp_path), *options.split(), *extra]


def started(arguments: list[str], **options) -> subprocess.Popen:
    """Start ``clipfast`` with the arguments of a training run as a separate process."""
    return subprocess.Popen([sys.executable, "-m", "clipfast", *arguments], stdout=subprocess.DEVNULL, **options)


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the training process has saved a checkpoint at ``step`` or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the run ended by itself: {process.communicate()}"
        if RunFolder(folder).latest.exists() and saved_step(folder) >= step:
            return
        time.sleep(0.02)
    pytest.fail("no checkpoint after two minutes")


def saved_step(folder: Path) -> int:
    """Return the step of the latest training checkpoint; the read fails if the file is ever incomplete."""
    return read_checkpoint(RunFolder(folder).latest)["clipfast"]["progress"]["step"]


def results_of(folder: Path) -> dict:
    """Return the content of a finished training run's ``results.json``."""
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_what_it_should(finished):
    results = results_of(finished.path)
    assert (results["steps"], results["images"], results["without"]["groups"]) == (8, 48, ["odd"])
    metrics = finished.metrics()
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in metrics if "eval" in line] == [4, 8]
    names = {"epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", "step_6.pt", "step_8.pt"}
    assert {path.name for path in finished.checkpoints.glob("*.pt")} == names
    for name in ("learning_curve.png", "contact_sheet.png"):
        assert (finished.path / name).stat().st_size > 10_000
    model = create_model(f"local-dir:{finished.path}")
    assert torch.equal(model.visual.proj, weights(finished.path)["visual.proj"])


def test_eight_pairs_are_learned(run_small, tmp_path):
    write_shard(tmp_path / "s.tar", [sample(index) for index in range(8)])
    found = losses(run_small(train_data=f"{tmp_path}/s.tar", train_num_samples=240, epochs=1))
    assert found[-1] < 0.1 * found[0]


RESUMED = {
    "workers": "workers=2 force_patch_dropout=0.5",  # dropped patches depend on the checkpoint's random state as well
    "drawn": "train_data_upsampling_factors=(0.5,2.0) dataset_resampled=True unique_by=None opt=stableadamw",
    "mixed": "train_data_upsampling_factors=(0.5,2.0) lr_scheduler=wsd decay_fraction=0.5 warmup=0.25",
    "muon": "opt=muon image_layer_decay=0.7 opt_kwargs=('nesterov=True',) wd_exclude=('*.weight',)",
    "8 bits": "precision=amp_fp8 fp8_recipe=full fp8_skip=(0,0) micro_batch_size=3",
    "resnet": f"model={RESNET} ema_decay=0.7",
    "locked resnet": f"model={RESNET} lock_image=True lock_image_unlocked_groups=1 lock_image_freeze_bn_stats=True "
    "ema_decay=0.5 micro_batch_size=4",
    "naflex": f"model={NAFLEX} use_naflex=True unique_by=None naflex_seq_lens=(8,16,24) "
    "naflex_max_tokens_per_batch=128 naflex_batch_divisor=4",
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_same_to_the_last_bit(case, run_small, small, tmp_path):
    options = parse_arguments(RESUMED[case].split()) | {"log_every_n_steps": 1}
    part = RunFolder(tmp_path / "part")
    whole = run_small(name="whole", **options)
    if "lr_scheduler" in options:
        rates = [line["lr"] for line in whole.metrics() if "lr" in line]
        assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
        assert {group["lr"] for group in read_checkpoint(whole.latest)["optimizer"]["param_groups"]} == {rates[-1]}
    options |= {"save_every": 3}
    for resume, step in ((None, 3), (part.latest, 4)):  # the run is resumed in the middle of an epoch, and at its end
        with stopped_after(step):
            train(dataclasses.replace(small(**options), name="part"), resume)
        assert saved_step(part.path) == step
    run_small(part.latest, "part", **options | {"workers": 1})
    assert same(whole.path, part.path)
    assert losses(part) == losses(whole)


def test_one_process_holds_a_run_and_kill_9_loses_nothing(shards, tmp_path, capsys):
    folder = tmp_path / "killed" / "run"
    arguments = command(shards, tmp_path / "killed")
    process = started(arguments, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(process, folder, 3)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # before this wait ends, threads of the process may still write
    before = everything(folder)
    for words in (arguments, ["train", "--resume", str(folder)]):
        err = refusal_of(capsys, *words)
        assert re.search(f"run is in use by process {process.pid} on .* since 20", err)
    assert everything(folder) == before
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 2  # PyTorch's data workers by themselves end only within 5 s
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a data worker lives on"
        time.sleep(0.02)
    assert 3 <= saved_step(folder) < 24
    assert main(["train", "--resume", str(folder)]) == 0
    assert main(command(shards, tmp_path / "whole", "--workers", "0")) == 0
    assert same(tmp_path / "whole" / "run", folder)
    assert [path.name for path in folder.rglob("*.tmp")] == []
    assert results_of(folder)["steps"] == 24


def is_alive(pid):
    """Return True if a process of a training run, such as a data worker, is still alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_saves_and_says_where(shards, tmp_path):
    """Ctrl-C, which a terminal also sends to the data workers, saves a checkpoint and prints the command to resume."""
    arguments = command(shards, tmp_path, "--epochs", "2000")
    process = started(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_checkpoint(process, tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert log.count(f"clipfast train --resume {tmp_path / 'run'}") == 1
    assert not re.search("Traceback|killed by signal", log)


def test_open_clip_loads_our_checkpoint(run_small, tmp_path, open_clip_registry):
    open_clip = pytest.importorskip("open_clip")
    folder = run_small(model="ViT-T-8-32", epochs=1)
    model = create_model("ViT-T-8-32")
    load_checkpoint(model, folder.latest)
    # OpenCLIP loads the weights from the exported folder, and from the training checkpoint.
    exported = open_clip.create_model(f"local-dir:{folder.path}")
    (tmp_path / "emoji.json").write_text(json.dumps(model.config.to_dict()))
    open_clip.add_model_config(tmp_path / "emoji.json")
    trained = open_clip.create_model("emoji", pretrained=str(folder.latest))
    for theirs in (exported, trained):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


def test_open_clip_training_can_be_gone_on_with(small, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.CLIP(**get_model_config("ViT-T-8-32").to_dict())
    # the two optimizer groups of OpenCLIP's trainer: without and with weight decay
    named, parts = list(theirs.named_parameters()), ("bn", "ln", "bias", "logit_scale")
    plain = {name for name, p in named if p.ndim < 2 or any(part in name for part in parts)}
    groups = [[p for name, p in named if (name in plain) is is_plain] for is_plain in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=1.0)
    for _, p in named:
        # a moment whose value identifies its parameter
        p.grad = torch.full_like(p, p.numel() % 997 + 1.0)
    optimizer.step()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in named}
    checkpoint = {"epoch": 1, "name": "theirs", "state_dict": theirs.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "epoch_1.pt")
    options = small(model="ViT-T-8-32")
    trainer = Trainer(options, RunFolder(tmp_path / "x"), read_checkpoint(tmp_path / "epoch_1.pt"))
    for name, p in trainer.model.named_parameters():
        assert torch.equal(trainer.optimizer.state[p]["exp_avg"], moments[name]), name
    # the optimizer's options are those of the new run, not those of OpenCLIP's checkpoint
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0, 0.2]
    folder, _ = train(options, tmp_path / "epoch_1.pt")
    assert [line["step"] for line in folder.metrics() if "loss" in line] == [6, 8]


def test_a_run_goes_on_with_other_options_and_is_not_overwritten(small, copied, capsys):
    before = copied.latest.read_bytes()
    with pytest.raises(ValueError, match=r"--resume .*run, or .* --name"):
        train(small())
    assert copied.latest.read_bytes() == before
    # The third epoch has two steps of 16 pairs. The two epochs before it count as four such steps.
    words = f"train --resume latest --name run --logs {copied.path.parent} --epochs 3 --wd 0.5 --beta2 0.9"
    assert main([*words.split(), "--batch-size", "16", "--val-frequency", "0"]) == 0
    checkpoint = read_checkpoint(copied.latest)
    groups = checkpoint["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.0, (0.9, 0.9)), (0.5, (0.9, 0.9))]
    assert (checkpoint["epoch"], checkpoint["clipfast"]["progress"]["step"]) == (3, 6)
    recorded = json.loads((copied.path / "config.json").read_text())
    change = {"after_step": 4, "epochs": 3, "wd": 0.5, "beta2": 0.9, "batch_size": 16, "val_frequency": 0}
    assert (recorded["batch_size"], recorded["changes"]) == (8, [change])
    for words, said in (
        ("latest", "--name"),
        (f"{copied.path} --model RN50", "--model"),
        (f"{copied.path} --model RN50 --name other", "--model"),
        (f"{copied.path} --lr 1", "finished 6 of 6 steps, .*--lr 0.001 -> 1"),
    ):
        err = refusal_of(capsys, "train", "--resume", *words.split())
        assert re.search(said, err)
    assert json.loads((copied.path / "config.json").read_text()) == recorded
    assert not (copied.path.parent / "other").exists()


def test_model_and_length_come_from_the_checkpoint(small, tmp_path):
    # A run can be resumed without the model's file and the weights from which it was started.
    shutil.copy(TINY, tmp_path / "mine.json")
    add_model_config(tmp_path / "mine.json")
    torch.save(create_model("mine").state_dict(), tmp_path / "start.pt")
    own = {"model": str(tmp_path / "mine.json"), "pretrained": str(tmp_path / "start.pt")}
    options = small(**own, train_num_samples=None)
    folder, _ = train(dataclasses.replace(options, epochs=1))
    for name in ("mine.json", "start.pt"):
        (tmp_path / name).unlink()
    train(options, folder.latest)
    assert saved_step(folder.path) == 2 * (48 // 8)


@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("progress", "kinds", "no 'kinds': start from its weights"),
        ("stream", "num_samples", "no 'num_samples': start from its weights"),
        ("stream", "order", "within an epoch of another version of clipfast, which has another order"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(part, name, said, small, finished, tmp_path):
    content = read_checkpoint(finished.latest)
    content["clipfast"]["progress"]["step"] -= 1
    del content["clipfast"][part][name]
    with pytest.raises(ValueError, match=said):
        Trainer(small(), RunFolder(tmp_path / "x"), content)


def test_a_checkpoint_from_elsewhere_starts_a_run_of_its_own(copied, tmp_path):
    (tmp_path / "home" / "downloads").mkdir(parents=True)
    downloaded = copied.latest.rename(tmp_path / "home" / "downloads" / "epoch_latest.pt")
    shutil.rmtree(copied.path)
    assert main(f"train --resume {downloaded} --epochs 3 --val-frequency 0 --logs {tmp_path}".split()) == 0
    assert (tmp_path / "run" / "results.json").exists()
    assert [path.name for path in (tmp_path / "home").rglob("*")] == ["downloads", "epoch_latest.pt"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_data", "pipe:touch owned"), ("train_data", "bundled:pipe:touch owned"),
        ("train_data", "a.tar::https://e.org/b.tar"), ("opt", "tests.train.test_optimizers:Half"),
        ("remote_sync", "s3://theirs"),
    ],
)  # fmt: skip
def test_a_checkpoint_or_recipe_runs_and_sends_nothing_by_itself(key, value, tmp_path, capsys, monkeypatch):
    """Checkpoints and recipes may be untrusted: options in them may hold shell commands, or name modules to import."""
    monkeypatch.chdir(tmp_path)
    config = {"train_data": "x.tar", key: value}
    torch.save({"state_dict": {}, "clipfast": {"config": config}}, "run.pt")
    Path("recipe.toml").write_text("\n".join(f'{name} = "{text}"' for name, text in config.items()))
    for arguments in (["--resume", "run.pt"], ["--recipe", "recipe.toml"]):
        err = refusal_of(capsys, "train", *arguments)
        assert re.search(f"{re.escape(value)}.*: .*give {flag_name(key)} yourself", err)
        output_of(capsys, "train", *arguments, flag_name(key), value, "--print-config")
    assert not Path("owned").exists()


def test_an_epoch_is_saved_before_its_evaluation(shards, run_small, tmp_path):
    with pytest.raises(ValueError, match="evne"):
        run_small(val_data=shards, val_group_by="category", val_leave_out=("evne",))
    assert saved_step(tmp_path / "run") == 4


def test_weights_that_are_not_finite_stop_and_spare_the_checkpoint(run_small, tmp_path):
    original = Trainer._train_step

    def ruined(trainer, batch):
        """Take a training step, and make a weight infinite after step 5."""
        figures = original(trainer, batch)
        if trainer.progress.step == 5:
            trainer.model.text_projection.data[0, 0] = float("inf")
        return figures

    ruining = mock.patch.object(Trainer, "_train_step", ruined)
    with ruining, pytest.raises(TrainingError, match=r"weights are not finite at step 6.*--lr"):
        run_small(save_every=1, log_every_n_steps=1)
    assert saved_step(tmp_path / "run") == 5
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
