"""Fixtures for the tests of adopted (patched) models of OpenCLIP, timm and transformers."""

import warnings
from typing import Any

import pytest
import torch

from clipfast.adopt import hf_towers, open_clip_towers, places
from clipfast.models.packed_text import PackedText

ON_A_CPU = places.CPU_DTYPES


@pytest.fixture(autouse=True)
def libraries(one_thread: None) -> None:  # more threads slow small models down
    """Skip a test of adopted models unless OpenCLIP and timm are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adopted models run on clipfast's ops in every dtype, as on a GPU; the fixture ``as_on_a_cpu`` undoes this."""
    monkeypatch.setattr(places, "CPU_DTYPES", (torch.float64, torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture
def as_on_a_cpu(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the original layers of an adopted model run in the dtypes in which they are faster than clipfast on a CPU."""
    monkeypatch.setattr(places, "CPU_DTYPES", ON_A_CPU)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that records for each batch of texts in an adopted model whether its tower packs them."""
    seen: list[bool] = []
    for module in (open_clip_towers, hf_towers):

        def pack(*args: torch.Tensor, pack: Any = module.pack_if_shorter) -> torch.Tensor | PackedText:
            """Pack texts, and record whether they were packed."""
            texts = pack(*args)
            seen.append(isinstance(texts, PackedText))
            return texts

        monkeypatch.setattr(module, "pack_if_shorter", pack)
    return seen
