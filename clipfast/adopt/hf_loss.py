"""The losses of transformers' CLIPModel and SiglipModel, with the pairs of all ranks."""

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
