"""The folder of a run: metrics, checkpoints, and the list of samples that could not be used."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import write_checkpoint
from ..files import replace_text


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """``runs/<name>/`` and the names in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The checkpoint that ``--resume`` continues from."""
        return self.checkpoints / "epoch_latest.pt"

    @property
    def metrics_path(self) -> Path:
        """A file with one JSON object per line: training figures by step, evaluations by step."""
        return self.path / "metrics.jsonl"

    @property
    def skipped_path(self) -> Path:
        """The list of samples that could not be used: step, name and reason, tab-separated."""
        return self.path / "skipped.tsv"

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
        if not self.metrics_path.exists():
            return []
        return list(_complete_lines(self.metrics_path.read_text().splitlines()))

    def record_skipped(self, step: int, skipped: Iterable[tuple[str, str]]) -> None:
        """Append samples that could not be used, each as name and reason."""
        with self.skipped_path.open("a") as file:
            file.writelines(f"{step}\t{name}\t{' '.join(reason.split())}\n" for name, reason in skipped)


def _complete_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
