"""Weights in 16 bits, as OpenCLIP's precisions "fp16" and "bf16" store them."""

from typing import Any

import torch
from torch import Tensor, nn

# These parameters stay in float32. They are added to activations or scale them, and are small.
_FULL_MODULES = (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)
_FULL_PARAMETERS = ("positional_embedding", "class_embedding", "logit_scale", "logit_bias")


def lower_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of products in ``model`` to ``dtype``, in place.

    Norms, embeddings, positions and the scale of the logits keep their dtype, as in OpenCLIP; of SigLIP, whose image
    tower is timm's there, only the norms of the text tower do. The activations have the dtype of the products.
    """
    text: Any = getattr(model, "text", None)
    if text is not None:
        kept = {id(parameter) for module in text.modules() if isinstance(module, nn.LayerNorm)
                for parameter in module.parameters()}  # fmt: skip
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
        return
    for module in model.modules():
        if isinstance(module, _FULL_MODULES):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name not in _FULL_PARAMETERS:
                parameter.data = parameter.data.to(dtype)


def lowered(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x`` in the dtype of ``weight`` if that has 16 bits and ``x`` has more."""
    return x.to(weight.dtype) if weight.dtype.itemsize == 2 < x.dtype.itemsize else x
