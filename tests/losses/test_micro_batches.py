"""Test ``clipfast train --micro-batch-size``: the same training in less memory, interruptions, and how "auto" finds the
size.
"""

import copy
import json
import re

import pytest
import torch

from clipfast import CLIP, accumulate_gradients, largest_micro_batch
from clipfast.models.packed_text import PackedText
from clipfast.train import step
from clipfast.train.loop import train
from clipfast.train.trainer import Trainer

from ..small_runs import TINY
from ..train.test_training import config, same, stopped_after, weights
from .test_accumulation import DIM, TEXT, VISION, Toy, batch, gradients


@pytest.fixture
def tiny(shards, tmp_path):
    """Return a function that returns the options of a training run of a tiny ViT or ResNet, with changes."""
    text = TEXT | {"context_length": 16, "vocab_size": 49408}
    resnet = {"embed_dim": DIM, "vision_cfg": VISION["ResNet"], "text_cfg": text}
    models = {"ViT": TINY, "ResNet": str(tmp_path / "resnet.json")}
    (tmp_path / "resnet.json").write_text(json.dumps(resnet))
    return lambda folder, model="ViT", **changes: config(shards, tmp_path / folder, model=models[model], **changes)


def limited(forward, room, sizes):
    """Return a model's ``forward`` as if the memory held the graph of at most ``room`` pairs; note ``sizes`` tried."""

    def run(*inputs):
        """Compute the features of a micro-batch, and fail if its graph does not fit into memory."""
        output = forward(*inputs)
        if torch.is_grad_enabled():
            sizes.append(len(inputs[-1]))
            if sizes[-1] > room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return output

    return run


def test_largest_micro_batch_changes_nothing():
    model, data, sizes = Toy().double(), batch(18), []
    model.forward = limited(model.forward, 5, sizes)
    accumulate_gradients(model, *data, 5)
    before, kept = copy.deepcopy(model.state_dict()), gradients(model)
    values = {name: gradient.clone() for name, gradient in kept.items()}
    state = torch.get_rng_state()
    sizes.clear()
    assert largest_micro_batch(model, *data, reserve=1000) == 5
    assert sizes == [18, 9, 5, 5, 5, 3]
    assert largest_micro_batch(model, *data, start=4) == 4
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, gradient in gradients(model).items():
        assert gradient is kept[name]
        assert torch.equal(gradient, values[name])
    model.forward = limited(model.forward, 0, sizes)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        largest_micro_batch(model.eval(), *data)


def test_auto_halves_what_does_not_fit_and_a_resumed_run_keeps_it(tiny, tmp_path, monkeypatch):
    given, _ = train(tiny("given", "ResNet", epochs=1, micro_batch_size=4))
    options = tiny("auto", "ResNet", epochs=1, micro_batch_size="auto", save_every=3)
    run = tmp_path / "auto" / "run"
    with monkeypatch.context() as patch:
        patch.setattr(step, "_can_run_out", lambda device: True)
        patch.setattr(CLIP, "forward", limited(CLIP.forward, 4, []))
        with stopped_after(3):
            train(options)
    train(options, run / "checkpoints" / "epoch_latest.pt")
    assert same(given.path, run)
    # Batch normalisation by micro-batches is another function, so the size of the micro-batches did matter.
    tracked = [value for name, value in weights(run).items() if name.endswith("num_batches_tracked")]
    assert {int(value) for value in tracked} == {8}  # four steps of two micro-batches
    log = (run / "out.log").read_text()
    assert re.findall("--micro-batch-size auto: (.*) pairs at a time .([a-z]+)", log) == [
        ("4 of 8", "the"),
        ("4 of 8", "a"),
    ]


def test_auto_tries_the_longest_texts(tiny, monkeypatch):
    """A text tower computes no token behind the end of a text, so a size that fits shorter texts may be too large."""
    tried, embed = [], CLIP.embed_text

    def embedded(model, text):
        """Note how many tokens the text tower computes."""
        tried.append((text.ids if isinstance(text, PackedText) else text).numel())
        return embed(model, text)

    monkeypatch.setattr(step, "_can_run_out", lambda device: True)
    monkeypatch.setattr(CLIP, "embed_text", embedded)
    train(tiny("run", epochs=1, train_num_samples=8, micro_batch_size="auto"))
    assert tried[0] == 8 * 16
    assert max(tried[1:]) < 8 * 16


def test_another_batch_size_is_fitted_anew(tiny):
    folder, _ = train(tiny("run", epochs=1, micro_batch_size="auto"))  # a CPU takes the whole batch without a trial
    checkpoint = torch.load(folder.latest, weights_only=True)
    assert checkpoint["clipfast"]["micro_batch_size"] == 8
    checkpoint["clipfast"]["micro_batch_size"] = 2
    for batch_size, expected in ((8, 2), (16, 16)):
        changed = tiny("run", micro_batch_size="auto", batch_size=batch_size)
        assert Trainer(changed, folder, checkpoint).step.micro_batch_size == expected
