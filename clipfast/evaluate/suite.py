"""``clipfast eval suite``: evaluate several models on the sets of CLIP_benchmark's offline layout.

Each result is kept in a file, and is computed again only if the model, the data or the settings have changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..distributed.world import ALONE, World
from ..io.files import replace_text
from .encoder import Encoder
from .features import LabelledFeatures, encode_set
from .offline_layout import MULTILABEL, RETRIEVAL, OfflineSet, Problem, about
from .results import report_left_out, result_about
from .store import FeatureStore
from .suite_scores import (
    PROBING,
    RETRIEVING,
    ZERO_SHOT,
    Score,
    headlines,
    probe_score,
    retrieval_score,
    zero_shot_score,
)
from .watch import CheckpointModel

VERSION = 1  # the version of the metrics' definitions; results of another version are computed again


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a suite's evaluations.

    Attributes:
        split: the split on which models are evaluated.
        ks: the values of k for retrieval recall at k.
        probe: also train a linear probe where there is a training split.
        solver, seed: the solver and the seed of the probe.
        batch_size, workers: as :func:`~clipfast.evaluate.features.encode_set` takes them.
    """

    split: str = "test"
    ks: tuple[int, ...] = (5,)
    probe: bool = False
    solver: str = "torch"
    seed: int = 0
    batch_size: int = 256
    workers: int = 0

    def tasks_of(self, one: OfflineSet) -> list[str]:
        """Return the tasks on which a set is evaluated: zero-shot or retrieval, and a linear probe if possible."""
        if one.kind == RETRIEVAL:
            return [RETRIEVING]
        is_probed = self.probe and one.kind != MULTILABEL and "train" in one.shards and self.split != "train"
        return [ZERO_SHOT, PROBING] if is_probed else [ZERO_SHOT]

    def of_task(self, task: str) -> dict[str, Any]:
        """Return those of the suite's settings on which results of a task depend, as plain values."""
        probe = {"solver": self.solver, "seed": self.seed}
        more: dict[str, dict[str, Any]] = {RETRIEVING: {"k": sorted(set(self.ks))}, PROBING: probe}
        return {"split": self.split, **more.get(task, {})}


class Done(NamedTuple):
    """The result of one model on one task of a set in the suite: metrics, or the reason why there are none.

    Attributes:
        task: the name of the task.
        model: the index of the model.
        images, skipped: the number of images that were used, and of those that had to be left out.
        score: the metrics, or None.
        reason: the reason for missing metrics, or None.
    """

    task: str
    model: int
    images: int
    skipped: int
    score: Score | None
    reason: str | None = None


def evaluate_set(
    one: OfflineSet, encoders: Sequence[Encoder], wanted: dict[str, list[int]], settings: Settings,
    store: FeatureStore | None = None, world: World = ALONE,
) -> list[Done]:  # fmt: skip
    """Evaluate models on one set; rank 0 gets the results. Every image is decoded once for all models and tasks.

    All ranks must call this function.

    Args:
        one: the set.
        encoders: the models.
        wanted: for each task the indices of the models to evaluate.
        settings: the settings of the evaluation.
        store: the feature store, or None.
        world: the ranks.

    Raises:
        ValueError: the set cannot be read.
    """
    everybody = sorted({number for numbers in wanted.values() for number in numbers})
    probed = wanted.get(PROBING, [])
    users = {settings.split: everybody, **{name: probed for name in _fitted_on(one, settings) if probed}}
    found: dict[str, dict[int, LabelledFeatures]] = {}
    for split, numbers in users.items():
        features = encode_set(
            [encoders[number] for number in numbers], one.images(split), batch_size=settings.batch_size,
            workers=settings.workers, store=store, world=world,
        )  # fmt: skip
        if features:
            report_left_out(features[0].left_out.values())
        found[split] = dict(zip(numbers, features, strict=False))
    texts: dict[tuple[str, int], Tensor] = {}
    for number in wanted.get(ZERO_SHOT, []):
        texts[ZERO_SHOT, number] = encoders[number].classifier(one.classnames, one.templates, store, world)
    for number in wanted.get(RETRIEVING, []):
        images = found[settings.split].get(number, LabelledFeatures.empty())
        captions = [text for some in images.captions for text in some]
        texts[RETRIEVING, number] = encoders[number].texts(captions, store, world)
    done = []
    for task, numbers in wanted.items() if world.is_main else ():
        for number in numbers:
            mine = {split: features[number] for split, features in found.items() if number in features}
            images, score, reason = mine[settings.split], None, None
            try:
                if task == PROBING:
                    device = encoders[number].device
                    score = probe_score(one, mine, settings.solver, device, settings.seed, settings.split)
                elif task == RETRIEVING:
                    score = retrieval_score(images, texts[task, number], settings.ks)
                else:
                    score = zero_shot_score(one, images, texts[task, number])
            except ValueError as error:
                reason = str(error)
            done.append(Done(task, number, len(images.labels), len(images.left_out), score, reason))
    return done


