"""Optional libraries for these tests, and a single thread, since the models are too small for two."""

import warnings

import pytest
import torch

from clipfast.adopt import places

ON_A_CPU = places.CPU_DTYPES


@pytest.fixture(autouse=True)
def libraries(one_thread: None) -> None:  # threads that wait for each other cost more than they gain here
    """Skip a test of adopted models unless OpenCLIP and timm are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adopted models run on our ops in every dtype, as on a GPU; ``as_on_a_cpu`` undoes it for a test of a CPU."""
    monkeypatch.setattr(places, "CPU_DTYPES", (torch.float64, torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture
def as_on_a_cpu(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the original layers of an adopted model run where they are faster than ours on a CPU."""
    monkeypatch.setattr(places, "CPU_DTYPES", ON_A_CPU)
