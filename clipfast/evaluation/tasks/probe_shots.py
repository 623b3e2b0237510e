"""Few-shot curves: linear probes of a few images per class, drawn several times (Radford et al. 2021, figure 6)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..classification import metrics
from .probe_fit import Probe, members_of_classes
from .probe_solver import Samples


def draw(train: Samples, shots: int, seed: int) -> Samples:
    """Return ``shots`` images of each class, or all that it has; a draw of more shots holds those of fewer."""
    return train.take(torch.cat([members[:shots] for members in members_of_classes(train, seed)]))


def lacking(train: Samples, classnames: Sequence[str], shots: int) -> str | None:
    """Return in words which classes have fewer images than ``shots``; None if all have as many."""
    counts = torch.bincount(train.classes).tolist()
    fewer = [f"{name} ({count})" for name, count in zip(classnames, counts, strict=True) if count < shots]
    if not fewer:
        return None
    named = ", ".join(fewer[:5]) + (", ..." if len(fewer) > 5 else "")
    return f"{shots} shots: all that they have is used of {len(fewer)} classes with fewer training images: {named}"


def curve(
    probe: Probe, train: Samples, test: Samples, shots: Sequence[int], seeds: Sequence[int],
    progress: Callable[[list[tuple[int, int]]], Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return mean and standard deviation of the figures for each number of shots, and those of each draw.

    Args:
        probe: fits the classifiers.
        train: what images are drawn from.
        test: what the classifiers are judged on.
        shots: numbers of images per class.
        seeds: of the draws.
        progress: wraps what is iterated over.
    """
    draws: dict[int, list[dict[str, Any]]] = {count: [] for count in shots}
    for count, seed in progress([(count, seed) for count in shots for seed in seeds]):
        drawn = draw(train, count, seed)
        classifier, choice = probe.fit(drawn)
        figures = metrics(classifier.classify(test, probe.classnames))
        draws[count].append(
            {"seed": seed, "images": len(drawn.classes), "C": choice.C, "converged": classifier.converged, **figures}
        )
    return [{"fewshot_k": count, **_summary(found), "draws": found} for count, found in draws.items()]


def _summary(draws: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {}
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        values = [found[name] for found in draws if found[name] is not None]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": deviation} if values else None
    return summary
