"""``clipfast inspect``: compile every kernel for GPUs that need not be there, and report what the compiler made of it.

``shipped`` lists the calls, ``offline`` records their launches and compiles them, ``sass`` and ``matrix`` read the
machine code, and ``report`` holds and prints the findings. ``model`` says how long a launch takes on an H100,
``workloads`` records what ops and training steps launch, and ``forecast`` puts both together. ``command`` is the
command line.
"""

from .command import inspect_all, inspect_launch
from .pool import compilers
from .report import Report

__all__ = ["Report", "compilers", "inspect_all", "inspect_launch"]
