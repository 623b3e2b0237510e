"""Zero-shot accuracy on ImageNet and ImageNet-V2, with OpenAI's class names and prompt templates."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..io.progress import Progress, progress
from ..models import CLIP
from .features import LabelledFeatures
from .labelled import LabelledSet, in_order
from .zero_shot import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier, top_classes

CLASSES = 4  # the prompts of this many classes, 80 each, are encoded at once
# The names of ImageNet-V2's image folder "matched frequency" in its Python package and in its archive.
V2_FOLDERS = ("ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val")


def imagenet_set(folder: str) -> LabelledSet:
    """Return the images of ImageNet's validation set in ``folder``, or of ImageNet-V2 if the folder holds its images.

    Raises:
        ValueError: the folder does not exist, or the number of its classes is not ImageNet's.
    """
    found = next((path for name in V2_FOLDERS if (path := Path(folder, name)).is_dir()), Path(folder))
    count = len(_classes(found)) if found.is_dir() else None
    if count != len(IMAGENET_CLASSNAMES):
        what = "is no folder" if count is None else f"has {count} sub-folders"
        raise ValueError(f"{folder} {what}: ImageNet has one sub-folder for each of {len(IMAGENET_CLASSNAMES)} classes")
    return LabelledSet(str(found))


def _classes(folder: Path) -> list[str]:
    """Return the names of the class folders in the order of ImageNet's classes; numbers are sorted by value."""
    return in_order(path.name for path in folder.iterdir() if path.is_dir())


def imagenet_classifier(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], device: torch.device, rank: int = 0, ranks: int = 1,
    show: Progress = progress,
) -> Tensor:  # fmt: skip
    """Return one rank's part of ImageNet's zero-shot classifier: weights [embed_dim, n] of n consecutive classes."""
    count = len(IMAGENET_CLASSNAMES)
    names = IMAGENET_CLASSNAMES[rank * count // ranks : (rank + 1) * count // ranks]
    return build_zero_shot_classifier(
        model, tokenizer, names, OPENAI_IMAGENET_TEMPLATES, CLASSES, device, show=show
    )  # fmt: skip


def imagenet_accuracy(images: LabelledSet, features: LabelledFeatures, classifier: Tensor) -> dict[str, float]:
    """Return zero-shot top-1 and top-5 accuracy on ImageNet: ``{"top1": ..., "top5": ...}``."""
    numbers = {name: number for number, name in enumerate(_classes(Path(images.data)))}
    classes = torch.tensor([numbers[label] for label in features.labels], device=features.features.device)
    right = top_classes(features.features, classifier, 5) == classes[:, None]
    return {"top1": right[:, 0].double().mean().item(), "top5": right.any(1).double().mean().item()}
