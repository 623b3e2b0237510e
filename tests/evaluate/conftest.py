"""Fixtures of pairs and training runs for tests/evaluate, and a small model that these tests share."""

import pytest

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401
from .benchmark_sets import ByColour
from .eval_commands import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the arguments of ``clipfast eval`` that name a small model."""
    return save_model(tmp_path_factory.mktemp("model") / "w.pt")


@pytest.fixture
def by_colour(monkeypatch):
    """Let ``clipfast eval`` load models of the class ByColour, which see only colours."""
    monkeypatch.setattr("clipfast.evaluate.encoder.Encoder", ByColour)
