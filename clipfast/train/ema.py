"""``--ema-decay``: the exponential moving average (EMA) of weights, often a better model than the last weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checkpoints.checkpoint import check_weights, plain_names
from ..distributed.dtensors import fill, to_local
from ..models import CLIP

TOGETHER = 16  # number of tensors that one foreach call updates; more need more memory, since it holds all differences


class WeightAverage:
    """The exponential moving average of every trained weight and of BatchNorm's running statistics, in float32.

    The statistics are averaged over the same steps as the weights, since the statistics of the last weights would not
    fit averaged weights. Integer tensors, such as BatchNorm's count, are taken from the model without averaging.

    Args:
        model: the model; its parameters and buffers must be changed in place, since the average refers to them.
        decay: weight of the average so far in each update, from 0 to 1. After ``n`` steps it is at most
            (1 + n) / (10 + n), so that the initial weights soon count for little.
    """

    def __init__(self, model: CLIP, decay: float) -> None:
        self.model, self.decay = model, decay
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        changing = trained | {name for name, _ in model.named_buffers()}
        self._live = {
            name: value for name, value in model.state_dict().items() if name in changing and value.is_floating_point()
        }
        self.averages = {name: value.detach().float().clone() for name, value in self._live.items()}
        self._devices = {value.device for value in self.averages.values()}  # FSDP2 may keep shards in the host's memory

    @property
    def nbytes(self) -> int:
        """The memory of the moving average of the weights, in bytes."""
        return sum(average.nbytes for average in self.averages.values())

    @torch.no_grad()
    def update(self, steps: int, skipped: Tensor) -> None:
        """Update the moving average by the current weights; ``steps`` is the number of finished training steps.

        ``skipped`` is a scalar tensor: 1 if the last step changed no weight, so that the average must not change
        either; otherwise 0.
        """
        decay = min(self.decay, (1 + steps) / (10 + steps))
        share = (1 - decay) * (1 - skipped)
        if self._devices != {share.device}:
            share = share.cpu()  # a 0-dimensional CPU tensor can be multiplied with tensors on any device
        averages, live = _locals(self.averages), _locals(self._live)
        for start in range(0, len(averages), TOGETHER):
            some = averages[start : start + TOGETHER]
            change = torch._foreach_sub([value.float() for value in live[start : start + TOGETHER]], some)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(some, change)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averaged weights into the trained model for as long as the context lasts."""
        live = _locals(self._live)
        with torch.no_grad():
            trained = [value.clone() for value in live]
            torch._foreach_copy_(live, _locals(self.averages))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the moving averages in place of the tensors that are averaged."""
        return {name: self.averages.get(name, value) for name, value in self.model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Load the moving average from a result of :meth:`state_dict`; None copies the current weights.

        Raises:
            CheckpointError: the state does not fit the model.
        """
        found = self._live if state is None else plain_names(state)
        found = {name: found[name] for name in self.averages if name in found}
        check_weights(found, self.averages, "state_dict_ema of the checkpoint")
        for name, average in self.averages.items():
            fill(average, found[name])


def _locals(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the part of each trained weight that this process holds: the local shard of a DTensor, or all of it."""
    return [to_local(value) for value in tensors.values()]
