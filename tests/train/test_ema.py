"""The moving average of the weights: values, BatchNorm, evaluation, export, and resumed runs."""

import contextlib
import json
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipfast import create_model
from clipfast.checkpoints.checkpoint import CheckpointError, read_checkpoint
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.evaluate import evaluate
from clipfast.evaluate.features import encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.factory import transform_of
from clipfast.models import build
from clipfast.models.registry import read_model_config
from clipfast.train.build import build_tokenizer
from clipfast.train.ema import WeightAverage
from clipfast.train.loop import train

from ..small_runs import TINY
from .test_training import config


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=dtype)
        self.norm = nn.BatchNorm1d(2)
        self.locked = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("other", torch.zeros(1), persistent=False)


def moved(model, generator):
    """Change weights and BatchNorm statistics as a training step would, so that their moving average changes."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name == "norm.num_batches_tracked":
                value += 1
            elif name != "locked":
                value.add_(torch.randn(value.shape, generator=generator).to(value.dtype))


def test_weights_in_the_memory_of_the_host_and_a_verdict_of_the_gpu():
    with FakeTensorMode(), mock.patch.object(torch, "_foreach_mul_") as multiply:
        WeightAverage(Small(), 0.6).update(1, torch.zeros((), device="cuda"))
        assert {call.args[1].device.type for call in multiply.call_args_list} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(dtype):
    model, generator = Small(dtype), torch.Generator().manual_seed(0)
    average = WeightAverage(model, 0.6)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(1, 9):
        moved(model, generator)
        average.update(step, torch.tensor(0.0))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    state = average.state_dict()
    assert state["norm.num_batches_tracked"] == 8
    assert state["locked"].data_ptr() == model.locked.data_ptr()  # the average does not copy constant weights
    for name in ("linear.weight", "linear.bias", "norm.running_mean", "norm.running_var", "norm.weight"):
        assert state[name].dtype is torch.float32
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_model_gets_its_weights_back():
    model = Small()
    average = WeightAverage(model, 0.9)
    moved(model, torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    with contextlib.suppress(ZeroDivisionError), average.applied():
        assert torch.equal(model.linear.weight, average.averages["linear.weight"])
        assert torch.equal(model.norm.running_mean, average.averages["norm.running_mean"])
        assert not torch.equal(model.linear.weight, before["linear.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # CUDA graphs read the weights at the addresses that they had at the capture.
    assert [value.data_ptr() for value in model.state_dict().values()] == pointers


def test_a_state_that_does_not_fit_is_refused():
    average = WeightAverage(Small(), 0.9)
    state = average.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    average.load_state_dict(wrapped)
    for wrong in (state | {"linear.weight": torch.ones(2, 4)}, {"locked": state["locked"]}):
        with pytest.raises(CheckpointError, match=r"state_dict_ema .* does not fit the model: .*linear.w"):
            average.load_state_dict(wrong)


def averages(folder):
    """Return the moving average of the weights in the latest training checkpoint."""
    return read_checkpoint(folder.latest)["state_dict_ema"]


def equal(a, b):
    """Return True if two states of trained weights, or of their averages, are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_the_average_is_evaluated_and_exported(shards, tmp_path):
    options = {"ema_decay": 0.9, "val_data": shards, "epochs": 3}
    folder, _ = train(config(shards, tmp_path, **options))
    exported = create_model(f"local-dir:{folder.path}").state_dict()
    assert equal(exported, averages(folder))
    results = json.loads((folder.path / "results.json").read_text())
    assert results["ema"] == {"decay": 0.9}
    evals = [line["eval"] for line in folder.metrics() if "eval" in line]
    assert evals[-1]["retrieval"] == results["retrieval"]
    last = read_checkpoint(folder.latest)["state_dict"]
    for weights, expected in ((averages(folder), results), (last, results["raw"])):
        model = build(read_model_config(TINY)).eval()
        model.load_state_dict(weights)
        tokenizer = build_tokenizer(config(shards, tmp_path), model)
        encoder = Encoder(TINY, model, tokenizer, transform_of(model, uint8=True))
        (features,) = encode_set([encoder], LabelledSet(shards), batch_size=64)
        found = evaluate(model, tokenizer, features).results
        assert found["retrieval"] == expected["retrieval"]
        assert found["zero_shot"] == expected["zero_shot"]
    assert results["raw"]["retrieval"] != results["retrieval"]


def test_an_average_can_begin_and_end_later(shards, tmp_path):
    folder, _ = train(config(shards, tmp_path, epochs=1))
    started = read_checkpoint(folder.latest)["state_dict"]
    folder, _ = train(config(shards, tmp_path, epochs=2, ema_decay=0.5), folder.latest)
    state = averages(folder)
    assert torch.linalg.norm(state["visual.proj"] - started["visual.proj"]) > 0
    train(config(shards, tmp_path, epochs=3), folder.latest)
    assert "state_dict_ema" not in read_checkpoint(folder.latest)
