"""The namespace of PyTorch in which the ops are registered.

In a build for Hugging Face's kernels hub, ``python -m clipfast.bench.hub`` writes the build's own namespace into this
file, so that several builds can be loaded in one process.
"""

import torch

ops = torch.ops.clipfast


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name of an op with its namespace, as ``torch.library`` takes it."""
    return f"clipfast::{op_name}"
