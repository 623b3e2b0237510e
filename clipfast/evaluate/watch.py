"""``clipfast eval ... --watch``: evaluate the checkpoints of a run as training writes them, in another process."""

import dataclasses
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.checkpoint import CheckpointError, load_weights, own_config, read_checkpoint
from ..checkpoints.preprocessing import own_preprocessing
from ..checkpoints.sharded import MANIFEST, read_parts
from ..factory import set_preprocessing, tokenizer_for, transform_of
from ..models import CLIPConfig, build
from ..runs.folder import RunFolder, append, read_lines
from ..runs.metrics import NO_TENSORBOARD, TensorBoard, evaluation_metrics
from ..runs.status import FINISHED, WANTED, metrics_text, read_status
from .encoder import Encoder
from .evaluate import evaluate
from .features import encode_set
from .labelled import LabelledSet
from .zero_shot import Template

log = logging.getLogger("clipfast")
NAME = "evaluations.jsonl"
INTERVAL = 30  # default number of seconds between two checks of a run's folder for new checkpoints


@dataclasses.dataclass
class CheckpointModel:
    """Builds the model of a run's checkpoints once, and loads the weights of one checkpoint after the other into it.

    Attributes:
        device, backend: the device, and the implementation of the ops.
        tokenizer_file: the tokenizer's file, for a SigLIP model.
    """

    device: str = "cpu"
    backend: str = "auto"
    tokenizer_file: str | None = None
    _encoder: Encoder | None = None
    _config: CLIPConfig | None = None

    def load(self, checkpoint: dict[str, Any], source: Path) -> Encoder:
        """Load a watched run's checkpoint into the model, and return it as an encoder with these weights.

        The next call replaces the weights of the same model.

        Raises:
            ValueError: the checkpoint does not tell its model, or cannot be loaded.
        """
        config = own_config(checkpoint, source)
        if config is None:
            raise CheckpointError(
                f"{source} does not say which model it is of: evaluate it by --model NAME --pretrained {source}"
            )
        if self._encoder is None or config != self._config:
            with torch.device(self.device):
                model = build(config).eval()
            set_preprocessing(model, own_preprocessing(checkpoint))
            model.set_backend(self.backend)
            tokenizer = tokenizer_for(config, str(source), self.tokenizer_file)
            self._encoder = Encoder(str(source), model, tokenizer, transform_of(model, uint8=True), self.device)
            self._config = config
        load_weights(self._encoder.model, checkpoint, source)
        # Each checkpoint gets a new encoder, since an encoder caches the digest of the weights that it had first.
        return dataclasses.replace(self._encoder, name=str(source))


