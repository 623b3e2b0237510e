"""OpenCLIP's ``CoCaLoss``: the contrastive loss on the kernels, and the cross-entropy of captions."""

import torch
from torch import Tensor, nn

from .clip_loss import ClipLoss

_IGNORED = -100  # the losses of captions leave out tokens with this label
_COMPUTE_DTYPES: dict[torch.dtype | str | None, torch.dtype | None] = {
    "": None, "model": None, None: None, "float32": torch.float32, "fp32": torch.float32, torch.float32: torch.float32,
}  # fmt: skip


class CoCaLoss(ClipLoss):
    """A drop-in for ``open_clip.CoCaLoss`` (3.3.0 to 4.2.1) that never holds the N x N logits of the contrastive loss.

    The cross-entropy of the captions is computed by PyTorch from given logits, or has been computed by the model.

    Args:
        caption_loss_weight: factor on the loss of the captions.
        clip_loss_weight: factor on the contrastive loss; with 0 that loss is not computed.
        pad_id: the id of the padding token, which does not count in captions; labels of -100 never count. None if there
            is no padding token.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as for :class:`ClipLoss`.
        z_loss_weight: factor on the mean square of the captions' logsumexp; OpenCLIP has it from version 4 on.
        compute_dtype: the dtype to which logits are cast, torch.float32 or its name, or "model" to keep theirs;
            OpenCLIP has it from version 4 on. If it is given, the returned dict also has the detached parts of the
            captions' loss.

    Raises:
        ValueError: if ``use_horovod`` is True, ``z_loss_weight`` negative, or ``compute_dtype`` unknown.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int | None = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        z_loss_weight: float = 0.0,
        compute_dtype: torch.dtype | str | None = "",
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        if z_loss_weight < 0:
            raise ValueError(f"CoCaLoss: z_loss_weight must not be negative, got {z_loss_weight}")
        if compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(f'CoCaLoss: compute_dtype must be "float32" or "model", got {compute_dtype!r}')
        self.pad_id, self.z_loss_weight = pad_id, z_loss_weight
        self.compute_dtype, self._has_parts = _COMPUTE_DTYPES[compute_dtype], compute_dtype != ""
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=_IGNORED)

    def forward(  # type: ignore[override]  # OpenCLIP's CoCaLoss orders its arguments otherwise than its ClipLoss
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
        output_dict: bool = False,
        caption_loss_ce: Tensor | None = None,
        caption_loss_z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute the contrastive loss and the loss of the captions, each times its weight.

        Args:
            image_features, text_features, logit_scale: as for :class:`ClipLoss`.
            logits: [b, T, V], floating, of the tokens of the captions.
            labels: [b, T], int64, the tokens; those that are ``pad_id`` or -100 do not count.
            output_dict: return ``{"contrastive_loss": ..., "caption_loss": ...}`` instead of the two losses, scalars.
            caption_loss_ce, caption_loss_z: the cross-entropy of the captions and the mean square of their logsumexp,
                in place of ``logits`` and ``labels``, if the model has computed them.

        Raises:
            ValueError: logits, labels, the scale or ``caption_loss_z`` are missing.
            ValueError, TypeError, RuntimeError: as for :class:`ClipLoss`; and the errors of
                ``torch.nn.CrossEntropyLoss`` for logits and labels that do not fit together.
        """
        if logit_scale is None:
            raise ValueError("CoCaLoss: logit_scale is missing")
        if caption_loss_ce is None:
            caption_loss_ce, caption_loss_z = self._of_captions(logits, labels)
        if self.z_loss_weight and caption_loss_z is None:
            raise ValueError(f"CoCaLoss: z_loss_weight is {self.z_loss_weight}, but the model gave no caption_loss_z")
        if self.clip_loss_weight:
            self._check_ranks()
            contrastive = self.clip_loss_weight * self._of_rank(image_features, text_features, logit_scale, None)
        else:
            contrastive = torch.tensor(0, device=caption_loss_ce.device)
        caption = self.caption_loss_weight * caption_loss_ce
        if self.z_loss_weight and caption_loss_z is not None:
            caption = caption + self.z_loss_weight * caption_loss_z
        if not output_dict:
            return contrastive, caption
        parts = {"caption_loss_ce": caption_loss_ce, "caption_loss_z": caption_loss_z} if self._has_parts else {}
        given = {name: part.detach() for name, part in parts.items() if part is not None}
        return {"contrastive_loss": contrastive, "caption_loss": caption, **given}

    def _of_captions(self, logits: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the cross-entropy of the captions, and the mean square of their logsumexp if ``z_loss_weight``."""
        if logits is None or labels is None:
            raise ValueError("CoCaLoss: give logits and labels, or caption_loss_ce")
        if self.pad_id is not None:
            labels = labels.masked_fill(labels == self.pad_id, _IGNORED)
        if self.compute_dtype is not None:
            logits = logits.to(self.compute_dtype)
        entropy: Tensor = self.caption_loss(logits.transpose(1, 2), labels)  # PyTorch expects classes in dimension 1
        if not self.z_loss_weight:
            return entropy, None
        counts = labels != _IGNORED
        squares = torch.where(counts, logits.logsumexp(-1).square(), 0)
        return entropy, squares.sum() / counts.sum().clamp(min=1)
