"""Fixtures of pairs and runs for the tests in this folder, and a cache for each test."""

import pytest

from clipfast.data import open_shards

from ..small_runs import server, shards  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for the cache of indexed and copied shards."""
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(*names, **options):
    """Return the data source of shards, given by their paths or names."""
    return open_shards([str(name) for name in names], **options)
