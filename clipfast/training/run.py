"""The folder of a run: metrics, checkpoints, and the list of samples that could not be used."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint import write_checkpoint
from ..files import replace_text


class RunFolder:
    """``runs/<name>/`` and the names in it.

    Attributes:
        checkpoints: the folder of the checkpoints.
        latest: the checkpoint that ``--resume`` continues from.
        metrics_path: a file with one JSON object per line: training figures by step, evaluations by step.
        skipped_path: the list of samples that could not be used: step, name and reason, tab-separated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.latest = self.checkpoints / "epoch_latest.pt"
        self.metrics_path, self.skipped_path = path / "metrics.jsonl", path / "skipped.tsv"

    def refuse_other_run(self, *, resuming: bool) -> None:
        """Refuse a folder that holds another run.

        Raises:
            ValueError: it holds a run, and this run does not resume it.
        """
        if self.latest.exists() and not resuming:
            raise ValueError(
                f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --name"
            )

    def create(self, *, after_step: int | None) -> None:
        """Make the folder. Records of an earlier session are kept up to ``after_step``, and removed if it is None."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self.metrics() if after_step is not None and line["step"] <= after_step]
        replace_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        lines = self.skipped_path.read_text().splitlines(keepends=True) if self.skipped_path.exists() else []
        kept_lines = [line for line in lines if after_step is not None and int(line.split("\t")[0]) <= after_step]
        replace_text(self.skipped_path, "".join(kept_lines))

    def save(self, checkpoint: dict[str, Any], *, keep: bool) -> Path:
        """Write ``epoch_latest.pt``, and with ``keep`` also ``epoch_N.pt``; returns the path of the first."""
        if keep:
            write_checkpoint(self.checkpoints / f"epoch_{checkpoint['epoch']}.pt", checkpoint)
        write_checkpoint(self.latest, checkpoint)
        return self.latest

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Replace the file ``name`` of the folder by ``content`` as JSON."""
        replace_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def record(self, **values: Any) -> None:
        """Append a line of metrics."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics that are complete: a kill can cut the last one short."""
        metrics = []
        for line in self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                metrics.append(json.loads(line))
        return metrics

    def record_skipped(self, step: int, skipped: Iterable[tuple[str, str]]) -> None:
        """Append samples that could not be used, each as name and reason."""
        with self.skipped_path.open("a") as file:
            file.writelines(f"{step}\t{name}\t{' '.join(reason.split())}\n" for name, reason in skipped)
