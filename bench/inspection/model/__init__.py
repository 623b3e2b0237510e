"""A model of an H100 that runs the machine code of compiled kernels, and says how long a launch takes.

``kernel`` takes what Triton compiled. ``arguments``, ``registers`` and ``arithmetic`` compute the integers that its
branches depend on, and ``paths`` follows them. ``steps`` says what each instruction uses, ``multiprocessor`` runs them,
and ``predict`` lays the result over the grid. ``machine`` holds every constant.
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
