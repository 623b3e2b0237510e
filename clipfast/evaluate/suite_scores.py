"""Metrics of a model on one set of the suite, computed from features, under CLIP_benchmark's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .classification import classify, intervals, metrics
from .features import LabelledFeatures
from .intervals import bootstrap
from .offline_layout import MULTILABEL, OfflineSet
from .probe_fit import fit_probe, samples_of
from .retrieval import caption_recalls

ZERO_SHOT, RETRIEVING, PROBING = "zeroshot_classification", "zeroshot_retrieval", "linear_probe"


class Score(NamedTuple):
    """The metrics of a model on one task of a set.

    Attributes:
        metrics: the metrics by CLIP_benchmark's names.
        intervals: the 95% interval of each metric.
        more: further values for the file of results, such as the number of classes.
    """

    metrics: dict[str, Any]
    intervals: dict[str, Any]
    more: dict[str, Any]


def headlines(task: str, metrics: dict[str, Any]) -> list[str]:
    """Return the names of the main metrics of an evaluation task, for tables and means."""
    if task == RETRIEVING:
        return sorted(metrics, key=lambda name: (int(name.rpartition("@")[2]), name))
    return ["lp_acc1"] if task == PROBING else [next(iter(metrics))]


def zero_shot_score(one: OfflineSet, found: LabelledFeatures, classifier: Tensor) -> Score:
    """Return zero-shot acc1, acc5 and mean_per_class_recall, or mean_average_precision for a multi-label set.

    Raises:
        ValueError: the labels do not fit the class names, or a feature is not finite.
    """
    more = {"classes": len(one.classnames)}
    features = found.features.to(classifier.device)
    if one.kind == MULTILABEL:
        precision = average_precision(features, _rows(one, found), classifier)
        interval = bootstrap(precision, torch.ones_like(precision))
        name = "mean_average_precision"
        return Score({name: precision.mean().item()}, {name: interval}, more)
    check_classes(one, found)
    numbers = [str(number) for number in range(len(one.classnames))]
    classified = classify(features, found.labels, numbers, classifier)
    return Score(metrics(classified), intervals(classified), more)


def check_classes(one: OfflineSet, found: LabelledFeatures) -> None:
    """Raise ValueError if an image of a CLIP_benchmark set has a class number without a class name."""
    last = max(map(int, found.labels))
    if last >= len(one.classnames):
        name = found.numbers[next(place for place, label in enumerate(found.labels) if int(label) == last)]
        raise ValueError(
            f"classnames.txt has {len(one.classnames)} names, but the class of image {name} is {last} (counted from 0)"
        )


def _rows(one: OfflineSet, found: LabelledFeatures) -> Tensor:
    """Return the labels of a multi-label set, bool [N, classes].

    Raises:
        ValueError: the length of a row differs from the number of classes.
    """
    for number, row in zip(found.numbers, found.labels, strict=True):
        if len(row) != len(one.classnames):
            raise ValueError(
                f"classnames.txt has {len(one.classnames)} names, but image {number} has {len(row)} labels"
            )
    return torch.tensor([[digit == "1" for digit in row] for row in found.labels])


def average_precision(features: Tensor, rows: Tensor, classifier: Tensor) -> Tensor:
    """Return the average precision of each class, float64 [classes], for a multi-label set.

    It is the mean, over the images of the class, of the precision among all images that score at least as high. A class
    without images gets 0, as in CLIP_benchmark.

    Args:
        features: the features of the images [N, D].
        rows: the right classes of each image, bool [N, classes].
        classifier: the classifier's weights [D, classes].

    Raises:
        ValueError: a score is not finite.
    """
    scores = (features @ classifier).cpu()
    if not scores.isfinite().all():
        raise ValueError("zero-shot classification: features contain NaN or infinity")
    right = rows.gather(0, scores.argsort(0, descending=True)).double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)[:, None]
    found: Tensor = (precision * right).sum(0) / right.sum(0).clamp(min=1)
    return found


def retrieval_score(found: LabelledFeatures, texts: Tensor, ks: Sequence[int]) -> Score:
    """Return recall@k of text-to-image and image-to-text retrieval on a set.

    Raises:
        ValueError: a feature is not finite.
    """
    counts = [len(captions) for captions in found.captions]
    return Score(*caption_recalls(found.features.to(texts.device), texts, counts, ks), {"captions": sum(counts)})


def probe_score(
    one: OfflineSet, found: dict[str, LabelledFeatures], solver: str, device: Any, seed: int, test: str
) -> Score:
    """Train a linear probe on a set; return lp_acc1, lp_acc5 and lp_mean_per_class_recall, and the chosen C.

    Args:
        one: the set.
        found: the features by split; "val" chooses C, or without it a part of "train".
        solver, device: as :func:`~clipfast.evaluate.probe_fit.make_solver` takes them.
        seed: the seed of random draws.
        test: the split on which the probe is evaluated.

    Raises:
        ValueError: the classes of the splits differ, or a feature is not finite.
    """
    for images in found.values():
        check_classes(one, images)
    labels = found["train"].classnames
    if len(labels) < 2:
        raise ValueError("linear probe: the training images have one class only")
    samples = {name: samples_of(images, labels, f"split {name!r}") for name, images in found.items()}
    probe, train, classifier, choice = fit_probe(samples, labels, solver, device, seed)
    classified = classifier.classify(samples[test], labels)
    held_out = 0 if probe.validation is None else len(probe.validation.classes)
    figures = {f"lp_{name}": value for name, value in metrics(classified).items()}
    settings = {"C": choice.C, "seed": seed, "fewshot_k": -1, "normalized": True}
    counts = {"train_images": len(train.classes), "validation_images": held_out}
    more = {"classes": len(labels), **counts, "solver": solver, "converged": classifier.converged}
    return Score({**figures, **settings}, {f"lp_{name}": value for name, value in intervals(classified).items()}, more)
