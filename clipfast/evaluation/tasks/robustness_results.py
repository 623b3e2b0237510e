"""The results of ``clipfast eval robustness``: accuracies by shift, their means, and effective robustness."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import result_of
from ..class_subsets import ClassSubset
from ..classification import Classified, classify, intervals, metrics
from ..effective_robustness import AVERAGE, Interval, Line, Point, figures, fit, mean_interval, read_points
from ..features import LabelledFeatures
from ..intervals import bootstrap, wilson
from ..shifts import Shift
from ..suite import label

SYNTHETIC = "synthetic"  # the mean over all synthetic shifts
TASK = "zeroshot_classification"


class Share(NamedTuple):
    """An accuracy and its 95% interval."""

    value: float
    interval: Interval


class OnShift(NamedTuple):
    """The classes that a model gives to a shifted set, and to the images of the base that are of the same classes.

    Attributes:
        shifted, base: the classes.
        members: [images of the base], True for those.
        left_out: images of the shifted set whose class the base lacks.
        skipped: images of the shifted set that cannot be used.
    """

    shifted: Classified
    base: Classified
    members: Tensor
    left_out: int
    skipped: int


@dataclasses.dataclass
class Judged:
    """What a model gets right.

    Attributes:
        model, pretrained: its name, and its weights where the name does not say them.
        base: the classes of the base.
        skipped: images of the base that cannot be used.
        natural: by the name of the shifted set.
        synthetic: by shift.
    """

    model: str
    pretrained: str
    base: Classified
    skipped: int
    natural: dict[str, OnShift]
    synthetic: dict[Shift, Classified]

    @functools.cached_property
    def accuracies(self) -> dict[str, tuple[Share, Share]]:
        """The accuracies on the base and under the shift, for each shifted set and each mean."""
        found = {name: (_acc1(on.base), _acc1(on.shifted)) for name, on in self.natural.items()}
        if len(found) > 1:
            found[AVERAGE] = self._average(*zip(*found.values(), strict=True))
        base = _acc1(self.base)
        kinds = list(dict.fromkeys(shift.name for shift in self.synthetic))
        found.update({kind: (base, self._mean_of({kind})) for kind in kinds})
        if len(kinds) > 1:
            found[SYNTHETIC] = (base, self._mean_of(set(kinds)))
        return found

    def points(self) -> list[tuple[str, Point]]:
        """Return the same as points, each with the name of its shift."""
        return [
            (name, Point(label(self.model, self.pretrained), base.value, shift.value))
            for name, (base, shift) in self.accuracies.items()
        ]

    def _average(self, bases: Sequence[Share], shifts: Sequence[Share]) -> tuple[Share, Share]:
        """Return the means over the natural shifts. Images of the base are in the subsets of several."""
        hits, trials = torch.zeros(2, len(self.base.classes), dtype=torch.double)
        for on in self.natural.values():
            hits[on.members] += on.base.right.double() / len(on.base.classes)
            trials[on.members] += 1 / len(on.base.classes)
        base = Share(sum(share.value for share in bases) / len(bases), bootstrap(hits, trials))
        values = [share.value for share in shifts]
        return base, Share(sum(values) / len(values), mean_interval(values, [share.interval for share in shifts]))

    def _mean_of(self, kinds: set[str]) -> Share:
        """Return the mean over all strengths of synthetic shifts, whose images are the same."""
        right = torch.stack([found.right.double() for shift, found in self.synthetic.items() if shift.name in kinds])
        return Share(right.mean().item(), bootstrap(right.mean(0), torch.ones(right.shape[1])))


def _acc1(found: Classified) -> Share:
    hits, count = int(found.right.sum()), len(found.classes)
    return Share(hits / count, wilson(hits, count))


def judge(
    model: tuple[str, str], base: LabelledFeatures, natural: Mapping[str, tuple[ClassSubset, LabelledFeatures]],
    synthetic: dict[Shift, Classified], classifier: Tensor,
) -> Judged:  # fmt: skip
    """Return what a model gets right.

    Args:
        model: its name and its weights.
        base: its features of the base.
        natural: for each shifted set the classes that it shares with the base, and the features of its images.
        synthetic: the classes that it gives to the base under each synthetic shift.
        classifier: weights [D, classes of the base].
    """
    on_shifts = {}
    for name, (subset, images) in natural.items():
        members = torch.tensor([label in subset.of_base for label in base.labels])
        shifted = subset.shifted(images, classifier)
        left_out = len(images.labels) - len(shifted.classes)
        on_shifts[name] = OnShift(shifted, subset.base(base, classifier), members, left_out, len(images.left_out))
    return Judged(*model, all_classes(base, classifier), len(base.left_out), on_shifts, synthetic)


def all_classes(images: LabelledFeatures, classifier: Tensor) -> Classified:
    """Return the classes of images, of which there are as many as the classifier has."""
    return classify(images.features.to(classifier.device), images.labels, images.classnames, classifier)


def read_baselines(paths: Iterable[Path], natural: Sequence[str], synthetic: Sequence[Shift]) -> dict[str, list[Point]]:
    """Return the points of all baseline files by shift.

    A point that names no shift is one of the only shifted set, or of the mean of several; without any, of the only
    synthetic shift, or of their mean.

    Raises:
        ValueError: a file cannot be used.
    """
    found: dict[str, list[Point]] = {}
    kinds = list(dict.fromkeys(shift.name for shift in synthetic))
    sets = [*natural, *([AVERAGE] if len(natural) > 1 else [])]
    names = [*sets, *kinds, *([SYNTHETIC] if len(kinds) > 1 else [])]
    for path in paths:
        for name, points in read_points(path, names, (sets or names)[-1]).items():
            found.setdefault(name, []).extend(points)
    return found


def lines_of(points: Mapping[str, Sequence[Point]]) -> dict[str, Line]:
    """Return the line through the baseline models of each shift.

    Raises:
        ValueError: there are too few.
    """
    return {name: fit(some, name) for name, some in points.items()}


def results_of(
    args: argparse.Namespace, models: Sequence[Judged], baseline_models: Sequence[Judged],
    baselines: Mapping[str, Sequence[Point]], sources: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return the results as plain values; at the top those of the first model on the base.

    Args:
        args: of the command.
        models: what is evaluated.
        baseline_models: models of the baseline that were evaluated here.
        baselines: points of other baseline models.
        sources: of the shifted sets.

    Raises:
        ValueError: no line can be fitted to the baseline.
    """
    points: dict[str, list[Point]] = {name: list(some) for name, some in baselines.items()}
    for judged in baseline_models:
        for name, point in judged.points():
            points.setdefault(name, []).append(point)
    first = models[0]
    points = {name: some for name, some in points.items() if name in first.accuracies}
    lines = lines_of(points)
    rows = [_robustness(judged, lines) for judged in models]
    own = [_point_row(name, point, "model") for judged in models for name, point in judged.points()]
    theirs = [_point_row(name, point, "baseline") for name, some in points.items() for point in some]
    sets = [
        _set_row(judged, name, sources[name], row[name])
        for judged, row in zip(models, rows, strict=True)
        for name in judged.natural
    ]
    return result_of(
        _named(first, args.data), TASK, metrics(first.base), intervals=intervals(first.base),
        templates=args.templates, images=len(first.base.classes), skipped_images=first.skipped,
        classes=len(first.base.classnames),
        models=[
            {"model": judged.model, "pretrained": judged.pretrained, "robustness": row}
            for judged, row in zip(models, rows, strict=True)
        ],
        sets=sets,
        synthetic=[_synthetic_row(judged, shift, args.data) for judged in models for shift in judged.synthetic],
        baseline={name: _about(line) for name, line in lines.items()}, points=[*own, *theirs],
    )  # fmt: skip


