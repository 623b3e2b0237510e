"""The layer norms of PyTorch (which transformers uses), OpenCLIP and timm on our layer norm."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import layer_norm
from ..kernels.layer_norm.op import MAX_WIDTH
from .places import Proposal, class_name, computes, has_hooks, is_left, runs_ours

KIND = "norms"
ADDS = "clipfast.layer_norm, which also adds attention's output"


def propose_norm(module: nn.Module) -> Proposal | None:
    """Say what to do with ``module``; None if it is no norm."""
    function = _FUNCTIONS.get(class_name(module))
    if function is None:
        name = type(module).__name__
        is_norm = "norm" in name.lower() and next(module.children(), None) is None
        return Proposal(KIND, f"{name} is not one of the layer norms that are known") if is_norm else None
    norm: Any = module
    if norm.weight is None or norm.bias is None:
        return Proposal(KIND, "it has no weight or no bias")
    if len(norm.normalized_shape) != 1:
        return Proposal(KIND, "it normalises over more than one dimension")
    if norm.weight.shape[0] > MAX_WIDTH:
        return Proposal(KIND, f"rows are {norm.weight.shape[0]} wide, and at most {MAX_WIDTH} can be computed")
    if getattr(norm, "_fast_norm", False):
        return Proposal(KIND, "timm's fast norm is on, which computes in 16 bits")
    return Proposal(KIND, "clipfast.layer_norm", function)


def same_dtype_norm(module: Any, x: Tensor) -> Tensor:
    """Compute a layer norm [..., N] -> [..., N] that returns the dtype of its input, under autocast too."""
    if not computes(x):
        return type(module).forward(module, x)
    return layer_norm(x, module.weight, module.bias, module.eps)


def autocast_norm(module: Any, x: Tensor) -> Tensor:
    """Compute a layer norm [..., N] -> [..., N] that returns float32 under autocast on a GPU, as PyTorch's own does."""
    if not computes(x):
        return type(module).forward(module, x)
    if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.float()
    return layer_norm(x, module.weight, module.bias, module.eps)


_FUNCTIONS = {
    "torch.nn.modules.normalization.LayerNorm": autocast_norm,
    "timm.layers.norm.LayerNorm": autocast_norm,
    "timm.layers.norm.LayerNormFp32": same_dtype_norm,
    "open_clip.transformer.LayerNorm": same_dtype_norm,
    "open_clip.transformer.LayerNormFp32": same_dtype_norm,
    "open_clip.layers.LayerNorm": same_dtype_norm,
    "open_clip.layers.LayerNormFp32": same_dtype_norm,
    "open_clip.audio.whisper.LayerNorm": same_dtype_norm,
}


def add_norm(x: Tensor, branch: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Return ``x + branch`` and ``norm(x + branch)``, [..., N] each, in one pass where ``norm`` is ours and plain.

    Under autocast, the norm then has the dtype of the branch, which the linear layer behind it would round it to.
    """
    if is_left(x):
        x = x + branch
        return x, norm(x)
    is_same = branch.dtype == x.dtype
    is_rounded = torch.is_autocast_enabled(x.device.type) and torch.promote_types(branch.dtype, x.dtype) == x.dtype
    takes = branch.shape == x.shape and computes(x) and (is_same or is_rounded)
    if runs_ours(norm) and not has_hooks(norm) and takes:
        normed, x = layer_norm(branch, norm.weight, norm.bias, norm.eps, residual=x)
        return x, normed
    x = x + branch
    return x, norm(x)
