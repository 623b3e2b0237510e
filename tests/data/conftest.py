"""Fixtures of shards for tests/data, a cache for each test, and helpers that open data sources."""

import pytest

from clipfast.data import Mix, Order, open_shards

from ..small_runs import server, shards  # noqa: F401


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return an empty folder, which is the cache of indexed and copied shards in this test."""
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(*names, **options):
    """Return the data source of shards, given by their paths or names."""
    return open_shards([str(name) for name in names], **options)


def ordered(source, seed=3, **options):
    """Return a shuffled order of the samples of a data source, as a mix of this single source."""
    return Mix([Order(source.sizes, seed, **options)], [1.0], seed)


def copies(tmp_path):
    """Return the copies of compressed or remote shards in the cache of a test."""
    return list((tmp_path / "cache" / "shards").glob("*.tar"))