@dataclasses.dataclass
class Evaluator:
    """Evaluates checkpoints of one run on a labelled set.

    Attributes:
        images: the set.
        templates, classnames, leave_out: as :func:`~clipfast.evaluate.evaluate.evaluate` takes them.
        batch_size: the number of images to encode at once.
        workers: the number of data worker processes; with 0, this process reads and decodes.
        model: the model of the checkpoints.
    """

    images: LabelledSet
    templates: Sequence[Template] = ("{}",)
    classnames: Sequence[str] | None = None
    leave_out: Sequence[str] = ()
    batch_size: int = 256
    workers: int = 0
    model: CheckpointModel = dataclasses.field(default_factory=CheckpointModel)

    def __call__(self, checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
        """Evaluate a checkpoint, and return the results of :func:`~clipfast.evaluate.evaluate.evaluate`.

        Raises:
            ValueError: the checkpoint does not tell its model, or cannot be loaded, or the set cannot be evaluated.
        """
        return self.results(self.model.load(checkpoint, source))

    def results(self, encoder: Encoder) -> dict[str, Any]:
        """Evaluate a model of clipfast, and return the results of :func:`~clipfast.evaluate.evaluate.evaluate`.

        Raises:
            ValueError: the set cannot be evaluated.
        """
        (features,) = encode_set([encoder], self.images, batch_size=self.batch_size, workers=self.workers)
        return evaluate(
            encoder.model, encoder.tokenizer, features.to(encoder.device), self.templates, classnames=self.classnames,
            leave_out=self.leave_out, skipped=len(self.images.skipped),
        ).results  # fmt: skip


class Shown(NamedTuple):
    """Functions that select the parts of a checkpoint's results for TensorBoard, for a plot and for the terminal.

    Attributes:
        scalars: the scalars for TensorBoard.
        drawn: the metrics (from 0 to 1) for the plot, by their names in the legend.
        words: the line of text for the terminal.
    """

    scalars: Callable[[Mapping[str, Any]], Mapping[str, float]]
    drawn: Callable[[Mapping[str, Any]], Mapping[str, float]]
    words: Callable[[Mapping[str, Any]], str]


def _drawn(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation that the plot of ``--watch`` shows, by their names in the legend."""
    found = evaluation_metrics(results)
    return {name: found[key] for name, key in WANTED if key in found} | {"chance of top-1": 1 / results["classes"]}


ZERO_SHOT = Shown(evaluation_metrics, _drawn, lambda results: metrics_text(evaluation_metrics(results)))


class Watch:
    """Evaluates the checkpoints of a training run, and writes each result as a JSON line to a file in its folder.

    Args:
        folder: the folder of the run.
        evaluator: returns the results of a checkpoint, given its content and its path.
        settings: the values on which results depend, such as the data. A checkpoint is evaluated once for equal
            settings.
        average: evaluate the average of the weights (EMA) where a checkpoint has one.
        name: the name of the file.
        shown: selects the results for TensorBoard, the plot and the terminal.

    Attributes:
        lines: the lines of the file whose settings equal ``settings``.
    """

    def __init__(
        self, folder: Path, evaluator: Callable[[dict[str, Any], Path], dict[str, Any]], settings: Mapping[str, Any],
        *, average: bool = True, name: str = NAME, shown: Shown = ZERO_SHOT,
    ) -> None:  # fmt: skip
        self.folder, self.evaluator, self.average, self.shown = RunFolder(folder), evaluator, average, shown
        self.settings = {**settings, "average": average}
        self.path = folder / name
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            append(self.path, "\n")  # a killed process left an incomplete line, which must end before the next one
        self.lines = [line for line in read_lines(self.path) if self.settings.items() <= line.items()]
        self._files = {(line["file_time"], line["bytes"]) for line in self.lines}
        self._weights = {(line["step"], line["weights"]) for line in self.lines}
        self._tensorboard: TensorBoard | None = None
        place = Path(name).stem + "-" + re.sub(r"\W+", "-", str(settings.get("data", ""))).strip("-")[-60:]
        try:
            points = ((line["step"], self._scalars(line), line["time"]) for line in self.lines)
            self._tensorboard = TensorBoard(folder / "tensorboard" / place, points)
        except ImportError:
            log.warning(NO_TENSORBOARD)

    def _scalars(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Return the scalars of a watched run's evaluation for TensorBoard."""
        return {f"val/{name}": value for name, value in self.shown.scalars(line["eval"]).items()}

    def run(self, interval: float) -> Iterator[dict[str, Any]]:
        """Evaluate existing and new checkpoints of the run, the oldest first, until training is finished.

        Args:
            interval: the number of seconds between two checks of the folder.
        """
        while True:
            # The state is read before the folder is checked, so that no checkpoint of a finished run is missed.
            is_finished = read_status(self.folder.path)["state"] == FINISHED
            yield from self.look()
            if is_finished:
                return
            time.sleep(interval)

    def look(self) -> Iterator[dict[str, Any]]:
        """Evaluate the checkpoints that exist in the run's folder and were not evaluated yet."""
        while (oldest := self._oldest()) is not None:
            line = self._evaluated(*oldest)
            if line is not None:
                yield line

    def _oldest(self) -> tuple[Path, tuple[int, int]] | None:
        """Return the watched run's oldest checkpoint to evaluate, with the time and size of its file, or None."""
        files = {file: path for path in self.folder.kept() if (file := _file(path)) is not None}
        new = files.keys() - self._files
        return (files[min(new)], min(new)) if new else None

    def _evaluated(self, path: Path, file: tuple[int, int]) -> dict[str, Any] | None:
        """Evaluate a checkpoint of the watched run and record the result.

        Return None if the checkpoint is damaged, if its weights were evaluated before under another name, or if
        training has removed or replaced the file; a later check finds a new file of the same name.
        """
        try:
            # The optimizer's state is not read, since it may be twice the size of the weights.
            checkpoint = read_parts(path, without=("optimizer",)) if path.is_dir() else read_checkpoint(path)
        except CheckpointError as error:
            if _file(path) == file:
                self._files.add(file)
                print(f"clipfast eval: left out: {error}", file=sys.stderr)
            return None
        if _file(path) != file:
            return None
        self._files.add(file)
        if self.average and "state_dict_ema" in checkpoint:
            checkpoint["state_dict"] = checkpoint["state_dict_ema"]
        progress = checkpoint.get("clipfast", {}).get("progress", {})
        step, weights = progress.get("step", 0), _digest(checkpoint["state_dict"])
        if (step, weights) in self._weights:
            return None
        results = self.evaluator(checkpoint, path)
        line = {
            "step": step, "samples_seen": progress.get("seen"), "epoch": checkpoint.get("epoch"),
            "time": round(time.time(), 3), "checkpoint": path.name, "file_time": file[0], "bytes": file[1],
            "weights": weights, **self.settings, "eval": results,
        }  # fmt: skip
        self._weights.add((step, weights))
        self.lines.append(line)
        append(self.path, json.dumps(line) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.add(step, self._scalars(line), line["time"])
        return line

    def close(self) -> None:
        """Write the remaining scalars of the watched run to TensorBoard's files and close them."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def follow(watch: Watch, interval: float, title: str, plot: Path | None = None) -> None:
    """Print a line for each checkpoint of a watched run, and update their plot, until the run is finished or Ctrl-C.

    Args:
        watch: evaluates the checkpoints.
        interval: the folder is checked for new checkpoints every ``interval`` seconds.
        title: the title of the plot.
        plot: the file of the plot, or None.
    """

    def draw() -> None:
        """Update the plot of all evaluated checkpoints of the watched run."""
        if plot is not None and watch.lines:
            from .pictures import steps_plot

            steps_plot([(line["step"], watch.shown.drawn(line["eval"])) for line in watch.lines], title, plot)

    try:
        draw()
        for line in watch.run(interval):
            print(f"step {line['step']} ({line['checkpoint']}): {watch.shown.words(line['eval'])}", flush=True)
            draw()
    except KeyboardInterrupt:
        pass  # Ctrl-C is the usual way to end ``--watch``
    finally:
        watch.close()


def _file(path: Path) -> tuple[int, int] | None:
    """Return time and size of a watched run's checkpoint file (if sharded, of its manifest); None without a file."""
    try:
        status = (path / MANIFEST if path.is_dir() else path).stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def _digest(state: Mapping[str, Tensor]) -> str:
    """Return a checksum of weights, by which ``--watch`` recognises equal checkpoints under different names."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
