"""StableAdamW (Wortsman et al. 2023, arXiv 2304.13013): AdamW whose step of a tensor shrinks if its second moment lags.

For the gradient g of a tensor, in the first step t = 1 and all later ones:

    m = beta1 m + (1 - beta1) g              m' = m / (1 - beta1^t)
    v = beta2 v + (1 - beta2) g^2            v' = v / (1 - beta2^t)
    r = sqrt(mean(g^2 / max(v', eps^2)))     rate = lr / max(1, r)
    x = x - rate weight_decay x - rate m' / (sqrt(v') + eps)

AdamW has the same equations with r = 1. Where gradients suddenly grow, v' is still small, and r is large.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .adamw import refuse_closure


class StableAdamW(torch.optim.Optimizer):
    """AdamW that divides the learning rate of each tensor by the root mean square of g^2 / v, if that is above 1.

    Args:
        params: the parameters, or their groups.
        lr: the learning rate.
        betas: the decays of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: the decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; a closure is refused."""
        refuse_closure(self, closure)
        for group in self.param_groups:
            # Parameters are grouped by their number of steps: those without a gradient in some step have taken fewer.
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= {"step": 0, "exp_avg": torch.zeros_like(parameter)}
                        state["exp_avg_sq"] = torch.zeros_like(parameter)
                    state["step"] += 1
                    by_step.setdefault(state["step"], []).append(parameter)
            for number, parameters in by_step.items():
                self._update(group, parameters, number)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], number: int) -> None:
        """Update those ``parameters`` of an optimizer group that take their step ``number``, counted from 1."""
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        grads: Any = [parameter.grad for parameter in parameters]
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        roots = torch._foreach_div(second, 1 - beta2**number)
        torch._foreach_sqrt_(roots)
        ratios = torch._foreach_clamp_min(roots, eps)
        torch._foreach_reciprocal_(ratios)
        torch._foreach_mul_(ratios, grads)
        # The norm of g / sqrt(v') over all elements, divided by the root of their number, is r.
        norms = torch._foreach_norm(ratios)
        factors = [1 / (norm / max(x.numel(), 1) ** 0.5).clamp_min(1) for norm, x in zip(norms, grads, strict=True)]
        torch._foreach_add_(roots, eps)
        updates = torch._foreach_div(first, roots)
        torch._foreach_div_(updates, 1 - beta1**number)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, factors)
        torch._foreach_add_(parameters, updates, alpha=-lr)
