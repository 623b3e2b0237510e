"""OpenCLIP's ``CoCaLoss``: the contrastive loss on the kernels, and the cross-entropy of captions."""

import torch
from torch import Tensor, nn

from .losses import ClipLoss


class CoCaLoss(ClipLoss):
    """A drop-in for ``open_clip.CoCaLoss`` (3.3.0 and main) that never holds the N x N logits of the contrastive loss.

    The cross-entropy of the captions is PyTorch's, since their logits are given.

    Args:
        caption_loss_weight: factor on the loss of the captions.
        clip_loss_weight: factor on the contrastive loss, which is not computed if it is 0.
        pad_id: the token that does not count in captions.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as for :class:`ClipLoss`.

    Raises:
        ValueError: if ``use_horovod`` is True.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # OpenCLIP's call, in another order than that of its ClipLoss
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses, each times its weight.

        Args:
            image_features, text_features, logit_scale: as for :class:`ClipLoss`.
            logits: [b, T, V], floating, of the tokens of the captions.
            labels: [b, T], int64, the tokens; those that are ``pad_id`` do not count.
            output_dict: return ``{"contrastive_loss": ..., "caption_loss": ...}`` instead of the two losses, scalars.

        Raises:
            ValueError, TypeError, RuntimeError: as for :class:`ClipLoss`; and what ``torch.nn.CrossEntropyLoss`` raises
                for logits and labels that do not fit together.
        """
        if self.clip_loss_weight:
            self._check_ranks()
            contrastive = self.clip_loss_weight * self._of_rank(image_features, text_features, logit_scale, None)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        # PyTorch wants the classes before the tokens.
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption
