"""Fixtures of pairs and training runs for tests/plan."""

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401
