"""The data of a linear probe, and the choice of its penalty (Radford et al. 2021, appendix A.3)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from ..features import LabelledFeatures
from .probe_solver import Classifier, Samples, Solver

# The values of C that can be chosen: 12 decades with 8 steps each.
VALUES = tuple(10.0 ** (step / 8 - 6) for step in range(97))
FIRST_STEP = 16  # two decades
VALIDATION_SHARE = 0.2  # of the training set, without a validation set


def samples_of(found: LabelledFeatures, classnames: Sequence[str], name: str) -> Samples:
    """Return the features of a set with the numbers of their classes.

    Args:
        found: the set.
        classnames: of the training set.
        name: of the set, for errors.

    Raises:
        ValueError: there is a label that is not in the training set, or a feature is not finite.
    """
    numbers = {label: number for number, label in enumerate(classnames)}
    unknown = Counter(label for label in found.labels if label not in numbers)
    if unknown:
        label, count = unknown.most_common(1)[0]
        raise ValueError(
            f"{name} has {len(unknown)} labels that the training set lacks, such as {label!r} ({count} images): "
            "train on all classes, or name the right key by --label-by"
        )
    if not found.features.isfinite().all():
        raise ValueError(f"features of {name} contain NaN or infinity")
    return Samples(found.features.cpu(), torch.tensor([numbers[label] for label in found.labels]))


def split(train: Samples, seed: int) -> tuple[Samples, Samples]:
    """Return a training and a validation set: a fifth of each class, at least one image if it has two.

    Raises:
        ValueError: no class has two images.
    """
    kept, taken = [], []
    for members in members_of_classes(train, seed):
        count = max(round(VALIDATION_SHARE * len(members)), min(1, len(members) - 1))
        taken.append(members[:count])
        kept.append(members[count:])
    if not sum(map(len, taken)):
        raise ValueError("no class has two training images, one of which could choose C: give --val-data or --C")
    return train.take(torch.cat(kept)), train.take(torch.cat(taken))


def members_of_classes(train: Samples, seed: int) -> list[torch.Tensor]:
    """Return the numbers of the images of each class, in an order drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.classes), generator=generator)
    by_class = order[train.classes[order].argsort(stable=True)]
    return list(by_class.split(torch.bincount(train.classes).tolist()))


@dataclasses.dataclass
class Choice:
    """A value of C, and the share of the validation set that is right with each value that was tried."""

    C: float
    tried: dict[float, float]


def choose(right: Callable[[float], float]) -> Choice:
    """Search the value of C with the largest share of right classes, as the paper does.

    It starts with one value every two decades, and halves the interval around the best until it is an eighth of a
    decade. Of equal shares that of the strongest penalty is the best.

    Args:
        right: the share for a value of C.
    """
    tried: dict[int, float] = {}

    def best_of(steps: Iterable[int]) -> int:
        for step in steps:
            if step not in tried:
                tried[step] = right(VALUES[step])
        return max(sorted(steps), key=tried.__getitem__)

    size = FIRST_STEP
    best = best_of(range(0, len(VALUES), size))
    while size > 1:
        size //= 2
        best = best_of([step for step in (best - size, best, best + size) if 0 <= step < len(VALUES)])
    return Choice(VALUES[best], {VALUES[step]: tried[step] for step in sorted(tried)})


@dataclasses.dataclass
class Probe:
    """Fits classifiers, each with a value of C of its own.

    Attributes:
        solver: makes what fits classifiers to a training set.
        classnames: of the training set.
        validation: chooses C; None for a given one.
        C: the given one.
    """

    solver: Callable[[Samples], Solver]
    classnames: Sequence[str]
    validation: Samples | None
    C: float = 1.0

    def fit(self, train: Samples, *, then_all: bool = False) -> tuple[Classifier, Choice]:
        """Return the classifier of a training set, and how its C was chosen.

        Args:
            train: the training set, without what chooses C.
            then_all: with the chosen value, fit the classifier to both.
        """
        solver = self.solver(train)
        validation = self.validation
        if validation is None:
            return solver.fit(self.C), Choice(self.C, {})
        choice = choose(lambda C: self._right(solver.fit(C), validation))
        solver = self.solver(train.and_those_of(validation)) if then_all else solver
        return solver.fit(choice.C), choice

    def _right(self, classifier: Classifier, samples: Samples) -> float:
        return classifier.classify(samples, self.classnames).right.double().mean().item()
