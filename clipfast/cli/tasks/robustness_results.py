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

from ...evaluate.class_subsets import ClassSubset
from ...evaluate.classification import Classified, classify, intervals, metrics
from ...evaluate.effective_robustness import (
    AVERAGE,
    SYNTHETIC,
    Interval,
    Line,
    Point,
    figures,
    fit,
    mean_interval,
    read_points,
)
from ...evaluate.features import LabelledFeatures
from ...evaluate.intervals import bootstrap, percent, shown, wilson
from ...evaluate.results import result_about
from ...evaluate.shifts import Shift
from ...evaluate.suite import label, name_of
from ...io.text import align

TASK = "zeroshot_classification"
HEAD = ("shift", "classes", "base", "shifted", "relative drop", "expected", "effective robustness")
Share = tuple[float, Interval]  # an accuracy and its 95% confidence interval


class OnShift(NamedTuple):
    """A model's predictions on a shifted set, and on the images of the base set whose classes are in both sets.

    Attributes:
        shifted, base: the predictions on the shifted set and on the base set.
        members: bool [images of the base set], True for images of the shared classes.
        left_out: number of images of the shifted set whose class the base set lacks.
        skipped: number of images of the shifted set that cannot be used.
    """

    shifted: Classified
    base: Classified
    members: Tensor
    left_out: int
    skipped: int


@dataclasses.dataclass
class Judged:
    """All predictions of one model in ``clipfast eval robustness``.

    Attributes:
        model, pretrained: name of the model, and its weights if the name does not imply them.
        base: predictions on the base set.
        skipped: number of images of the base set that cannot be used.
        natural: predictions on natural shifts, by the name of the shifted set.
        synthetic: predictions on the base set under synthetic shifts, by shift.
    """

    model: str
    pretrained: str
    base: Classified
    skipped: int
    natural: dict[str, OnShift]
    synthetic: dict[Shift, Classified]

    @functools.cached_property
    def accuracies(self) -> dict[str, tuple[Share, Share]]:
        """The accuracies on the base and under each shift for ``clipfast eval robustness``, by shift or mean."""
        found = {name: (_acc1(on.base), _acc1(on.shifted)) for name, on in self.natural.items()}
        if len(found) > 1:
            found[AVERAGE] = self._average([base for base, _ in found.values()], [shift for _, shift in found.values()])
        base, right = _acc1(self.base), {shift: one.right.double() for shift, one in self.synthetic.items()}
        kinds = list(dict.fromkeys(shift.name for shift in right))
        for kind in (*kinds, *([SYNTHETIC] if len(kinds) > 1 else [])):
            # The accuracy under a synthetic shift is the mean over its strengths; SYNTHETIC is the mean over all
            # shifts. All have the same images, over which the bootstrap resamples.
            rows = torch.stack([row for shift, row in right.items() if kind in (shift.name, SYNTHETIC)])
            found[kind] = base, (rows.mean().item(), bootstrap(rows.mean(0), torch.ones(rows.shape[1])))
        return found

    def _average(self, bases: Sequence[Share], shifts: Sequence[Share]) -> tuple[Share, Share]:
        """Return the mean accuracies over natural shifts for ``clipfast eval robustness``, with their intervals."""
        hits, trials = torch.zeros(2, len(self.base.classes), dtype=torch.double)
        for on in self.natural.values():
            hits[on.members] += on.base.right.double() / len(on.base.classes)
            trials[on.members] += 1 / len(on.base.classes)
        values, ends = [share for share, _ in shifts], [interval for _, interval in shifts]
        base = sum(share for share, _ in bases) / len(bases), bootstrap(hits, trials)
        return base, (sum(values) / len(values), mean_interval(values, ends))

    def points(self) -> list[tuple[str, Point]]:
        """Return each shift with the model's accuracies, as a point in the plot of ``clipfast eval robustness``."""
        name = label(self.model, self.pretrained)
        return [(key, Point(name, base, shift)) for key, ((base, _), (shift, _)) in self.accuracies.items()]


def _acc1(found: Classified) -> Share:
    """Return the top-1 accuracy of predictions for ``clipfast eval robustness``, with its 95% interval."""
    hits, count = int(found.right.sum()), len(found.classes)
    return hits / count, wilson(hits, count)


def judge(
    model: tuple[str, str], base: LabelledFeatures, natural: Mapping[str, tuple[ClassSubset, LabelledFeatures]],
    synthetic: dict[Shift, Classified], classifier: Tensor,
) -> Judged:  # fmt: skip
    """Return all predictions of one model for ``clipfast eval robustness``, computed from its features.

    Args:
        model: name and weights of the model.
        base: the model's features of the base set.
        natural: for each shifted set, the classes that it shares with the base set, and the model's features of it.
        synthetic: the predictions on the base set under each synthetic shift.
        classifier: zero-shot weights [D, classes of the base set].
    """
    on_shifts = {}
    for name, (subset, images) in natural.items():
        members = torch.tensor([label in subset.of_base for label in base.labels])
        shifted = subset.classify(images, subset.of_label, classifier)
        left_out = len(images.labels) - len(shifted.classes)
        own = subset.classify(base, subset.of_base, classifier)
        on_shifts[name] = OnShift(shifted, own, members, left_out, len(images.left_out))
    return Judged(*model, all_classes(base, classifier), len(base.left_out), on_shifts, synthetic)


