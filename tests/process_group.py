"""The processes of ``clipfast.ranks``, for functions of test modules."""

import functools
import sys
from pathlib import Path

from clipfast import ranks
from clipfast.ranks import error_of, wait_for

ROOT = Path(__file__).parent.parent
# A new process finds the test modules by the path that it is given.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

PRELOAD = ("clipfast", "open_clip")
start_ranks = functools.partial(ranks.start_ranks, preload=PRELOAD)
run_ranks = functools.partial(ranks.run_ranks, preload=PRELOAD)

__all__ = ["error_of", "run_ranks", "start_ranks", "wait_for"]