def _fitted_on(one: OfflineSet, settings: Settings) -> list[str]:
    """Return the splits ("train", "val") of a set on which a linear probe is trained and validated."""
    return [name for name in ("train", "val") if name in one.shards and name != settings.split]


@dataclasses.dataclass
class ResultFolder:
    """The folder of a suite's results: a file for each model and set, with the names and keys of CLIP_benchmark.

    Attributes:
        folder: the folder, which must exist.
        models: the name and the weights of each model, as the user gave them.
        encoders: the models.
        settings: the settings of the evaluation.
    """

    folder: Path
    models: Sequence[tuple[str, str]]
    encoders: Sequence[Encoder]
    settings: Settings

    def path(self, one: OfflineSet, task: str, model: int) -> Path:
        """Return the path of the file with the suite's result of a model on a task of a set."""
        return self.folder / file_name(one.name, *self.models[model], task)

    def wanted(self, one: OfflineSet) -> dict[str, list[int]]:
        """Return, by task, the indices of the models whose result on a set is missing or out of date.

        Raises:
            ValueError: a result is missing, and the set cannot be read, or none of its first images can be used.
        """
        settings, models, tasks = self.settings, range(len(self.models)), self.settings.tasks_of(one)
        lacking = {task: [number for number in models if self.read(one, task, number) is None] for task in tasks}
        found = {task: numbers for task, numbers in lacking.items() if numbers}
        for split in (settings.split, *(_fitted_on(one, settings) if PROBING in found else ())) if found else ():
            one.images(split).check()
        return found

    def read(self, one: OfflineSet, task: str, model: int) -> dict[str, Any] | None:
        """Read the suite's result of a model on a task; None if missing, or of other data, weights or settings."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path(one, task, model).read_text("utf-8"))
            if isinstance(found, dict) and found.get("made_of") == self.made_of(one, task, model):
                return found
        return None

    def write(self, one: OfflineSet, done: Done, score: Score) -> None:
        """Write the suite's result of a model on a task of a set, with the ``score`` of ``done``.

        Raises:
            DiskFullError: there is no space.
        """
        model, pretrained = self.models[done.model]
        result = result_about(
            f"wds/{one.name}", model, pretrained, done.task, score.metrics, intervals=score.intervals,
            images=done.images, skipped_images=done.skipped, **score.more,
            made_of=self.made_of(one, done.task, done.model),
        )  # fmt: skip
        replace_text(self.path(one, done.task, done.model), json.dumps(result, indent=2) + "\n")

    def made_of(self, one: OfflineSet, task: str, model: int) -> dict[str, Any]:
        """Return checksums of model and data, and the settings, on which a suite's result depends, as plain values."""
        return {"version": VERSION, "model": self.encoders[model].digest, **made_of(one, task, self.settings)}


def made_of(one: OfflineSet, task: str, settings: Settings) -> dict[str, Any]:
    """Return checksums of the data, and the settings, on which the results of all models on a task depend."""
    splits = [settings.split, *(_fitted_on(one, settings) if task == PROBING else ())]
    stamps = [one.images(split).stamp() for split in splits]
    return {"data": digest(stamps), "classes": digest(about(one)), "settings": settings.of_task(task)}


