"""Helpers that train on several processes in tests, and let some ranks fail."""

import contextlib
import os
import time
from pathlib import Path
from unittest import mock

import pytest

from clipfast.checkpoints.of_run import Checkpoints
from clipfast.data.index import ShardError
from clipfast.distributed.ending import TrainingError
from clipfast.distributed.world import joined
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig
from clipfast.train.loop import train
from clipfast.train.optim import parse_arguments
from clipfast.train.trainer import Trainer

from ..models.siglip import save_tokenizer
from ..processes import run_ranks
from ..small_runs import NAFLEX, SIGLIP, TINY, picture, sample, write_shard
from .faults import faulty_samples
from .test_training import losses, results_of, weights

# Options of runs of 12 or 9 steps of 12 pairs, by the name of the run. No epoch is a whole number of batches.
CASES = {
    "unique": "unique_by=label micro_batch_size=2 train_num_samples=47 epochs=3",
    "mix": "train_data_upsampling_factors=(1.0,2.5) force_patch_dropout=0.5 grad_checkpointing=True grad_clip_norm=0.5 "
    "micro_batch_size=3 image_layer_decay=0.7 wd_exclude=('*positional_embedding',)",
    "siglip": "dataset_resampled=True ddp_static_graph=True grad_checkpointing=True grad_clip_norm=0.3 ema_decay=0.9",
    "faults": "max_bad_fraction=0.3 log_every_n_steps=4",
    "drawn": f"train_data=synthetic:400 samples_seen=100 epochs={TrainConfig.epochs} ema_decay=0.9 lock_text=True "
    "lock_text_unlocked_layers=1 lock_image=True lock_image_unlocked_groups=1 micro_batch_size=2 grad_clip_norm=0.5 "
    "selective_checkpointing=True",
}
SHORT = {"train_num_samples": 144, "save_every": 3, "unique_by": "label", "log_every_n_steps": 5}


def options_in(made):
    """Write data and a tokenizer into ``made``; return a function that returns the options of a run on these data."""
    write_shard(made / "a.tar", [sample(index) for index in range(60)])
    write_shard(made / "b.tar", [sample(index, png=picture(100 + index)) for index in range(41)])
    write_shard(made / "faults.tar", faulty_samples())
    write_shard(made / "naflex.tar", [sample(index, png=picture(index, 24, 24 + index)) for index in range(70)])
    write_shard(made / "val.tar", [*faulty_samples(), *(sample(index, png=picture(3)) for index in range(40))])
    save_tokenizer(made / "tokenizer")

    def of_case(logs, case="unique", **changes):
        """Return the options of the training run ``case`` of CASES, with ``changes``."""
        own = made / f"{case}.tar"
        given = {
            "train_data": str(own) if own.exists() else f"{made}/a.tar::{made}/b.tar",
            "model": {"siglip": SIGLIP, "naflex": NAFLEX}.get(case, TINY),
            "tokenizer": f"{made}/tokenizer" if case == "siglip" else None,
            "global_batch_size": 12, "train_num_samples": 141, "epochs": 1, "warmup": 2, "lr": 1e-3, "workers": 0,
            "log_every_n_steps": 1, "save_frequency": 0, "name": case, "logs": str(logs),
            "val_data": f"{made}/val.tar" if case in CASES else None,
        }  # fmt: skip
        return given | parse_arguments(CASES.get(case, "").split()) | changes

    return of_case


def folder_of(given):
    """Return the folder of the training run that has these options."""
    return RunFolder(Path(given["logs"]) / given["name"])


@contextlib.contextmanager
def befalling(rank, what, victims, step):
    """Let the event ``what`` happen to the ranks ``victims`` of a training run after ``step`` steps.

    It is "stop" (a KeyboardInterrupt), "hang", "error" (a missing shard), or the number of a signal.
    """
    original = Trainer._train_step

    def befallen(trainer, batch):
        """Let the event happen to this rank if it is a victim, then take the training step."""
        if trainer.progress.step == step:
            trainer.checkpoints.wait()
        if trainer.progress.step == step and rank in victims:
            if what == "stop":
                raise KeyboardInterrupt
            if what == "hang":
                time.sleep(600)
            if what == "error":
                raise ShardError("shard x is gone")
            os.kill(os.getpid(), what)
        return original(trainer, batch)

    with mock.patch.object(Trainer, "_train_step", befallen):
        yield


def newest(given):
    """Return the newest complete checkpoint of the training run that has these options, or None."""
    return Checkpoints(folder_of(given).checkpoints).newest_whole().path


def trained(world, given, fate=None, faults=None):
    """Train as one rank, from the newest checkpoint if there is one; return the reason of its end.

    The reason is a signal, "stopped", the text of a TrainingError, or None. ``faults(rank)`` is a context in which the
    rank trains.
    """
    with (
        mock.patch("clipfast.train.validation.BATCH_SIZE", 16),
        befalling(world.rank, *fate) if fate else contextlib.nullcontext(),
        faults(world.rank) if faults else contextlib.nullcontext(),
    ):
        try:
            return train(TrainConfig(**given), newest(given), world=world)[1]
        except KeyboardInterrupt:
            return "stopped"
        except TrainingError as error:
            return str(error)


def on_rank(rank, size, jobs, do=trained):
    """Do the jobs of a training test as one rank of a group, and return their results."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    found = []
    for job in jobs:
        timeout = job[0].get("dist_timeout", 30)
        with joined("cpu", timeout) as world, mock.patch("clipfast.train.loop._pictures", return_value=[]):
            found.append(do(world, *job))
    return found


def skipped_in(folder):
    """Return the sorted lines of a training run's list of skipped pairs."""
    return sorted(folder.skipped_path.read_text().splitlines())


def assert_like(folder, expected):
    """Assert that a run equals ``expected`` in losses, skipped pairs, weights and results, except for rounding."""
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-5)
    assert skipped_in(folder) == skipped_in(expected)
    assert_near(weights(folder.path), weights(expected.path))
    ours, theirs = (results_of(run.path) for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert ours["clip_val_loss"] == pytest.approx(theirs["clip_val_loss"], rel=1e-5)
    for key in ("steps", "samples_seen", "skipped_pairs", "skipped_kinds", "images", "skipped_images", "classes"):
        assert ours[key] == theirs[key], key


def assert_near(found, expected):
    """Compare trained weights within a tolerance: AdamW divides gradients by their size, so rounding matters."""
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-7, name


def run_together(folder, size, *jobs):
    """Run training jobs one after the other on a group of ranks, and return the results of each rank."""
    return run_ranks(on_rank, size, size, jobs, folder=empty(folder), timeout=240)


def empty(tmp_path):
    """Make a folder for the files by which the ranks of a training run communicate."""
    path = tmp_path / f"ranks {time.monotonic_ns()}"
    path.mkdir()
    return path
