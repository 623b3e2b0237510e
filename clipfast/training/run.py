"""The folder of a run: log, metrics, checkpoints, and what became of the samples that could not be used."""

import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger("clipfast")
LATEST = "epoch_latest.pt"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """``runs/<name>/`` and the names in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The checkpoint that ``--resume`` goes on from."""
        return self.checkpoints / LATEST

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line: training figures by step, evaluations by step."""
        return self.path / "metrics.jsonl"

    @property
    def skipped_path(self) -> Path:
        """Samples that could not be used: step, name and reason, tab-separated."""
        return self.path / "skipped.tsv"

    def refuse_other_run(self, *, resuming: bool) -> None:
        """Refuse a folder that another run lives in.

        Raises:
            ValueError: it holds a run, and this is not its resumption.
        """
        if self.latest.exists() and not resuming:
            raise ValueError(
                f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --name"
            )

    def create(self, *, after_step: int | None) -> None:
        """Make the folder; of what was recorded before, keep what belongs to the steps up to ``after_step``."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self.metrics() if after_step is not None and line["step"] <= after_step]
        self.write_text(self.metrics_path.name, "".join(json.dumps(line) + "\n" for line in kept))
        lines = self.skipped_path.read_text().splitlines(keepends=True) if self.skipped_path.exists() else []
        kept_lines = [line for line in lines if after_step is not None and int(line.split("\t")[0]) <= after_step]
        self.write_text(self.skipped_path.name, "".join(kept_lines))

    def record(self, **values: Any) -> None:
        """Append a line of metrics."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics that is whole: a kill can cut the last one."""
        if not self.metrics_path.exists():
            return []
        return list(_whole_lines(self.metrics_path.read_text().splitlines()))

    def record_skipped(self, step: int, skipped: Iterable[tuple[str, str]]) -> None:
        """Append samples that could not be used, with the reason."""
        with self.skipped_path.open("a") as file:
            file.writelines(f"{step}\t{name}\t{' '.join(reason.split())}\n" for name, reason in skipped)

    def write_text(self, name: str, text: str) -> None:
        """Replace a file of the folder as a whole."""
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)


def _whole_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log to the console and to ``out.log``, in OpenCLIP's format."""
    formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(folder / "out.log")]
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the step can finish and be saved; a second one stops at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        log.info("Stopping after this step; once more to stop at once, without saving.")


class Meter:
    """Time spent waiting for data, and in all, since it was last read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self._start = time.perf_counter()
        self._waiting = 0.0
        self._steps = 0
        self._pairs = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - start

    def step(self, pairs: int) -> None:
        """Count a finished step."""
        self._steps += 1
        self._pairs += pairs

    def read(self) -> dict[str, float]:
        """Seconds per step, of which waiting, share of waiting, and pairs per second."""
        elapsed = time.perf_counter() - self._start
        steps = max(1, self._steps)
        return {
            "batch_time": elapsed / steps,
            "data_time": self._waiting / steps,
            "data_wait": self._waiting / elapsed,
            "pairs_per_second": self._pairs / elapsed,
        }