def all_classes(images: LabelledFeatures, classifier: Tensor) -> Classified:
    """Classify images for ``clipfast eval robustness`` by a classifier with a column for each of their classes."""
    return classify(images.features.to(classifier.device), images.labels, images.classnames, classifier)


def read_baselines(paths: Iterable[Path], natural: Sequence[str], synthetic: Sequence[Shift]) -> dict[str, list[Point]]:
    """Read the accuracies of baseline models from the files of ``--baseline``, by the name of the shift.

    A point without the name of a shift belongs to the only shifted set, or to the mean of several. Without shifted
    sets, it belongs to the only synthetic shift, or to the mean of several.

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
    """Fit the line of baseline models in ``clipfast eval robustness`` for each shift, to their accuracies (``points``).

    Raises:
        ValueError: there are too few baseline models.
    """
    return {name: fit(some, name) for name, some in points.items()}


def results_of(
    args: argparse.Namespace, models: Sequence[Judged], baseline_models: Sequence[Judged],
    baselines: Mapping[str, Sequence[Point]], sources: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return the results of ``clipfast eval robustness`` as plain values, with the first model's at the top level.

    Args:
        args: arguments of the command.
        models: predictions of the models to judge.
        baseline_models: predictions of the baseline models that this command evaluated (``--baseline-model``).
        baselines: by shift, the accuracies of the baseline models in files (``--baseline``).
        sources: sources of the shifted sets.

    Raises:
        ValueError: no line can be fitted to the baseline.
    """
    first, own = models[0], [(*one, "model") for judged in models for one in judged.points()]
    theirs = {name: list(some) for name, some in baselines.items()}
    for judged in baseline_models:
        for name, point in judged.points():
            theirs.setdefault(name, []).append(point)
    known = [name for name, _ in first.points()]
    theirs = {name: some for name, some in theirs.items() if name in known}
    own += [(name, point, "baseline") for name, some in theirs.items() for point in some]
    lines = lines_of(theirs)
    rows = [_robustness(judged, lines) for judged in models]
    return _result(
        first, args.data, first.base, templates=args.templates, images=len(first.base.classes),
        skipped_images=first.skipped, classes=len(first.base.classnames),
        models=[
            {"model": judged.model, "pretrained": judged.pretrained, "robustness": row}
            for judged, row in zip(models, rows, strict=True)
        ],
        sets=[
            _set_row(judged, name, sources[name], row[name])
            for judged, row in zip(models, rows, strict=True)
            for name in judged.natural
        ],
        synthetic=[
            _result(
                judged, args.data, found,
                shift=shift.name, strength=shift.strength, amount=shift.amount, seed=shift.seed,
            )
            for judged in models
            for shift, found in judged.synthetic.items()
        ],
        baseline={
            name: {"slope": line.slope, "intercept": line.intercept, "models": len(line.points)}
            for name, line in lines.items()
        },
        points=[{**point._asdict(), "set": name, "role": role} for name, point, role in own],
    )  # fmt: skip


def _result(judged: Judged, data: str, found: Classified, **more: Any) -> dict[str, Any]:
    """Return a model's metrics on one set in ``clipfast eval robustness``, under CLIP_benchmark's keys."""
    return result_about(
        data, judged.model, judged.pretrained, TASK, metrics(found), intervals=intervals(found), **more
    )  # fmt: skip


def _robustness(judged: Judged, lines: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """Return a model's accuracies and effective robustness for ``clipfast eval robustness``, by shift or mean."""
    rows = {}
    for name, ((base, base_interval), (shift, shift_interval)) in judged.accuracies.items():
        rows[name] = {
            "base": base, "base_interval": base_interval, "shift": shift, "shift_interval": shift_interval,
            **figures(base, shift, lines.get(name)),
        }  # fmt: skip
    return rows


def _set_row(judged: Judged, name: str, source: str, robustness: dict[str, Any]) -> dict[str, Any]:
    """Return the results of ``clipfast eval robustness`` for one model on one shifted set."""
    on = judged.natural[name]
    base = {"images": len(on.base.classes), "metrics": metrics(on.base), "intervals": intervals(on.base)}
    return _result(
        judged, source, on.shifted, shift=name, classes=len(on.shifted.classnames), images=len(on.shifted.classes),
        skipped_images=on.skipped, other_classes=on.left_out, base=base, robustness=robustness,
    )  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """Format the results of ``clipfast eval robustness``: a table of shifts, and one of synthetic strengths."""
    parts = [f"{results['images']:,} images of the base, {results['classes']:,} classes; 95% intervals in brackets"]
    classes = {(name_of(row), row["shift"]): f"{row['classes']:,}" for row in results["sets"]}
    for model in results["models"]:
        name, rows = name_of(model), [list(HEAD)]
        for shift, found in model["robustness"].items():
            base, shifted = (percent(found[key], found[f"{key}_interval"]) for key in ("base", "shift"))
            row = [shift, classes.get((name, shift), ""), base, shifted]
            for key, form in (("relative_drop", ".1%"), ("expected", ".1%"), ("effective", "+.1%")):
                row.append(shown(found[key], form))
            rows.append(row)
        parts.append(f"{name}\n{align(rows, right=(1, 4, 5, 6))}")
        strengths: dict[str, list[str]] = {}
        for one in results["synthetic"]:
            if name_of(one) == name:
                strengths.setdefault(one["shift"], [one["shift"]]).append(f"{one['metrics']['acc1']:.1%}")
        if strengths:
            parts.append(align([["strength", *"12345"], *strengths.values()], right=range(1, 6)))
    return "\n\n".join(parts)