def _named(judged: Judged, data: str) -> argparse.Namespace:
    return argparse.Namespace(data=data, model=judged.model, pretrained=judged.pretrained)


def _about(line: Line) -> dict[str, Any]:
    return {"slope": line.slope, "intercept": line.intercept, "models": len(line.points)}


def _robustness(judged: Judged, lines: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """Return the accuracies of a model, and how robust it is, for each shifted set and each mean."""
    return {
        name: {
            "base": base.value, "base_interval": base.interval, "shift": shift.value, "shift_interval": shift.interval,
            **figures(base.value, shift.value, lines.get(name)),
        }
        for name, (base, shift) in judged.accuracies.items()
    }  # fmt: skip


def _point_row(name: str, point: Point, role: str) -> dict[str, Any]:
    return {**point._asdict(), "set": name, "role": role}


def _synthetic_row(judged: Judged, shift: Shift, data: str) -> dict[str, Any]:
    found = judged.synthetic[shift]
    return result_of(
        _named(judged, data), TASK, metrics(found), intervals=intervals(found), shift=shift.name,
        strength=shift.strength, amount=shift.amount, seed=shift.seed,
    )  # fmt: skip


def _set_row(judged: Judged, name: str, source: str, robustness: dict[str, Any]) -> dict[str, Any]:
    on = judged.natural[name]
    return result_of(
        _named(judged, source), TASK, metrics(on.shifted), intervals=intervals(on.shifted), shift=name,
        classes=len(on.shifted.classnames), images=len(on.shifted.classes), skipped_images=on.skipped,
        other_classes=on.left_out,
        base={"images": len(on.base.classes), "metrics": metrics(on.base), "intervals": intervals(on.base)},
        robustness=robustness,
    )  # fmt: skip
