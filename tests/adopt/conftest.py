"""What these tests need that is optional."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def libraries() -> None:
    """Both libraries, or no test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("open_clip")
        pytest.importorskip("timm")
