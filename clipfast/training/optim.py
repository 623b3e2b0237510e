"""Optimiser and schedule as CLIP was trained with."""

import math
from collections.abc import Iterator

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
    """AdamW (Loshchilov and Hutter 2019), no decay on gains, biases and scalars; ``capturable`` in a CUDA graph."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for _, parameter in named if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": [parameter for _, parameter in named if parameter.ndim >= 2], "weight_decay": weight_decay},
    ]
    # in a graph, a number would stay what it was when it was captured
    rate = torch.tensor(lr, device=named[0][1].device) if capturable else lr
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True, capturable=capturable)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


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
