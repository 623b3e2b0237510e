"""OpenCLIP's loss module on the blockwise kernels: same constructor, same call, same values and gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from .kernels import contrastive_loss, distributed_contrastive_loss, info_nce_loss
from .kernels.contrastive.exchange import check_ranks, gather_equal


class ClipLoss(nn.Module):
    """A drop-in for ``open_clip.ClipLoss`` (open_clip_torch 3.3.0), without the matrix of logits.

    With several ranks it gathers over the default process group, and as OpenCLIP's it needs as many pairs on every
    rank. b of N pairs per rank, W ranks, L the loss of all pairs and L_r that of rank r's:

        local_loss  gather_with_grad  value  gradient of own features                gradient of logit_scale
        False       False             L      dL                                      dL
        False       True              L      W dL                                    dL
        True        True              L_r    d(sum of all L_r) = W dL                dL, of which dL_r is OpenCLIP's
        True        False             L_r    of L_r where own features are not       dL_r
                                             among those that others are compared to

    The third row differs in what a single rank has, not in the mean over ranks that DistributedDataParallel takes.
    Where gradients cross ranks, they are OpenCLIP's if the gradient of the loss is the same on every rank.

    Args:
        local_loss: the loss of this rank's pairs only, in place of all.
        gather_with_grad: let gradients flow back to the features of other ranks.
        cache_labels: keep what :meth:`get_ground_truth` returns.
        rank: of this process.
        world_size: number of processes; with one, nothing is gathered.
        use_horovod: refused.

    Raises:
        ValueError: ``use_horovod``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss: use_horovod must be False, got True: features are gathered by torch.distributed"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of normalised features.

        Args:
            image_features: [b, D], float32, float16 or bfloat16.
            text_features: [b, D], the same dtype; row i belongs to row i of ``image_features``.
            logit_scale: factor on the similarities, one element.
            logit_bias: what :meth:`get_logits` adds to every logit, one element: no softmax depends on it, so it
                changes nothing, and its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit together, or another number of ranks than
                ``world_size``.
            RuntimeError: several ranks, but ``torch.distributed`` is not initialised.
        """
        if self.world_size > 1:
            check_ranks("ClipLoss", self.rank, self.world_size)
        if self.world_size == 1:
            loss = contrastive_loss(image_features, text_features, logit_scale)
        elif self.local_loss and not self.gather_with_grad:
            loss = self._loss_of_own(image_features, text_features, logit_scale)
        else:
            loss = self._loss_of_ranks(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(f"ClipLoss: logit_bias must have one element, got shape {tuple(logit_bias.shape)}")
            # a gradient all the same: DistributedDataParallel waits for one of each parameter
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All logits of images and of texts, [b, N] with ``local_loss``, otherwise [N, N]: memory that the loss itself
        does not take.
        """
        all_images, all_texts = image_features, text_features
        if self.world_size > 1:
            check_ranks("ClipLoss", self.rank, self.world_size)
            all_images, all_texts = (self._gather(side) for side in (image_features, text_features))
        if self.world_size > 1 and not self.local_loss:
            image_features, text_features = all_images, all_texts
        bias = 0.0 if logit_bias is None else logit_bias
        of_images = logit_scale * image_features @ all_texts.T + bias
        of_texts = logit_scale * text_features @ all_images.T + bias
        return of_images, of_texts

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """For each row of the logits, the column of its pair."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def _loss_of_ranks(self, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
        scale = logit_scale
        if not (self.local_loss or self.gather_with_grad) and isinstance(scale, Tensor) and scale.requires_grad:
            # below, each rank takes 1/W of the gradient, and for features W ranks add up
            scale = scale.view_as(scale)
            scale.register_hook(lambda grad: grad * self.world_size)
        loss = distributed_contrastive_loss(image, text, scale, sizes=[len(image)] * self.world_size)
        return loss if self.local_loss else _Mean.apply(loss, self.gather_with_grad)  # type: ignore[no-untyped-call]

    def _loss_of_own(self, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
        return (self._among(image, text, logit_scale) + self._among(text, image, logit_scale)) / 2

    def _among(self, features: Tensor, partners: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Each of ``features`` among the partners of all ranks, which get no gradient: none is computed for them."""
        everyones = gather_equal(partners.detach(), None)
        others = torch.cat([everyones[: self.rank], everyones[self.rank + 1 :]]).flatten(0, 1)
        return info_nce_loss(features, partners.detach(), logit_scale, negatives=others)

    def _gather(self, features: Tensor) -> Tensor:
        if self.gather_with_grad:
            return torch.cat(all_gather(features.contiguous()))
        blocks = list(gather_equal(features.detach(), None))
        if not self.local_loss:
            blocks[self.rank] = features
        return torch.cat(blocks)


class _Mean(torch.autograd.Function):
    """Mean over ranks. Its gradient to this rank's value is that of all ranks' means, or of this one's only."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, of_all: bool) -> Tensor:
        ctx.of_all = of_all
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.of_all:
            return _Mean.apply(grad, True), None  # type: ignore[no-untyped-call]
        return grad / dist.get_world_size(), None
