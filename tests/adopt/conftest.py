"""Optional libraries for these tests, and a single thread, since the models are too small for two."""

import warnings

import pytest
import torch

from clipfast.adopt import places

ON_A_CPU = places.CPU_DTYPES


@pytest.fixture(autouse=True)
def libraries(one_thread: None) -> None:  # threads that wait for each other cost more than they gain here
    """Skip a test unless both libraries are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our ops run in every dtype, as they do on a GPU. A test of what a CPU runs takes ``as_on_a_cpu`` besides."""
    monkeypatch.setattr(places, "CPU_DTYPES", (torch.float64, torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture
def as_on_a_cpu(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original runs where it is faster on a CPU."""
    monkeypatch.setattr(places, "CPU_DTYPES", ON_A_CPU)
