"""Checks of kernels from the Hugging Face hub; HUB_KERNELS names a checkout of the repository kernels-community."""

import os
import sys
import types
from pathlib import Path

import torch
from norms import norm_check  # the folder of a check is searched for modules

from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck

sys.path.insert(0, str(Path(os.environ.get("HUB_KERNELS", "kernels-community")) / "flash-attn-ops" / "torch-ext"))
# A checkout lacks the module flash_attn_ops._ops, which the hub's build tool writes to give the ops of each build a
# namespace of their own.
names = types.ModuleType("flash_attn_ops._ops")
names.add_op_namespace_prefix = lambda name: f"flash_attn_ops_checked::{name}"
sys.modules.setdefault(names.__name__, names)


def rotary(x, cos, sin):
    """Rotate the first features of each head by the kernel of flash-attn-ops."""
    from flash_attn_ops import apply_rotary

    return apply_rotary(x, cos, sin)


def rotary_reference(x, cos, sin):
    """Rotate the first features of each head in plain PyTorch."""
    half = cos.shape[-1]
    one, two, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    return torch.cat([one * cos - two * sin, one * sin + two * cos, rest], -1)


def layer_norm(x, weight, bias):
    """Return the layer norm of flash-attn-ops."""
    from flash_attn_ops import layer_norm_fn

    return layer_norm_fn(x, weight, bias, eps=1e-5)


ROTARY = KernelCheck(
    function=rotary, reference=rotary_reference,
    inputs=lambda draw, batch, length, heads, width: {
        "x": draw.normal(batch, length, heads, width),
        "cos": draw.normal(length, width // 2 - 4).cos(), "sin": draw.normal(length, width // 2 - 4).sin(),
    },
    shapes=[{"batch": 2, "length": 9, "heads": 3, "width": 32}, {"batch": 1, "length": 17, "heads": 2, "width": 64}],
    real={"batch": 8, "length": 2048, "heads": 16, "width": 64}, gradients=False,
    floor=lambda itemsize, batch, length, heads, width: Floor(0, 2 * itemsize * batch * length * heads * width),
)  # fmt: skip

LAYER_NORM = norm_check(layer_norm)
