"""The namespace of PyTorch in which the ops are registered.

``python -m clipfast.bench.hub`` writes another one into each build for the kernels hub, so that several builds run in
one process.
"""

import torch

ops = torch.ops.clipfast


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name of an op with its namespace, as ``torch.library`` takes it."""
    return f"clipfast::{op_name}"
