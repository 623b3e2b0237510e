"""The folder of a run: metrics, checkpoints, and the list of skipped samples."""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.of_run import Checkpoints
from ..data import Skipped
from ..io.files import replace_text
from ..io.text import printable
from .lock import Lock

log = logging.getLogger("clipfast")


class RunFolder:
    """The folder of a training run, ``runs/<name>/``, and the files in it.

    Attributes:
        checkpoints: the folder of the checkpoints.
        latest: the checkpoint that ``--resume`` continues from.
        metrics_path: a file with one JSON object per line: training metrics, evaluations and warnings by step.
        skipped_path: the list of samples that could not be used: step, name, kind and reason, tab-separated.
        nonfinite_path: a file with one JSON object for each step whose loss or gradient was not finite.
        lock: the lock of the process that writes to the folder; None in processes that only read.
    """

    lock: Lock | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.latest = Checkpoints(self.checkpoints).latest
        self.metrics_path, self.skipped_path = path / "metrics.jsonl", path / "skipped.tsv"
        self.nonfinite_path = path / "nonfinite.jsonl"

    def refuse_other_run(self, *, resuming: bool) -> None:
        """Check that training would not write into the folder of another run.

        Raises:
            ValueError: the folder holds a run, and this run does not resume it.
        """
        if self.kept() and not resuming:
            raise ValueError(
                f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --name"
            )

    def is_held(self) -> bool:
        """Return False if the run's folder was removed or renamed; a folder of that name may belong to another run."""
        return self.lock is None or self.lock.is_held()

    def hold(self) -> bool:
        """Make the run's folder again if it was removed or renamed, and return True in that case.

        Raises:
            FolderLostError: another run has a folder of that name now.
        """
        is_new = self.lock is not None and self.lock.hold()
        if is_new:
            self.checkpoints.mkdir(exist_ok=True)
        return is_new

    def create(self, *, after_step: int | None) -> None:
        """Make the run's folder. Records up to step ``after_step`` are kept; with None, all records are removed.

        Skipped samples of step 0, which are those lost in damaged shards, are removed too, since every start of the run
        records them again.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        last = -1 if after_step is None else after_step
        for path in (self.metrics_path, self.nonfinite_path):
            kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= last]
            if kept or path.exists() or path == self.metrics_path:
                replace_text(path, "".join(kept))
        kept = [line for line in self.skipped() if 0 < int(line.split("\t")[0]) <= last]
        replace_text(self.skipped_path, "".join(kept))

    def kept(self) -> list[Path]:
        """Return the paths of the checkpoints in the run's folder, the newest first."""
        return Checkpoints(self.checkpoints).kept()

    def record_options(self, options: dict[str, Any], changed: dict[str, Any], step: int | None) -> None:
        """Write ``config.json``: the options that the run began with, and each later change with its step.

        Args:
            options: the options with which the run began, from the checkpoint if the run is resumed.
            changed: the options that differ from ``options`` from now on.
            step: the number of finished steps of a resumed run; None for a new run.

        Raises:
            ValueError: the file is there already, and is no JSON.
        """
        path = self.path / "config.json"
        if step is None:
            self.write_json(path.name, options)
            return
        try:
            recorded = json.loads(path.read_text("utf-8")) if path.exists() else dict(options)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it; the checkpoint has the options too") from error
        changes = [change for change in recorded.pop("changes", []) if change["after_step"] < step]
        if changed:
            changes.append({"after_step": step, **changed})
        self.write_json(path.name, recorded | ({"changes": changes} if changes else {}))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write ``content`` as JSON to the file ``name`` of the run's folder."""
        replace_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def record(self, **values: Any) -> None:
        """Append a line to a run's ``metrics.jsonl``."""
        self._append(self.metrics_path, json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the complete lines of ``metrics.jsonl``; the last line may be cut short if the run was killed."""
        return read_lines(self.metrics_path)

    def record_nonfinite(self, values: dict[str, Any]) -> None:
        """Append a line to a run's ``nonfinite.jsonl`` on a training step whose loss or gradient was not finite."""
        self._append(self.nonfinite_path, json.dumps(values) + "\n")

    def record_skipped(self, step: int, skipped: Iterable[Skipped]) -> None:
        """Append samples that could not be used in ``step`` to a run's ``skipped.tsv``."""
        lines = (f"{step}\t{_in_line(name)}\t{kind}\t{_in_line(reason)}\n" for name, kind, reason in skipped)
        self._append(self.skipped_path, "".join(lines))

    def _append(self, path: Path, text: str) -> None:
        """Append text to a file of the run's folder, unless the folder was removed or renamed."""
        if self.is_held():
            append(path, text)

    def skipped(self) -> list[str]:
        """Return the complete lines of a run's ``skipped.tsv``."""
        text = self.skipped_path.read_text("utf-8", "replace") if self.skipped_path.exists() else ""
        lines = text.splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and line.split("\t")[0].isdecimal()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records in a run's file of JSON lines, without incomplete lines; [] if there is no file."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def append(path: Path, text: str) -> None:
    """Append text to a file of a run's records. An error is only logged, so that training goes on."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        log.error(f"{path} cannot be written: {error.strerror}")


def by_step(everyones: Iterable[list[tuple[int, Skipped]]]) -> Iterator[tuple[int, list[Skipped]]]:
    """Merge the skipped samples of all ranks, given as (step, sample), and yield each step with its samples."""
    rows = sorted(itertools.chain(*everyones), key=lambda row: row[0])
    for step, group in itertools.groupby(rows, key=lambda row: row[0]):
        yield step, [sample for _, sample in group]


def _in_line(text: str) -> str:
    """Return a text without tabs and line breaks, for a cell of a run's ``skipped.tsv``."""
    return printable(" ".join(text.split()))
