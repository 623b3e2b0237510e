"""Signs that training goes wrong, such as spikes of the loss: which figures are reported, and which are not."""

import math
import random
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from clipfast.data import EqualBatches
from clipfast.kernels import contrastive_loss, sigmoid_loss
from clipfast.train import TrainConfig
from clipfast.train.guard import Figures
from clipfast.train.spikes import FIRST, FLAT_FOR, PAUSE, SATURATED_FOR, Signs, guessing
from clipfast.train.trainer import Trainer


def course(steps, seed=0):
    """Yield figures of a usual training run: a falling loss with noise, and a gradient norm with a heavy tail."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        loss = (0.5 + 5 * math.exp(-step / 3000)) * math.exp(rng.gauss(0, 0.05))
        yield step, Figures(loss, 0.5 * math.exp(rng.gauss(0, 0.4)), 0.0, min(14 + step / 20, 99.0))


def seen(signs, figures):
    """Return step and kind of each sign of trouble that is seen in the figures of training steps."""
    return [(step, sign.kind) for step, one in figures for sign in signs.see(step, one)]


def test_no_alarm_in_a_usual_course():
    assert [seen(Signs(50), course(3000, seed)) for seed in range(3)] == [[]] * 3


@pytest.mark.parametrize(("field", "kind", "factor"), [("loss", "loss", 3), ("grad_norm", "gradient norm", 60)])
def test_a_spike_is_reported_once_and_does_not_become_usual(field, kind, factor):
    def spiked(at):
        """Yield figures of a training run with a spike at some steps."""
        for step, one in course(1200):
            yield step, one._replace(**{field: factor * getattr(one, field)}) if step in at else one

    assert seen(Signs(50), spiked((600,))) == [(600, kind)]
    assert seen(Signs(700), spiked((600,))) == []  # no spike is reported during the warm-up
    assert seen(Signs(0), spiked((FIRST // 2,))) == []  # a usual value is not known yet
    # Until PAUSE steps are over, one spike is reported, no matter how many come. Spikes do not become usual values, so
    # the one after the pause is reported, too.
    many = [600, 601, 602, 640, 600 + PAUSE[kind] - 1, 600 + PAUSE[kind]]
    assert seen(Signs(50), spiked(many)) == [(600, kind), (600 + PAUSE[kind], kind)]


def test_large_batches_that_come_seldom_are_no_spikes():
    """The larger loss of a rare large batch, 1,024 pairs in place of 16 in one step of 41, is no spike."""

    def pairs(step):
        """Return the number of pairs in the batch of a training step."""
        return 16 if step % 41 else 1024

    figures = [(step, one._replace(loss=one.loss * math.log(pairs(step)))) for step, one in course(2000)]
    assert seen(Signs(50, lambda step: math.log(pairs(step))), figures) == []
    assert (FIRST // 41 + 1) * 41 in dict(seen(Signs(50), figures))
    step, one = figures[1000]
    figures[1000] = step, one._replace(loss=3 * one.loss)
    assert seen(Signs(50, lambda step: math.log(pairs(step))), figures) == [(step, "loss")]


def test_a_logit_scale_at_its_limit_is_reported():
    figures = [(step, Figures(1.0, 1.0, 0.0, 100.0)) for step in range(1, SATURATED_FOR + PAUSE["logit scale"] + 1)]
    assert seen(Signs(0), figures) == [(SATURATED_FOR, "logit scale"), (figures[-1][0], "logit scale")]
    figures[300] = 301, figures[300][1]._replace(logit_scale=99.0)
    assert seen(Signs(0), figures)[0] == (301 + SATURATED_FOR, "logit scale")


def flat(signs, first, steps, **changes):
    """Return the signs of trouble in training steps that all have the same figures."""
    one = Figures(math.log(32), 1e-6, 0.0, 1.0)._replace(**changes)
    return seen(signs, [(step, one) for step in range(first, first + steps)])


def test_a_collapse_is_reported_with_the_last_good_step():
    guess = math.log(32)
    signs = Signs(0, lambda step: guess)
    assert seen(signs, [(step, Figures(guess + 0.01, 1.0, 0.0, 14.0)) for step in range(1, 301)]) == []
    assert signs.good is None
    assert seen(signs, [(step, Figures(0.9 * guess, 1.0, 0.0, 14.0)) for step in range(301, 401)]) == []
    assert flat(signs, 401, FLAT_FOR - 1) == []
    assert flat(signs, 400 + FLAT_FOR, 300) == [(400 + FLAT_FOR, "collapse")]
    assert signs.good == 400
    # The gradient is not small, or the loss is not that of guessing.
    for changes in ({"grad_norm": 0.1}, {"loss": guess + 0.1}):
        assert flat(Signs(0, lambda step: guess), 1, 200, **changes) == []
    assert flat(Signs(0), 1, 200) == []  # no loss of guessing is known if other losses are added to the contrastive one


@pytest.mark.parametrize("siglip", [False, True])
def test_the_loss_of_guessing(siglip):
    same = F.normalize(torch.ones(8, 4), dim=-1)
    scale = torch.tensor(1.0)
    if siglip:  # the best logit gives each pair a probability of 1/8
        found = sigmoid_loss(same, same, scale, torch.tensor(math.log(1 / 7)) - 1)
    else:
        found = contrastive_loss(same, same, scale)
    model = mock.Mock(logit_bias=torch.zeros(()) if siglip else None)
    config = TrainConfig(train_data="x")
    assert guessing(config, model, EqualBatches(8))(3) == pytest.approx(found.item(), rel=1e-6)
    assert guessing(config, model, EqualBatches(1)) is None


@pytest.mark.parametrize("what", ["collapse", "weights"])
def test_the_last_good_checkpoint_is_kept(what, run_small, monkeypatch):
    """If training diverges, the last good checkpoint (step 6 of 12) is kept, besides the last two checkpoints."""
    monkeypatch.setattr("clipfast.train.spikes.FLAT_FOR", 3)
    original = Trainer._train_step

    def changed(trainer, batch):
        """Take a training step, and put figures of a diverged run in place of its own from step 6 on."""
        figures, is_good = original(trainer, batch), trainer.progress.step < 6
        if what == "weights" and not is_good:
            trainer.model.text_projection.data.fill_(1e9)
        return figures.copy_(torch.tensor([1.0, 1.0, 0.0, 14.0] if is_good else [math.log(8), 1e-6, 0.0, 1.0]))

    def kept(folder):
        """Return the names of the training checkpoints in a run's folder."""
        return {path.name for path in folder.checkpoints.glob("step_*")}

    options = {"save_every": 1, "log_every_n_steps": 3, "workers": 0}
    with mock.patch.object(Trainer, "_train_step", changed):
        folder = run_small(epochs=3, **options)
        assert kept(folder) == {"step_6.pt", "step_11.pt", "step_12.pt"}
        warned = [line["step"] for line in folder.metrics() if line.get("warning") == what]
        assert warned[0] == (9 if what == "collapse" else 7)
        assert re.search("step 6 (is|was) the last good one", (folder.path / "out.log").read_text())
        run_small(folder.latest, epochs=4, **options)
    assert kept(folder) == {"step_6.pt", "step_15.pt", "step_16.pt"}
