"""The results of evaluations under CLIP_benchmark's keys, and reports of the images that were left out."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..io.text import printable

DEFAULT_TEMPLATES = "plain"  # the default prompt templates of all commands and of the app


def report_left_out(skipped: Iterable[object], command: str = "eval", most: int = 20) -> None:
    """Print the images that an evaluation had to leave out to stderr, at most ``most`` of them."""
    listed = list(skipped)
    for one in listed[:most]:
        print(f"clipfast {command}: left out {printable(str(one))}", file=sys.stderr)
    if len(listed) > most:
        print(f"clipfast {command}: left out {len(listed) - most} more", file=sys.stderr)


def result_about(
    dataset: str, model: str, pretrained: str | None, task: str, metrics: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the results of an evaluation under the keys of CLIP_benchmark.

    Args:
        dataset, model, pretrained: the names of the data, the model and the weights.
        task: CLIP_benchmark's name of the task, such as "zeroshot_classification".
        metrics: the metrics by name.
        **more: further keys.
    """
    about = {"dataset": dataset, "model": model, "pretrained": pretrained or "", "task": task}
    return {**about, "metrics": dict(metrics), "language": "en", **more}
