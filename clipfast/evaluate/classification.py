"""Zero-shot classification by CLIP_benchmark's definitions, with intervals, and the classes of the lowest recall.

An image has one right class, its own. (The results of ``evaluate.evaluate`` under "zero_shot" also accept the class of
another image with equal pixels.)
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .intervals import bootstrap, wilson

TAKEN_FOR = 5  # for each of the worst classes, the results list at most this many classes that were predicted instead


class Classified(NamedTuple):
    """The predictions of a zero-shot classifier for images.

    Attributes:
        classnames: the labels of the classes.
        classes: [N], the index of each image's class.
        best: [N, 5], the indices of the classes with the highest scores, the best first; all classes if
            there are fewer than five.
        ahead: [N], the number of other classes that score at least as high as the image's own.
    """

    classnames: Sequence[str]
    classes: Tensor
    best: Tensor
    ahead: Tensor

    @property
    def right(self) -> Tensor:
        """[N], True where the class with the highest zero-shot score is the image's own."""
        return self.best[:, 0] == self.classes


@torch.no_grad()
def classify(
    features: Tensor, labels: Sequence[str], classnames: Sequence[str], classifier: Tensor, block: int = 4096,
    *, owner: Tensor | None = None,
) -> Classified:  # fmt: skip
    """Return the zero-shot predictions for images. Only the scores of ``block`` images are in memory at a time.

    Args:
        features: the features of the images [N, D].
        labels: the label of each image.
        classnames: the labels of the classes, which include the label of every image.
        classifier: the weights [D, len(classnames)].
        block: the number of images that are scored at once.
        owner: [M], the index of the class of each column of the classifier [D, M], if classes may have several columns.
            Each class has at least one; the highest score of its columns is its score.

    Raises:
        ValueError: the number of weights differs from the number of classes, or a score is not finite.
    """
    if owner is None and classifier.shape[1] != len(classnames):
        raise ValueError(f"{classifier.shape[1]} class names for {len(classnames)} classes")
    numbers = {name: number for number, name in enumerate(classnames)}
    classes = torch.tensor([numbers[label] for label in labels], device=features.device)
    best, ahead = [], []
    for rows, own in zip(features.split(block), classes.split(block), strict=True):
        scores = rows @ classifier
        if not scores.isfinite().all():
            raise ValueError("zero-shot classification: features contain NaN or infinity")
        if owner is not None:
            lowest = scores.new_full((len(rows), len(classnames)), -torch.inf)
            scores = lowest.scatter_reduce(1, owner.to(scores.device).expand_as(scores), scores, "amax")
        best.append(scores.topk(min(5, len(classnames)), dim=1).indices)
        ahead.append((scores >= scores.gather(1, own[:, None])).sum(1) - 1)
    return Classified(classnames, classes.cpu(), torch.cat(best).cpu(), torch.cat(ahead).cpu())


def _in_best(found: Classified, k: int) -> Tensor:
    """Return, for each image, whether its own class is among the ``k`` best classes."""
    return (found.best[:, :k] == found.classes[:, None]).any(1)


def recalls(found: Classified) -> Tensor:
    """Return the recall of each class that has images, as float64."""
    images = torch.bincount(found.classes)
    hits = torch.bincount(found.classes, found.right.double(), minlength=len(images))
    return hits[images > 0] / images[images > 0]


def metrics(found: Classified) -> dict[str, float | None]:
    """Return zero-shot acc1, acc5 and mean_per_class_recall; acc5 is None if there are fewer than five classes."""
    acc5 = _in_best(found, 5).double().mean().item() if len(found.classnames) >= 5 else None
    return {
        "acc1": found.right.double().mean().item(),
        "acc5": acc5,
        "mean_per_class_recall": recalls(found).mean().item(),
    }


def intervals(found: Classified) -> dict[str, tuple[float, float] | None]:
    """Return the 95% interval of each zero-shot metric.

    The accuracies have Wilson's interval. The mean recall has a bootstrap interval over the classes, since an interval
    over the images would be too narrow for classes with few images.
    """
    acc1, acc5 = (wilson(int(_in_best(found, k).sum()), len(found.classes)) for k in (1, 5))
    by_class = recalls(found)
    recall = bootstrap(by_class, torch.ones_like(by_class))
    return {"acc1": acc1, "acc5": acc5 if len(found.classnames) >= 5 else None, "mean_per_class_recall": recall}


def worst_classes(found: Classified, most: int) -> list[dict[str, Any]]:
    """Return the classes of the lowest recall, the worst first, each with the wrong classes that its images got.

    Of two classes of equal recall, the worse one is the one that ranks lower for its images, on average.
    """
    members: dict[int, list[int]] = {}
    for image, number in enumerate(found.classes.tolist()):
        members.setdefault(number, []).append(image)
    rows: list[dict[str, Any]] = []
    for number, images in members.items():
        taken = Counter(found.best[images, 0].tolist())
        recall, place = taken.pop(number, 0) / len(images), 1 + found.ahead[images].double().mean().item()
        wrong = {found.classnames[other]: count for other, count in taken.most_common(TAKEN_FOR)}
        name = found.classnames[number]
        rows.append({"class": name, "images": len(images), "recall": recall, "mean_place": place, "taken_for": wrong})
    return sorted(rows, key=lambda row: (row["recall"], -row["mean_place"], row["class"]))[:most]
