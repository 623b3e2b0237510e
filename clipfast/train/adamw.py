"""PyTorch's fused AdamW, for which the host takes two thirds of the time."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_GRAD_OF, _KIND_OF = operator.attrgetter("grad"), operator.attrgetter("device", "dtype")
_STATE_OF = operator.itemgetter("exp_avg", "exp_avg_sq", "step")


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW with ``fused=True``, for parameters that are no DTensors, without AMSGrad.

    Groups, state, results and launches are those of PyTorch's class. Its step looks at each parameter several times,
    and groups all tensors by device and dtype; nearly always there is only one such group here.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Raises:
            ValueError: there is a ``closure``, which is not supported.
        """
        if closure is not None:
            raise ValueError(f"the step of AdamW takes no closure, got {closure!r}")
        self._accelerator_graph_capture_health_check()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            kinds = {*map(_KIND_OF, trained)}
            for kind in kinds:
                self._update(group, trained if len(kinds) == 1 else [x for x in trained if _KIND_OF(x) == kind])
        return None

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters of a group of the optimizer, all on one device and of one dtype."""
        states: Any = [*map(self.state.__getitem__, parameters)]
        if not all(states):
            self._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]
        first, second, steps = zip(*map(_STATE_OF, states), strict=True)
        (beta1, beta2), found_inf = group["betas"], getattr(self, "found_inf", None)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters, [*map(_GRAD_OF, parameters)], first, second, [], steps, lr=group["lr"], beta1=beta1,
            beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=group["maximize"], grad_scale=getattr(self, "grad_scale", None), found_inf=found_inf,
        )  # fmt: skip
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
