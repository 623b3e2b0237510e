"""Signs of trouble: what is one, and what is not."""

import math
import random

import pytest
import torch

from clipfast.training.guard import Figures
from clipfast.training.loop import train
from clipfast.training.spikes import FIRST, PAUSE, SATURATED_FOR, Signs, Usual
from clipfast.training.step import TrainingStep

from .test_training import config


def course(steps, seed=0):
    """Figures of a usual run: a loss that falls, with noise, and a gradient norm with a heavy tail."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        loss = (0.5 + 5 * math.exp(-step / 3000)) * math.exp(rng.gauss(0, 0.05))
        yield step, Figures(loss, 0.5 * math.exp(rng.gauss(0, 0.4)), 0.0, min(14 + step / 20, 99.0))


def seen(signs, figures):
    return [(step, sign.kind) for step, one in figures for sign in signs.see(step, one)]


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_in_a_usual_course(seed):
    assert seen(Signs(50), course(3000, seed)) == []


@pytest.mark.parametrize(("field", "kind", "factor"), [("loss", "loss", 3), ("grad_norm", "gradient norm", 60)])
def test_a_spike_is_reported_once_and_does_not_become_usual(field, kind, factor):
    def spiked(at):
        for step, one in course(1200):
            yield step, one._replace(**{field: factor * getattr(one, field)}) if step in at else one

    assert seen(Signs(50), spiked((600,))) == [(600, kind)]
    assert seen(Signs(700), spiked((600,))) == []  # in the warm-up
    assert seen(Signs(0), spiked((FIRST // 2,))) == []  # nothing is usual yet
    # one report, however many spikes come, until the pause is over; the last one is as unusual as the first
    many = [600, 601, 602, 640, 600 + PAUSE[kind] - 1, 600 + PAUSE[kind]]
    assert seen(Signs(50), spiked(many)) == [(600, kind), (600 + PAUSE[kind], kind)]


def test_a_new_level_becomes_usual():
    usual, rng = Usual(), random.Random(0)
    for step in range(2000):
        usual.take((1.0 if step > 500 else 0.0) + rng.gauss(0, 0.05))
    assert usual.mean == pytest.approx(1.0, abs=0.1)


def test_a_logit_scale_at_its_limit_is_reported():
    figures = [(step, Figures(1.0, 1.0, 0.0, 100.0)) for step in range(1, SATURATED_FOR + PAUSE["logit scale"] + 1)]
    assert seen(Signs(0), figures) == [(SATURATED_FOR, "logit scale"), (figures[-1][0], "logit scale")]
    figures[300] = 301, figures[300][1]._replace(logit_scale=99.0)
    assert seen(Signs(0), figures)[0] == (301 + SATURATED_FOR, "logit scale")


def test_a_spike_is_in_the_log_and_in_the_metrics(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("clipfast.training.spikes.FIRST", 3)
    original, calls = TrainingStep.backward, []

    def spiked(step, images, texts):
        loss = original(step, images, texts)
        calls.append(loss)
        return loss * 30 if len(calls) == 6 else loss

    monkeypatch.setattr(TrainingStep, "backward", spiked)
    folder, _ = train(config(shards, tmp_path, lr=1e-6))
    (warning,) = (line for line in folder.metrics() if "warning" in line)
    assert (warning["step"], warning["warning"]) == (6, "loss")
    assert warning["value"] == pytest.approx(30 * warning["usual"], rel=0.3)
    assert "WARNING | The loss of step 6 is " in (folder.path / "out.log").read_text()
    assert torch.isfinite(torch.stack(calls)).all()
