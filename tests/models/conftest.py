"""Fixtures for the tests of models: image-text shards, training runs, and transformer blocks with a GPU's fusions."""

import pytest

from clipfast.models import layers, transformer

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def on_gpu(request, monkeypatch):
    """Let blocks choose the fusions of a GPU, or those of a CPU; both run through the ops' CPU paths."""
    for module in (layers, transformer):
        monkeypatch.setattr(module, "triton_runs_on", lambda device: request.param)
    return request.param
