"""The suite on each checkpoint of a run, as it appears."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .offline_layout import OfflineSet
from .suite import Settings, evaluate_set, means, problems_of
from .suite_scores import headlines
from .watch import CheckpointModel

NAME = "suite.jsonl"


class SuiteEvaluator:
    """Evaluates checkpoints of one run on sets.

    Args:
        sets: the sets.
        settings: how they are evaluated.
        model: of the checkpoints.
    """

    def __init__(self, sets: Sequence[OfflineSet], settings: Settings, model: CheckpointModel) -> None:
        self.sets, self.settings, self.model = sets, settings, model

    def __call__(self, checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
        """Return the results of a checkpoint on each set, their means, and what went wrong.

        Raises:
            ValueError: the checkpoint cannot be loaded, or a set cannot be read.
        """
        encoder, models = self.model.load(checkpoint, source), [(source.name, "")]
        results, problems = [], []
        for one in self.sets:
            done = evaluate_set(one, [encoder], {task: [0] for task in self.settings.tasks_of(one)}, self.settings)
            problems += problems_of(one, done, models)
            for found in done:
                if found.score is not None:
                    about = {"dataset": f"wds/{one.name}", "model": source.name, "pretrained": "", "task": found.task}
                    results.append({**about, "metrics": found.score.metrics, "intervals": found.score.intervals})
        return {
            "results": results, "means": means(results, models),
            "problems": [problem._asdict() for problem in problems],
        }  # fmt: skip


def chief_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the chief figures of each set, and their means, by name.

    Args:
        found: as :class:`SuiteEvaluator` returns it.
    """
    figures = {f"mean of {mean['metric']}": mean["values"][0] for mean in found["means"] if mean["sets"] > 1}
    for result in found["results"]:
        name = result["dataset"].removeprefix("wds/")
        figures |= {
            f"{name} {metric}": result["metrics"][metric] for metric in headlines(result["task"], result["metrics"])
        }
    return figures


def words(found: Mapping[str, Any]) -> str:
    """Return the chief figures in words."""
    figures = ", ".join(f"{name} {value:.1%}" for name, value in chief_figures(found).items())
    wrong = "".join(f"; left out {problem['name']}: {problem['reason']}" for problem in found["problems"])
    return figures + wrong
