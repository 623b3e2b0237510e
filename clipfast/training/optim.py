"""Optimiser and schedule as CLIP was trained with."""

import math
from collections.abc import Iterator

import torch
from torch import nn


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), without decay on gains, biases and scalars."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for _, parameter in named if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": [parameter for _, parameter in named if parameter.ndim >= 2], "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def cosine_lr(step: int, base_lr: float, warmup: int, total: int) -> float:
    """Learning rate of ``step``, from 0: linear to ``base_lr`` over ``warmup`` steps, then a half cosine to zero."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter that ``optimizer`` updates."""
    for group in optimizer.param_groups:
        yield from group["params"]
