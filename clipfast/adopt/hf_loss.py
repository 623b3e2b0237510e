"""The losses of transformers' CLIPModel and SiglipModel, with the pairs of all ranks."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import contrastive_loss, distributed_contrastive_loss, sigmoid_loss
from ..kernels.contrastive.exchange import gather_equal
from ..losses import mean_over_ranks
from ..siglip_loss import SigLipLoss


def loss_of_all_ranks(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Compute the loss of the pairs of all ranks, the same value on every rank.

    After the mean over ranks that DistributedDataParallel takes, every parameter has the gradient of this loss.

    Args:
        image, text: normalised features [b, D] of this rank.
        logit_scale: the factor on the cosine similarities, one element.
        logit_bias: SigLIP's; None stands for CLIP's contrastive loss.

    Raises:
        ValueError: the loss is SigLIP's and the ranks hold different numbers of pairs.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if logit_bias is None:
        if world_size == 1:
            return contrastive_loss(image, text, logit_scale)
        return mean_over_ranks(distributed_contrastive_loss(image, text, logit_scale))
    if world_size == 1:
        return sigmoid_loss(image, text, logit_scale, logit_bias)
    sizes = gather_equal(torch.tensor([len(image)], device=image.device), None).flatten().tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"the sigmoid loss takes equally many pairs from every rank, got {sizes}: drop the last batch")
    loss = SigLipLoss(rank=dist.get_rank(), world_size=world_size)(image, text, logit_scale, logit_bias)
    return mean_over_ranks(loss)


class NoLogits:
    """Stands for the logits of all pairs where they are not computed, and says so when anything is asked of it.

    To what only passes outputs on (DistributedDataParallel, accelerate, transformers' Trainer) it is a plain object.
    """

    message = (
        "in training the loss is computed without the logits of all pairs: call the model with return_logits=True to "
        "have them, or in evaluation mode"
    )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {self.message}")

    def __repr__(self) -> str:
        return f"NoLogits: {self.message}"

    def __reduce__(self) -> str:
        return "NO_LOGITS"  # the one object, in copies and other processes too

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(NoLogits.message)

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(cls.message)

    __array__ = __bool__ = __contains__ = __float__ = __getitem__ = __iter__ = __len__ = __setitem__ = _refuse
    __add__ = __matmul__ = __mul__ = __neg__ = __pow__ = __sub__ = __truediv__ = _refuse
    __radd__ = __rmatmul__ = __rmul__ = __rsub__ = __rtruediv__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


NO_LOGITS = NoLogits()


def hf_collator(rows: Sequence[Any]) -> dict[str, Any]:
    """Make a batch of rows of equal shapes as transformers' Trainer does, and ask the model for its loss.

    It is the ``data_collator`` of a Trainer for CLIPModel, SiglipModel or Siglip2Model, whose losses are only computed
    with ``return_loss=True``.
    """
    from transformers import default_data_collator

    return {**default_data_collator(list(rows)), "return_loss": True}
