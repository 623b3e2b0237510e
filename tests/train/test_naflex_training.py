"""Training runs of a NaFlex model on images in their own aspect: they learn, and resume bit-equal, on any ranks."""

import math
import statistics
from unittest import mock

import pytest
import torch

from clipfast.cli.main import main
from clipfast.distributed.world import ALONE
from clipfast.evaluate.encoder import Encoder
from clipfast.models import CLIP, build
from clipfast.models.registry import read_model_config
from clipfast.models.sequence_size import ToSequence
from clipfast.models.tokenizer import Tokenizer
from clipfast.train import TrainConfig, step, validation
from clipfast.train.batches import plan_of
from clipfast.train.build import Distillation
from clipfast.train.data import TrainingData
from clipfast.train.loop import train
from clipfast.train.preflight import batch_bytes

from ..small_runs import NAFLEX
from .distributed import assert_near, folder_of, trained
from .test_training import losses, results_of, saved_step, stopped_after, weights

RANKS = {"naflex_max_tokens_per_batch": 96, "naflex_batch_divisor": 4, "batch_size": 5}
# Options on one process, for the batches that RANKS gives on two processes.
ALL = {"naflex_max_tokens_per_batch": 192, "naflex_batch_divisor": 8, "batch_size": 10}


@pytest.fixture(scope="module")
def naflex(options):
    """Return a function that returns the options of a run of 20 steps of 8 or 24 pairs, with changes."""
    own = {
        "global_batch_size": None, "train_num_samples": 117, "epochs": 2, "save_every": 3, "use_naflex": True,
        "naflex_seq_lens": (8, 16, 24), "naflex_loss_scale": "linear", **ALL,
    }  # fmt: skip
    return lambda logs, **changes: options(logs, "naflex", **own | changes)


def learned(folder, config):
    """Return each step's loss over the loss of guessing, which is log(number of pairs in the batch)."""
    plan = plan_of(config, ALONE, {})
    return [loss / math.log(plan[number].pairs) for number, loss in enumerate(losses(folder))]


@pytest.mark.long
def test_the_loss_falls(naflex, tmp_path):
    config = TrainConfig(**naflex(tmp_path, train_data="synthetic:512", train_num_samples=480, epochs=1, lr=3e-3))
    folder, _ = train(config)
    found = learned(folder, config)
    assert {plan_of(config, ALONE, {})[number].seq_len for number in range(len(found))} == {8, 16, 24}
    assert statistics.fmean(found[-6:]) < 0.75 * statistics.fmean(found[2:8])
    lines = [line for line in folder.metrics() if "loss" in line]
    assert all(line["patches_per_second"] <= 24 * line["pairs_per_second"] for line in lines)
    assert (folder.path / "out.log").read_text().count("Patches: ") == len(lines)


@pytest.mark.parametrize(("most_patches", "most_texts", "expected"), [(100, 24, 4), (100, 9, 2)])
def test_micro_batches_are_fitted_by_their_patches_and_texts(
    most_patches, most_texts, expected, naflex, tmp_path, monkeypatch
):
    """A batch of 8 pairs has the longest images, of 24 patches; one of 24 pairs has the most texts, and 8 patches."""
    forward, parts = CLIP.forward, []

    def limited(model, images, texts):
        """Compute the features of a micro-batch, and fail if its graph does not fit into memory."""
        if torch.is_grad_enabled():
            parts.append((len(images.patches), len(texts)))
            if parts[-1][0] > most_patches or parts[-1][1] > most_texts:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(model, images, texts)

    monkeypatch.setattr(step, "_can_run_out", lambda device: True)
    monkeypatch.setattr(CLIP, "forward", limited)
    folder, _ = train(TrainConfig(**naflex(tmp_path, micro_batch_size="auto", epochs=1)))
    found = (folder.path / "out.log").read_text()
    assert f"--micro-batch-size auto: {expected} of 8 pairs with up to 24 patches each at a time (the most" in found
    # Three times as many pairs fit into a micro-batch if their images have 8 patches.
    assert max(texts for _, texts in parts[4:]) == 3 * expected


