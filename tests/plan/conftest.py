"""Fixtures of pairs and runs for the tests in this folder."""

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401
