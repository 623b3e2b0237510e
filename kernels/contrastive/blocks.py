"""Which implementation works on blocks of logits."""

import importlib
from typing import Any

import torch

from ..launch import triton_runs_on


def blocks_on(device: torch.device, prefix: str = "") -> Any:
    """The module that has ``prepare``, ``stats``, ``add_gradients``, ``finish``, ``strips`` and ``new_accumulator``, or
    with the prefix "sigmoid_" that which has ``sums`` and ``add_gradients`` of the sigmoid loss.
    """
    # by name: where the kernels do not run, they are not imported
    return importlib.import_module(f".{prefix}{'launches' if triton_runs_on(device) else 'cpu'}", __package__)
