"""``clipfast inspect``: compile every kernel for GPUs that need not be there, and report what the compiler made of it.

``shipped`` lists the calls, ``offline`` records their launches and compiles them, ``sass`` and ``bound`` read the
machine code, ``report`` holds and prints the findings, and ``command`` is the command line.
"""

from .command import compilers, inspect_all, inspect_launch
from .report import Report

__all__ = ["Report", "compilers", "inspect_all", "inspect_launch"]
