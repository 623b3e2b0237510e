"""Distillation: the student also learns the logits of a teacher, which ``--distill-model`` names."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..distill_loss import DistillClipLoss
from ..factory import create_model
from ..models import CLIP, SigLIPConfig
from .build import registered
from .config import TrainConfig
from .world import ALONE, World


class Distillation:
    """The contrastive loss plus the cross-entropy of the logits against a teacher's, as OpenCLIP adds them.

    The teacher sees the images and texts that the student sees, without dropped patches.

    Args:
        config: of the run.
        student: the model that is trained.
        device: of both; on "meta" the teacher's weights are not read.
        world: the processes.
        autocast: makes the context of the teacher's forward pass.

    Raises:
        ValueError: there is no such teacher, or its inputs are not the student's.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: CLIP,
        device: torch.device,
        world: World = ALONE,
        autocast: Callable[[], torch.autocast] | None = None,
    ) -> None:
        if config.distill_model is None:
            raise ValueError("distillation needs --distill-model: the name of the teacher")
        self.teacher = create_model(
            registered(config.distill_model), config.distill_pretrained, device=device, backend=config.backend,
            cache_dir=config.cache_dir, load_weights=device.type != "meta", force_patch_dropout=None,
        ).eval().requires_grad_(False)  # fmt: skip
        for what, mine, theirs in (
            ("images of", student.visual.image_size, self.teacher.visual.image_size),
            ("texts of", student.context_length, self.teacher.context_length),
            ("a vocabulary of", student.config.text.vocab_size, self.teacher.config.text.vocab_size),
        ):
            if mine != theirs:
                raise ValueError(
                    f"--distill-model {config.distill_model} has {what} {theirs}, and {config.model} of {mine}: a "
                    "teacher must take the inputs of its student"
                )
        if SigLIPConfig in map(type, (student.config, self.teacher.config)):
            raise ValueError("--distill-model works with CLIP's loss only, not with SigLIP models")
        self._autocast = autocast
        self._loss = DistillClipLoss(
            local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size
        )  # whose gradients, averaged over ranks, are those of the whole batch
        self._targets: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def look(self, images: Tensor, texts: Tensor, size: int) -> None:
        """Let the teacher encode the batch of the next step, so many pairs at a time."""
        assert self._autocast is not None
        with self._autocast():
            parts = [self.teacher(*part)[:2] for part in zip(images.split(size), texts.split(size), strict=True)]
        image_features, text_features = (torch.cat(side) for side in zip(*parts, strict=True))
        self._targets = image_features, text_features, self.teacher.logit_scale.exp()

    def __call__(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """Return the loss of the student's outputs for the batch that the teacher has looked at last."""
        assert self._targets is not None
        contrastive, distill = self._loss(image_features, text_features, logit_scale, *self._targets)
        return contrastive + distill
