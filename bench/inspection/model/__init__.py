"""A model of an H100 that runs the machine code of compiled kernels, and says how long a launch takes.

``kernel`` holds a kernel that Triton compiled. ``arguments``, ``registers`` and ``arithmetic`` compute the integers
that its branches depend on, and ``paths`` follows the branches. ``steps`` lists the units that each instruction uses,
``multiprocessor`` simulates one multiprocessor, and ``predict`` extends the result to the whole grid. ``machine`` holds
all constants of the hardware.
"""

from .kernel import ARCH, Kernel, NoModel, load
from .machine import H100, H200, MACHINES, Machine
from .predict import FULL, QUICK, Effort, Prediction, predict, predict_launch

__all__ = [
    "ARCH",
    "FULL",
    "H100",
    "H200",
    "MACHINES",
    "QUICK",
    "Effort",
    "Kernel",
    "Machine",
    "NoModel",
    "Prediction",
    "load",
    "predict",
    "predict_launch",
]
