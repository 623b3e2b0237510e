"""OpenCLIP's loss modules on the blockwise kernels: the same constructors, calls, values and gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from ..kernels import contrastive_loss, distributed_contrastive_loss, info_nce_loss
from ..kernels.contrastive.exchange import check_ranks, gather_equal
from ..kernels.contrastive.small_batch import suits_whole


class RankLoss(nn.Module):
    """The base class of the CLIP and SigLIP losses, which checks the ranks and returns a scalar or a dict.

    Args:
        rank: rank of this process in the default process group.
        world_size: number of processes. With 1, or with 0 as some of OpenCLIP's callers pass, nothing is exchanged.
        cache_labels: its effect depends on the subclass.
    """

    def __init__(self, rank: int, world_size: int, *, cache_labels: bool) -> None:
        super().__init__()
        self.rank, self.world_size, self.cache_labels = rank, world_size, cache_labels

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the contrastive or sigmoid loss of normalised features.

        Args:
            image_features: [b, D], float32, float16 or bfloat16.
            text_features: [b, D], the same dtype; row i belongs to row i of ``image_features``.
            logit_scale: factor on the cosine similarities, one element: a number, or a tensor of shape [] or, as FSDP
                needs it, [1]. Its gradient has the same shape.
            logit_bias: the bias of every logit, in the same form as ``logit_scale``; None adds nothing.
            output_dict: return ``{"contrastive_loss": loss}`` instead of the loss, a scalar.

        Raises:
            ValueError, TypeError: if shapes, devices or dtypes do not fit together, or if rank or number of processes
                differ from the default process group.
            RuntimeError: if there are several processes and ``torch.distributed`` is not initialised.
        """
        self._check_ranks()
        loss = self._of_rank(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_rank(self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
        """Compute the loss of this rank, with features of other ranks if the subclass uses them."""
        raise NotImplementedError

    def _check_ranks(self) -> None:
        """Refuse a loss whose rank or world size differs from those of the default process group."""
        if self.world_size > 1:
            check_ranks(type(self).__name__, self.rank, self.world_size)


def logits_of(
    features: Tensor, partners: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
) -> Tensor:
    """Return the logits [N, M] of ``features`` [N, D] and ``partners`` [M, D], which the losses never form."""
    logits = logit_scale * features @ partners.T
    return logits if logit_bias is None else logits + logit_bias


class ClipLoss(RankLoss):
    """A drop-in for ``open_clip.ClipLoss`` (3.3.0 and main) that never holds the matrix of logits.

    With several ranks it gathers features over the default process group; as in OpenCLIP, every rank must hold the same
    number of pairs. ``logit_bias`` does not change the loss, because no softmax depends on it, and its gradient is
    zero.
    With b of N pairs per rank, W ranks, L the loss of all pairs and L_r the loss of the pairs of rank r:

        local_loss  gather_with_grad  value  gradient of own features                gradient of logit_scale
        False       False             L      dL                                      dL
        False       True              L      W dL                                    dL
        True        True              L_r    d(sum of all L_r) = W dL                dL; OpenCLIP has dL_r
        True        False             L_r    dL_r, but not through own features      dL_r
                                             as partners of other features

    In the third row, the gradient on a single rank differs from OpenCLIP, but the mean over ranks, which
    DistributedDataParallel takes, is the same. Gradients that cross ranks equal OpenCLIP's if the gradient of the loss
    is the same on every rank.

    Args:
        local_loss: compute the loss of this rank's pairs, not of all pairs.
        gather_with_grad: let gradients flow back to the features of other ranks.
        cache_labels: keep the labels that :meth:`get_ground_truth` returns, and return them again.
        rank, world_size: as for :class:`RankLoss`.
        use_horovod: must be False; it is an argument because OpenCLIP 3.3.0 has it.

    Raises:
        ValueError: if ``use_horovod`` is True.
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
        super().__init__(rank, world_size, cache_labels=cache_labels)
        if use_horovod:
            raise ValueError(
                f"{type(self).__name__}: use_horovod must be False, got True: features are gathered by "
                "torch.distributed"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss's logits, [b, N] each with ``local_loss``, and [N, N] without."""
        self._check_ranks()
        all_images, all_texts = image_features, text_features
        if self.world_size > 1:
            all_images, all_texts = (self._gather(side) for side in (image_features, text_features))
            if not self.local_loss:
                image_features, text_features = all_images, all_texts
        return (
            logits_of(image_features, all_texts, logit_scale, logit_bias),
            logits_of(text_features, all_images, logit_scale, logit_bias),
        )

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Return the labels of the contrastive loss: for each row of the logits the column of its pair."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def _of_rank(self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
        """Return the contrastive loss of this rank's pairs."""
        if self.world_size <= 1:
            loss = contrastive_loss(image, text, scale)
        elif self.local_loss and not self.gather_with_grad:
            loss = (self._among_all(image, text, scale) + self._among_all(text, image, scale)) / 2
        elif not self.local_loss and self._is_small(image, text):
            loss = contrastive_loss(self._gather(image), self._gather(text), scale)
        else:
            loss = self._distributed_loss(image, text, scale)
        if isinstance(bias, Tensor):
            if bias.numel() != 1:
                raise ValueError(
                    f"{type(self).__name__}: logit_bias must have one element, got shape {tuple(bias.shape)}"
                )
            # DistributedDataParallel waits for a gradient of every parameter, so the bias needs one: zero, not None.
            loss = loss + 0.0 * bias.sum()
        return loss

    def _is_small(self, image: Tensor, text: Tensor) -> bool:
        """Return True if gathering all features for the loss is cheaper than exchanging sums: few pairs on a CPU."""
        return image.shape == text.shape and suits_whole(image, text, image.dtype, self.world_size)

    def _distributed_loss(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        """Return the contrastive loss over all ranks, without gathering the features of all ranks at once."""
        if not (self.local_loss or self.gather_with_grad) and isinstance(scale, Tensor) and scale.requires_grad:
            # The backward pass of _Mean, the mean over W ranks, divides the gradient by W. For features, the sum over
            # ranks makes up for it; for the scale, the factor in this hook does.
            scale = scale.view_as(scale)
            scale.register_hook(lambda grad: grad * self.world_size)
        loss = distributed_contrastive_loss(image, text, scale, sizes=[len(image)] * self.world_size)
        return self._over_ranks(loss)

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """Return the contrastive loss of this rank's pairs with ``local_loss``, and the mean over ranks without."""
        return loss if self.local_loss else _Mean.apply(loss, self.gather_with_grad)  # type: ignore[no-untyped-call]

    def _among_all(self, features: Tensor, partners: Tensor, scale: Tensor | float) -> Tensor:
        """Compute the loss of this rank's features among the partners of all ranks, which get no gradient."""
        gathered = gather_equal(partners.detach(), None)
        others = torch.cat([gathered[: self.rank], gathered[self.rank + 1 :]]).flatten(0, 1)
        return info_nce_loss(features, partners.detach(), scale, negatives=others)

    def _gather(self, features: Tensor) -> Tensor:
        """Gather the features of all ranks, as OpenCLIP's loss does."""
        if self.gather_with_grad:
            return torch.cat(all_gather(features.contiguous()))
        blocks = list(gather_equal(features.detach(), None))
        if not self.local_loss:
            blocks[self.rank] = features
        return torch.cat(blocks)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a loss over ranks; gradients flow back from the means of all ranks."""
    return _Mean.apply(value, True)  # type: ignore[no-untyped-call]


class _Mean(torch.autograd.Function):
    """The mean of a loss over ranks. Its gradient comes from the means of all ranks, or only from this rank's mean."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, from_all: bool) -> Tensor:
        """Compute the mean of a loss over ranks."""
        ctx.from_all = from_all
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient of a loss from the gradient of its mean over ranks."""
        if ctx.from_all:
            return _Mean.apply(grad, True), None  # type: ignore[no-untyped-call]
        return grad / dist.get_world_size(), None