@pytest.mark.parametrize(("changes", "patch_size"), [({}, 4), ({"naflex_patch_sizes": (8, 4)}, 8)])
def test_evaluation_takes_the_longest_sequence_and_the_first_patch_size(changes, patch_size, naflex, tmp_path):
    given = naflex(tmp_path, epochs=1, **changes)
    with mock.patch.object(validation, "encode_set", side_effect=validation.encode_set) as encode:
        folder, _ = train(TrainConfig(**given | {"val_data": given["train_data"]}))
    assert [call.args[0][0].transform for call in encode.call_args_list] == [ToSequence(patch_size, 24)]
    assert results_of(folder.path)["images"] == 70
    assert Encoder.load(f"local-dir:{folder.path}", device="cpu").transform == ToSequence(4, 24)


def test_without_training_data_it_evaluates_with_the_longest_sequence(naflex, tmp_path, monkeypatch, capsys):
    load, seen = Encoder.load, []
    monkeypatch.setattr(Encoder, "load", lambda *args, **others: seen.append(load(*args, **others)) or seen[-1])
    torch.save(build(read_model_config(NAFLEX)).state_dict(), tmp_path / "weights.pt")
    words = f"train --val-data {naflex(tmp_path)['train_data']} --model {NAFLEX} --pretrained {tmp_path}/weights.pt"
    words += " --device cpu --use-naflex --naflex-seq-lens 8 16"
    assert main(words.split()) == 0
    assert [encoder.transform for encoder in seen] == [ToSequence(4, 16)]
    assert main([*words.split(), "--naflex-patch-sizes", "8"]) == 2
    assert "leave out --naflex-patch-sizes" in capsys.readouterr().err


def test_batches_change_at_the_end_of_an_epoch_only(naflex, tmp_path):
    given = naflex(tmp_path)
    with stopped_after(4):
        train(TrainConfig(**given))
    folder = folder_of(given)
    plain = {key: value for key, value in given.items() if "naflex" not in key}
    for other, said in (
        (given | {"naflex_seq_lens": (8, 16)}, r"leave --naflex-seq-lens \(was \[8, 16, 24\]\) as it was"),
        (plain, "leave --use-naflex as it was"),
    ):
        with pytest.raises(ValueError, match=f"within an epoch, whose data cannot change: {said}"):
            train(TrainConfig(**other), folder.latest)
    train(TrainConfig(**given | {"epochs": 1, "naflex_loss_scale": "sqrt"}), folder.latest)
    train(TrainConfig(**given | {"naflex_max_tokens_per_batch": 384}), folder.latest)
    steps = plan_of(TrainConfig(**given | {"naflex_max_tokens_per_batch": 384}), ALONE, {}).batches_for(2 * 117)
    assert saved_step(folder.path) == steps


def test_no_batch_is_larger_than_the_check_before_the_run_thinks(naflex, tmp_path):
    config, model = TrainConfig(**naflex(tmp_path)), build(read_model_config(NAFLEX))
    data = TrainingData(config)
    made = list(data.batches(0, model, Tokenizer(model.context_length), pin_memory=False))
    most = max(batch.images.patches.nbytes + batch.texts.nbytes for batch in made)
    assert most <= batch_bytes(data.plan, model) <= 1.25 * most


def test_a_teacher_must_be_naflex(naflex, tmp_path):
    given = naflex(tmp_path, distill_model="ViT-T-8-32", distill_pretrained=str(tmp_path / "t.pt"))
    torch.save({}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="--use-naflex needs a NaFlex model as --distill-model, not ViT-T-8-32"):
        Distillation(TrainConfig(**given), build(read_model_config(NAFLEX)), torch.device("meta"))


@pytest.mark.long
@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch_size": 2}, {"fsdp": True, "grad_checkpointing": True}], ids=["ddp", "parts", "fsdp"]
)
def test_ranks_take_the_steps_of_one_process(changes, naflex, together, tmp_path):
    """A run on two processes that was saved at step 6 is resumed on one process."""
    one = naflex(tmp_path / "one")
    assert trained(ALONE, one) is None
    given = naflex(tmp_path / "two", **RANKS, **changes)
    assert together(2, (given, ("stop", (0, 1), 8))) == [["stopped"]] * 2
    assert saved_step(folder_of(given).path) == 6
    assert trained(ALONE, given) is None
    assert losses(folder_of(given)) == pytest.approx(losses(folder_of(one)), rel=1e-5)
    assert_near(weights(folder_of(given).path), weights(folder_of(one).path))