def file_name(name: str, model: str, pretrained: str, task: str) -> str:
    """Return the name that CLIP_benchmark gives to a file of results; each "/" becomes "_"."""
    weights = Path(pretrained).name if Path(pretrained).is_file() else pretrained
    return "_".join(part.replace("/", "_") for part in (name, weights, model, "en", task)) + ".json"


def digest(value: Any) -> str:
    """Return the SHA-256 of plain values, by which a suite's results are compared with its data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def means(results: Sequence[dict[str, Any]], models: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the mean of each main metric over the sets on which every model has it, with a value for each model.

    Args:
        results: the results of all models.
        models: the name and the weights of each model.
    """
    rows = []
    chief = [(found["task"], name) for found in results for name in headlines(found["task"], found["metrics"])]
    for task, metric in dict.fromkeys(chief):
        by_set: dict[str, dict[tuple[str, str], float]] = {}
        for result in results:
            if result["task"] == task and metric in result["metrics"]:
                values = by_set.setdefault(result["dataset"], {})
                values[result["model"], result["pretrained"]] = result["metrics"][metric]
        shared = [values for values in by_set.values() if len(values) == len(models)]
        if shared:
            averages = [statistics.fmean(values[model] for values in shared) for model in models]
            rows.append({"task": task, "metric": metric, "sets": len(shared), "values": averages})
    return rows


def problems_of(one: OfflineSet, done: Sequence[Done], models: Sequence[tuple[str, str]]) -> list[Problem]:
    """Return a message for each task and model that could not be evaluated on a set."""
    return [
        Problem(one.name, f"{found.task} by {label(*models[found.model])}: {found.reason}")
        for found in done
        if found.score is None
    ]


def label(model: str, pretrained: str) -> str:
    """Return the name of a model and its weights for tables; a path of weights appears without its folder."""
    return f"{model} {Path(pretrained).name}".strip()


def name_of(row: Mapping[str, Any]) -> str:
    """Return the name of the evaluated model in a row of results, for tables and plots."""
    return label(row["model"], row["pretrained"])


@dataclasses.dataclass
class SuiteEvaluator:
    """Evaluates checkpoints of one run on the sets of a suite (``clipfast eval suite --watch``).

    Attributes:
        sets: the sets.
        settings: the settings of the evaluation.
        model: the model of the checkpoints.
    """

    sets: Sequence[OfflineSet]
    settings: Settings
    model: CheckpointModel

    def __call__(self, checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
        """Evaluate a checkpoint on each set; return the results, their means, and the messages about problems.

        Raises:
            ValueError: the checkpoint cannot be loaded, or a set cannot be read.
        """
        encoder, models = self.model.load(checkpoint, source), [(source.name, "")]
        results, problems = [], []
        for one in self.sets:
            done = evaluate_set(one, [encoder], {task: [0] for task in self.settings.tasks_of(one)}, self.settings)
            problems += problems_of(one, done, models)
            for task, *_, score, _ in done:
                if score is not None:
                    about = {"dataset": f"wds/{one.name}", "model": source.name, "pretrained": "", "task": task}
                    results.append({**about, "metrics": score.metrics, "intervals": score.intervals})
        wrong = [problem._asdict() for problem in problems]
        return {"results": results, "means": means(results, models), "problems": wrong}


def chief_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the main metrics of each set and their means by name, from the result of :class:`SuiteEvaluator`."""
    figures = {f"mean of {mean['metric']}": mean["values"][0] for mean in found["means"] if mean["sets"] > 1}
    for result in found["results"]:
        name = result["dataset"].removeprefix("wds/")
        for metric in headlines(result["task"], result["metrics"]):
            figures[f"{name} {metric}"] = result["metrics"][metric]
    return figures


def words(found: Mapping[str, Any]) -> str:
    """Format the results of :class:`SuiteEvaluator` as one line: its main metrics, and problems."""
    figures = ", ".join(f"{name} {value:.1%}" for name, value in chief_figures(found).items())
    wrong = "".join(f"; left out {problem['name']}: {problem['reason']}" for problem in found["problems"])
    return figures + wrong
