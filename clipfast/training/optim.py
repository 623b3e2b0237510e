"""The optimizer and the learning rate schedule of CLIP (Radford et al. 2021, section 2.5)."""

import math

import torch
from torch import nn


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    capturable: bool = False,
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) for the parameters of ``model`` that are trained.

    Gains, biases and scalars have no weight decay. With ``capturable``, a step can be captured in a CUDA graph.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
    ]
    # A graph would keep a number as it was at the capture; a tensor it reads anew.
    rate = torch.tensor(lr, device=trained[0].device) if capturable else lr
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True, capturable=capturable)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter; a learning rate that is a tensor is changed in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def cosine_lr(step: int, base_lr: float, warmup: int, total: int) -> float:
    """Return the learning rate of ``step``, counted from 0.

    It rises linearly to ``base_lr`` over ``warmup`` steps, and falls as half a cosine to zero at ``total`` steps.
    """
    if step < warmup:
        return base_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))
