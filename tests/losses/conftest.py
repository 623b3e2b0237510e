"""The fixtures of pairs and runs, for the tests of this room."""

from ..small_runs import copied, finished, options, refusal, run_small, server, shards, small, store, together  # noqa: F401
