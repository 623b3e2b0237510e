"""What results of evaluations are called, and which images were left out of them."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..io.text import printable

DEFAULT_TEMPLATES = "plain"  # of all commands, and of the app


def report_left_out(skipped: Iterable[object], command: str = "eval", most: int = 20) -> None:
    """Name what cannot be used on stderr."""
    listed = list(skipped)
    for one in listed[:most]:
        print(f"clipfast {command}: left out {printable(str(one))}", file=sys.stderr)
    if len(listed) > most:
        print(f"clipfast {command}: left out {len(listed) - most} more", file=sys.stderr)


def result_about(
    dataset: str, model: str, pretrained: str | None, task: str, metrics: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return results under the keys of CLIP_benchmark.

    Args:
        dataset, model, pretrained: their names.
        task: as CLIP_benchmark names it, such as "zeroshot_classification".
        metrics: the figures.
        **more: further keys.
    """
    about = {"dataset": dataset, "model": model, "pretrained": pretrained or "", "task": task}
    return {**about, "metrics": dict(metrics), "language": "en", **more}
