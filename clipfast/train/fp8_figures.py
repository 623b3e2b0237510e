"""The figures of a run with --precision amp_fp8: how much the linear layers of a model lose by rounding to 8 bits.

The figures are measured on a few pairs of a step that is logged. After the step, these pairs go through a forward and a
backward pass of their own, which changes neither weights nor gradients nor random numbers.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.fp8 import E4M3, quantize_rows
from ..models import CLIP
from ..models.layers import OBSERVERS

PAIRS = 16  # the number of pairs on which rounding to 8 bits is measured
LARGEST = torch.finfo(E4M3).max
KINDS = ("input", "weight", "gradient")
Found = dict[str, dict[str, Tensor]]


class Fp8Figures:
    """Measures the rounding to 8 bits in a model's linear layers.

    Args:
        model: the model.
        loss: the loss of the pairs of one process, without communication.
        autocast: returns the autocast context of the forward pass.
    """

    def __init__(self, model: CLIP, loss: Callable[..., Tensor], autocast: Callable[[], torch.autocast]) -> None:
        self.model, self.loss, self.autocast = model, loss, autocast
        self._names = {parameter: name for name, parameter in model.named_parameters()}

    def __call__(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        """Return the figures of a model's linear layers in 8 bits, for at most ``PAIRS`` of these pairs.

        Returns:
            ``saturated`` and ``zero``: the share of numbers that get the largest magnitude of 8 bits (at least one in
            each row), and the share that is rounded to zero; each for inputs, weights and gradients of outputs.
            ``scale``: for each layer, the largest scales of the rows of its input, its weight and its gradient.
        """
        found: Found = defaultdict(dict)
        earliest: dict[bool, Tensor] = {}  # the first output of each tower, whose gradient passes through all others

        def observe(x: Tensor, weight: Tensor, y: Tensor) -> None:
            """Note how much rounding to 8 bits loses in a linear layer's input and weight, and later its gradient."""
            name = self._names.get(weight, "other")  # type: ignore[call-overload]
            of_layer = found[name]
            of_layer |= {"input": _figures(x), "weight": _figures(weight)}
            if y.requires_grad:
                y.register_hook(lambda grad: of_layer.update(gradient=_figures(grad)))
                earliest.setdefault(name.startswith("visual."), y)

        was_training = self.model.training
        self.model.eval()
        OBSERVERS.append(observe)
        try:
            with torch.enable_grad(), self.autocast():
                # ``forward`` of the class is not compiled, so the layers of a compiled model call ``observe``, too.
                loss = self.loss(*type(self.model).forward(self.model, images[:PAIRS], texts[:PAIRS]))
            if earliest:
                torch.autograd.grad(loss, list(earliest.values()))
        finally:
            OBSERVERS.remove(observe)
            self.model.train(was_training)
        return _summary(found)


def _figures(x: Tensor) -> Tensor:
    """Return a tensor's shares of saturated numbers and of those that become zero, and the largest scale of a row."""
    x = x.detach().flatten(0, -2)
    values, scale, _ = quantize_rows(x)
    size = values.float().abs()
    is_lost = (size == 0) & (x != 0)
    scale = scale.where(x.any(-1), 0)  # a row of zeros, such as the gradient of an output that is not read, has scale 1
    return torch.stack([(size == LARGEST).float().mean(), is_lost.float().mean(), scale.max().float()])


def _summary(found: Found) -> dict[str, Any]:
    """Return the figures of a run's linear layers as numbers: the means of the shares, and the scales by layer."""
    figures = {layer: {kind: x.tolist() for kind, x in kinds.items()} for layer, kinds in found.items()}
    shares: dict[str, Any] = {}
    for place, name in enumerate(("saturated", "zero")):
        by_kind = {kind: [kinds[kind][place] for kinds in figures.values() if kind in kinds] for kind in KINDS}
        shares[name] = {kind: sum(values) / len(values) for kind, values in by_kind.items() if values}
    scales = {layer: {kind: x[2] for kind, x in kinds.items()} for layer, kinds in figures.items()}
    return shares | {"scale": scales}
