"""Fixtures of image-text shards and training runs for the tests of losses."""

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401
