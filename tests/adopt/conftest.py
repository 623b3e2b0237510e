"""What these tests need that is optional, and one thread for models that are too small for two."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """Both libraries, or no test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other cost more than they gain here
    yield
    torch.set_num_threads(before)
