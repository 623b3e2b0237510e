"""Fixtures of pairs and runs for the tests in this folder."""

from unittest import mock

import pytest

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Let runs draw no pictures, which take a third of a small run; only that of the fixture ``finished`` has them."""
    with mock.patch("clipfast.train.loop._pictures", return_value=[]):
        yield
