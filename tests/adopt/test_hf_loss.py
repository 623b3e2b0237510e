"""The loss of transformers' models: its values, its outputs, several ranks, and the Trainer."""

import copy
import os
import pickle
import socket

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import clipfast

from ..processes import run_ranks
from . import hf_models
from .pairs import HF_NAMES, made, pair, patch

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", HF_NAMES)
def test_outputs(name):
    model, patched = pair(name)
    given = hf_models.inputs(model, "end")

    def assert_equal(ours, theirs):
        """Check that the outputs of a patched model of transformers are those of the original."""
        torch.testing.assert_close(hf_models.flat(ours), hf_models.flat(theirs), rtol=1e-10, atol=1e-10)

    theirs, lean = model(**given, return_loss=True), patched(**given, return_loss=True)
    assert type(lean) is type(theirs)
    for logits in (lean.logits_per_image, lean.logits_per_text, pickle.loads(pickle.dumps(lean)).logits_per_text):
        for use in (lambda x: x.softmax(1), lambda x: x[0], lambda x: 2.0 * x, lambda x: torch.softmax(x, 1), len):
            with pytest.raises((AttributeError, TypeError), match="return_logits=True"):
                use(logits)
        assert not isinstance(logits, torch.Tensor)
        assert not hasattr(logits, "dtype")
        assert "return_logits=True" in repr(copy.deepcopy(logits))
    whole = patched(**given, return_loss=True, return_logits=True)
    assert whole.logits_per_image.shape == (3, 3)
    # the last block computes one row, and hidden states are not returned
    got, expected = hf_models.flat(whole), hf_models.flat(theirs)
    torch.testing.assert_close(got, {key: expected[key] for key in got}, rtol=1e-10, atol=1e-10)
    by_place = {key: x for key, x in given.items() if key != "input_ids"}
    got = hf_models.flat(patched(given["input_ids"], **by_place, return_loss=True))
    torch.testing.assert_close(got, {key: expected[key] for key in got}, rtol=1e-10, atol=1e-10)
    tuples = [each(**given, return_loss=True, return_dict=False)[:5] for each in (patched, model)]
    assert_equal(*tuples)
    # transformers' models ignore unknown arguments, also after another model was patched
    model(**given, return_loss=True, return_logits=True)
    assert_equal(*(each.eval()(**given, return_loss=True) for each in (patched, model)))
    assert patched.train()(**given).loss is None


CASES = {"clip": (5, 2), "siglip": (3, 3)}  # the numbers of pairs on two ranks


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients that a patched model of transformers has, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def steps_of_rank(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return a patched model's losses on a rank, and its gradients averaged by DistributedDataParallel, by model."""
    found = {}
    for name, sizes in CASES.items():
        model = patch(made(name))
        given = hf_models.inputs(model, "end", batch=sum(sizes))
        given = {key: x[rank * sizes[0] :][: sizes[rank]] for key, x in given.items()}
        wrapped = DistributedDataParallel(model)
        losses = []
        for _ in range(2):  # DDP fails in the second step if a parameter had no gradient in the first
            model.zero_grad()
            loss = wrapped(**given, return_loss=True).loss
            loss.backward()
            losses.append(loss.detach())
        found[name] = {"losses": torch.stack(losses), **gradients_of(model)}
        if rank == 0:  # in evaluation, one rank may call the model alone
            model.eval()(**given, return_loss=True)
    with pytest.raises(ValueError, match=r"equally many pairs from every rank, got \[2, 3\]"):
        wrapped.train()(**{key: x[: 2 + rank] for key, x in given.items()}, return_loss=True)
    return found


def test_two_ranks_have_the_loss_of_the_whole_batch(tmp_path):
    """On two ranks, each rank has the loss of all pairs; SigLIP needs equally many pairs on all ranks."""
    found = run_ranks(steps_of_rank, 2, folder=tmp_path, timeout=180.0)
    for name, sizes in CASES.items():
        model = hf_models.make(name).double()
        # transformers' loss of the whole batch in one process
        loss = model(**hf_models.inputs(model, "end", batch=sum(sizes)), return_loss=True).loss
        loss.backward()
        gradients = gradients_of(model)
        largest = max(float(x.abs().max()) for x in gradients.values())
        for rank in found:
            torch.testing.assert_close(rank[name].pop("losses"), loss.detach().expand(2), rtol=1e-12, atol=0)
            assert rank[name].keys() == gradients.keys()
            assert max(float((rank[name][key] - x).abs().max()) for key, x in gradients.items()) < 1e-10 * largest


STEPS, BATCH = 6, 4


class Pairs(torch.utils.data.Dataset):
    """A data set of random pairs for transformers' Trainer."""

    def __init__(self, model: torch.nn.Module, number: int) -> None:
        self.given = hf_models.inputs(model, "end", batch=number)

    def __len__(self) -> int:
        return len(self.given["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"unknown": torch.zeros(1), **{key: x[index] for key, x in self.given.items()}}


def trainer_of_rank(rank: int, world_size: int, port: int, folder: str) -> dict[str, torch.Tensor]:
    """Train by transformers' Trainer on a rank; return the weights, the logged losses, and predicted logits."""
    from transformers import Trainer, TrainingArguments

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    model = clipfast.apply_to_hf(hf_models.make("clip").double())
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, train_sampling_strategy="sequential", disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    data = Pairs(model, STEPS * world_size * BATCH)
    trainer = Trainer(model, arguments, data_collator=clipfast.hf_collator, train_dataset=data)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    predicted = trainer.predict(Pairs(model, 2 * world_size * BATCH)).predictions
    report = clipfast.report_kernels(model)
    assert "clipfast.contrastive_loss over all ranks" in report, report
    return {"losses": losses, "logits": torch.tensor(predicted[0]), **model.state_dict()}


def reference() -> tuple[torch.nn.Module, list[float]]:
    """Train an original model of transformers in one process on the pairs of all ranks, by a plain loop."""
    model = hf_models.make("clip").double()
    data = Pairs(model, STEPS * 2 * BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = clipfast.hf_collator([data[step * 2 * BATCH + i] for i in range(2 * BATCH)])
        batch.pop("unknown")
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_the_trainer_on_two_ranks_equals_one_with_the_negatives_of_both(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    (tmp_path / "ranks").mkdir()
    runs = run_ranks(trainer_of_rank, 2, 2, port, str(tmp_path / "out"), folder=tmp_path / "ranks", timeout=240.0)
    model, losses = reference()
    data = Pairs(model, 4 * BATCH)
    batches = [{key: x[BATCH * i : BATCH * (i + 1)] for key, x in data.given.items()} for i in range(4)]
    with torch.no_grad():
        expected = torch.cat([model.eval()(**batch).logits_per_image for batch in batches])
    for run in runs:
        torch.testing.assert_close(run.pop("losses").double(), torch.tensor(losses).double(), rtol=0, atol=1e-4)
        # In evaluation, a patched model's logits are of the rank's batch, as those of the original.
        torch.testing.assert_close(run.pop("logits"), expected, rtol=1e-6, atol=1e-6)
        assert run.keys() == model.state_dict().keys()
        for key, x in model.state_dict().items():
            torch.testing.assert_close(run[key], x, rtol=1e-8, atol=1e-8)
    assert losses[-1] < losses[0]
