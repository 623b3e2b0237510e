"""Which implementation works on blocks of logits."""

from typing import Any

import torch

from .._launch import triton_runs_on
from . import cpu


def blocks_on(device: torch.device) -> Any:
    """The module that has ``prepare``, ``stats``, ``add_gradients``, ``finish``, ``strips`` and ``new_accumulator``."""
    if not triton_runs_on(device):
        return cpu
    from . import launches

    return launches
