"""What the compiler made of every kernel, for GPUs that are not there: ``clipfast inspect``.

``shipped`` lists the calls, ``offline`` records what they launch and compiles it, ``sass`` and ``bound`` read the
machine code, ``report`` holds and prints the findings, and ``command`` is the command line.
"""

from .command import inspect_all, inspect_launch
from .report import Report

__all__ = ["Report", "inspect_all", "inspect_launch"]
