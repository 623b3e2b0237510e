"""ImageNet during training, as ``--imagenet-val`` and ``--imagenet-v2`` ask for it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluation.features import LabelledFeatures
from ..evaluation.imagenet import imagenet_accuracy, imagenet_classifier, imagenet_set
from ..evaluation.labelled import LabelledSet
from ..models import CLIP
from ..progress import Progress, progress
from .config import TrainConfig
from .world import World


class ImageNet:
    """The ImageNet folders of a run, and the accuracy on them.

    Attributes:
        sets: the images by OpenCLIP's name of their figures.
        results: the last figures, under OpenCLIP's names.

    Raises:
        ValueError: a folder is not ImageNet's; the message names the flag.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.sets: dict[str, LabelledSet] = {}
        self.results: dict[str, float] = {}
        self._part: Tensor | None = None  # of the classifier: that of this rank
        if config.zeroshot_frequency == 0:
            return
        for flag, name, folder in (
            ("--imagenet-val", "imagenet-zeroshot-val", config.imagenet_val),
            ("--imagenet-v2", "imagenetv2-zeroshot-val", config.imagenet_v2),
        ):
            try:
                if folder is not None:
                    self.sets[name] = imagenet_set(folder)
                    self.sets[name].check()
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error

    def evaluate(
        self,
        model: CLIP,
        tokenizer: Callable[[list[str]], Tensor],
        encoded: Callable[[LabelledSet], LabelledFeatures | None],
        device: torch.device,
        world: World,
        show: Progress = progress,
    ) -> dict[str, float]:
        """Return the accuracy of ``model`` on each folder; all ranks must call it.

        The prompts are encoded anew if the weights that encode them are trained.

        Args:
            model: in evaluation mode.
            tokenizer: of the model.
            encoded: encodes a set; all ranks call it, and rank 0 gets its features.
            device: of the model.
            world: the processes, each of which encodes the prompts of some classes.
            show: shows how far it is.
        """

        def encode() -> None:
            with world.phase("evaluation"):
                self._part = imagenet_classifier(model, tokenizer, device, world.rank, world.size, show).cpu()

        if self._part is None or _trains_texts(model):
            world.agree(encode)
        assert self._part is not None
        parts = world.gather(self._part)
        figures: dict[str, float] = {}
        for name, images in self.sets.items():
            features = encoded(images)
            if features is not None:
                accuracy = imagenet_accuracy(images, features, torch.cat(parts, 1).to(device))
                figures |= {f"{name}-{kind}": value for kind, value in accuracy.items()}
        self.results = world.on_main(lambda: figures)
        return self.results


def _trains_texts(model: CLIP) -> bool:
    """Return True if any weight is trained on which the features of a text depend."""
    others = ("visual.", "logit_")
    return any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(others))
