"""The log of a training run: lines in OpenCLIP's format, ``metrics.jsonl``, and the measurement of speed and memory."""

import collections
import contextlib
import logging
import logging.handlers
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..distributed.world import ALONE, World
from ..host import gpu_state, proc_bytes, throttles
from ..io.progress import duration
from ..kernels.hardware import card_named
from ..models import CLIP
from ..models.model_flops import training_flops
from ..models.packed_images import PackedImages
from ..runs.folder import RunFolder
from .guard import Figures
from .schedule import Epochs
from .spikes import Signs

if TYPE_CHECKING:
    from .reports import Reports

log = logging.getLogger("clipfast")


class Meters:
    """Measures throughput, MFU, memory and GPU state of one rank for the training log.

    Args:
        device: device of the rank.
        parallel: the model that a step calls; ``DistributedDataParallel`` measures its own communication.
        every: number of steps from one call of :meth:`read` to the next.
    """

    def __init__(self, device: torch.device, parallel: nn.Module | None = None, every: int = 1) -> None:
        self.device, self.parallel = device, parallel
        # Maps a sequence length (None for images of one size) to seconds of a step at an MFU of 1; empty if unknown.
        self._seconds_at_peak: dict[int | None, float] = {}
        self._tells_nvml = device.type == "cuda"
        self._was_throttled = False
        if isinstance(parallel, DistributedDataParallel):
            parallel._set_ddp_runtime_logging_sample_rate(every)

    def count_flops(
        self, model: Callable[[], CLIP], sizes: Mapping[int | None, int], ranks: int, *, half: bool
    ) -> str | None:
        """Count the FLOPs of a training step, and return a sentence on what MFU means in this run, or None.

        Args:
            model: a function that builds the model on the device "meta".
            sizes: the number of pairs of all ranks together, by sequence length: the most patches of an image for
                NaFlex, None for images of one size.
            ranks: the number of ranks.
            half: whether matrix products are in half precision.
        """
        card = card_named(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if card is None:
            return None
        built, peak = model(), ranks * card.peak(half=half)
        flops = {seq_len: training_flops(built, pairs, seq_len) for seq_len, pairs in sizes.items()}
        self._seconds_at_peak = {seq_len: found / peak for seq_len, found in flops.items()}
        shown = " or ".join(f"{found / 1e12:,.4g}" for found in flops.values())
        whole = "" if None in flops else "as if each image had all patches that its batch drew, "
        return (
            f"MFU: a step has {shown} TFLOP of the model, with all padding of texts, {whole}and "
            f"without what is computed a second time; {ranks} x {card.name} reach {peak / 1e12:,.4g} TFLOP/s by the "
            "data sheet"
        )

    def read(self, step_seconds: float, seq_lens: Sequence[int | None] = (None,)) -> dict[str, Any]:
        """Return ``mfu``, ``communication``, ``memory`` and ``gpu`` for a line of ``metrics.jsonl``, as far as known.

        ``mfu`` is relative to the peak of all ranks' GPUs. ``communication`` is the share of a step's time for which
        ``DistributedDataParallel`` still sums gradients, or waits for a slower rank, when the backward pass is over. It
        is that of the last step that DDP measured, and does not include the exchange of features in the loss.
        ``memory`` is in bytes, on a GPU the peak so far. ``gpu`` holds the values that NVML gives.

        Args:
            step_seconds: mean duration of a step.
            seq_lens: the most patches of an image in each of the steps; None if all images have one size.
        """
        found: dict[str, Any] = {"memory": self._memory()}
        if self._seconds_at_peak:
            found["mfu"] = statistics.fmean(self._seconds_at_peak[seq_len] for seq_len in seq_lens) / step_seconds
        times = self.parallel._get_ddp_logging_data() if isinstance(self.parallel, DistributedDataParallel) else {}
        whole, hidden = times.get("backward_comm_time"), times.get("backward_compute_comm_overlap_time")
        if whole is not None and hidden is not None:  # DDP sets both after it has measured some steps
            found["communication"] = min(max(whole - hidden, 0) * 1e-9 / step_seconds, 1.0)
        if self._tells_nvml:
            found |= self._gpu()
        return found

    def _memory(self) -> dict[str, int]:
        """Return the bytes of memory that this training process takes on its GPU, or on the host if it has no GPU."""
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            return {"allocated": allocated(self.device), "reserved": reserved(self.device)}
        with contextlib.suppress(OSError, RuntimeError):
            return {"resident": proc_bytes("self/status", "VmRSS")}
        return {}

    def _gpu(self) -> dict[str, Any]:
        """Return the state of the GPU for a line of training metrics, and warn the first time that it is throttled."""
        try:
            state = gpu_state(self.device)
        except Exception:  # NVML may be missing, or hidden by a container; training goes on without these values
            self._tells_nvml = False
            return {}
        if state["throttled"] and not self._was_throttled:
            self._was_throttled = True
            log.warning(
                f"{self.device} runs slower than it could, by {', '.join(throttles(state['reasons']))}: "
                f"{state['sm_mhz']} MHz, {state['power_w']:.0f} W, {state['temperature_c']} °C. There is no second "
                "warning; metrics.jsonl has the figures of each line."
            )
        return {"gpu": state}


class _OutLog(logging.handlers.WatchedFileHandler):
    """The handler of ``out.log``, which opens the file again if the run's folder was removed and made again."""

    def __init__(self, path: Path, folder: RunFolder) -> None:
        super().__init__(path, encoding="utf-8")
        self.folder = folder

    def reopenIfNeeded(self) -> None:  # noqa: N802
        """Open ``out.log`` again if it was removed or replaced, unless the folder now belongs to another run."""
        if self.folder.lock is not None and self.folder.is_held():
            super().reopenIfNeeded()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of training to ``out.log``, or drop it if the file cannot be opened again."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a line that cannot be written to ``out.log``; logging would print a traceback for each."""

    def close(self) -> None:
        """Close ``out.log``, even if its last lines cannot be written: else this error would hide that of the run."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(folder: RunFolder, world: World = ALONE, *, by_machine: bool = False) -> Iterator[None]:
    """Log training to the console and to ``out.log`` in ``folder``, in OpenCLIP's format.

    Ranks other than 0 log warnings and errors, and to the console only. With ``by_machine``, one rank of each machine
    logs to a file of its own, ``out-RANK``.
    """
    rank = "" if world.is_main else f"rank {world.rank} | "
    formatter = logging.Formatter(f"%(asctime)s | %(levelname)s | {rank}%(message)s", "%Y-%m-%d,%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if world.local_rank == 0 if by_machine else world.is_main:
        folder.path.mkdir(parents=True, exist_ok=True)  # rank 0 has made it, but this machine may have its own disk
        handlers.append(_OutLog(folder.path / (f"out-{world.rank}" if by_machine else "out.log"), folder))
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO if world.is_main else logging.WARNING)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class TrainLog:
    """Progress bar, log lines and metrics of a run.

    Args:
        folder: folder of the run.
        epochs: epochs of the run.
        world: the processes; rank 0 writes, and measures its own times.
        meters: meters of this rank.
        signs: finds signs of trouble such as loss spikes, which the log reports.

    Attributes:
        reports: reports of metrics to TensorBoard and others; None until they are opened, and on ranks other than 0.
    """

    def __init__(self, folder: RunFolder, epochs: Epochs, world: World, meters: Meters, signs: Signs) -> None:
        self.folder, self.epochs, self.world, self.meters, self.signs = folder, epochs, world, meters, signs
        self.reports: Reports | None = None
        self._first: tuple[int, float] | None = None  # step and time of the session's first line of metrics
        self._left: float | None = None  # estimated seconds until the end of the run
        self._start_again()

    def watch(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        """Yield the batches from ``step`` to the end of its epoch with a progress bar, and time the wait for each."""
        from tqdm import tqdm

        epoch, first, stop = self.epochs.after(step)
        description = f"epoch {epoch + 1}/{self.epochs.number}"
        self._start_again()
        options: dict[str, Any] = {"unit": "step", "disable": None if self.world.is_main else True, "leave": False}
        with tqdm(total=stop - first, initial=step - first, desc=description, **options) as bar:
            for number in range(step, stop):
                asked = time.perf_counter()
                with self.world.phase("data", number + 1):
                    batch = next(batches)
                self._waiting += time.perf_counter() - asked
                self._stages.update(batch.seconds)
                if isinstance(batch.images, PackedImages):
                    self._patches += int(batch.images.grids.prod(1).sum())
                yield batch
                if self._left is not None:
                    bar.set_postfix_str(f"run ETA {duration(self._left)}", refresh=False)
                bar.update()

    def step(self, figures: Tensor, pairs: int) -> None:
        """Count a finished training step, in which this process had ``pairs`` pairs.

        ``figures`` come from :class:`clipfast.train.guard.Guard`, and stay on their device until they are logged.
        """
        self._figures.append(figures)
        self._pairs += pairs * self.world.size

    def write(
        self, step: int, lr: float, logit_scale: Tensor, logit_bias: Tensor | None = None, *, shown: bool = True,
        **more: Any,
    ) -> None:  # fmt: skip
        """Write a log line and a line of metrics on the training steps since the last line; all ranks must call it.

        Steps that the guard skipped count in the times, but not in the mean losses.

        Args:
            step: number of steps that are finished.
            lr: learning rate of the last step.
            logit_scale: scalar, the factor of the cosine similarities after the last step.
            logit_bias: scalar, SigLIP's bias of the logits.
            shown: whether to write the log line too; otherwise only the line of metrics is written.
            **more: more entries of the line of metrics.
        """
        self.look(step)
        figures = self._known
        kept = [one for one in figures if not one.skipped]
        means = {}
        if kept:
            means = {key: statistics.fmean(getattr(one, key) for one in kept) for key in ("loss", "grad_norm")}
        now = time.perf_counter()
        elapsed = now - self._started
        seq_lens = [self.epochs.plan[number].seq_len for number in range(step - len(figures), step)]
        line: dict[str, Any] = {
            "step": step, "total_steps": self.epochs.total_steps, "epoch": self.epochs.after(step - 1).number,
            "epochs": self.epochs.number, "time": round(time.time(), 3),
            **means, "skipped_steps": len(figures) - len(kept), "lr": lr,
            "logit_scale": logit_scale.item(), **({} if logit_bias is None else {"logit_bias": logit_bias.item()}),
            "batch_time": elapsed / len(figures),
            "data_time": self._waiting / len(figures),
            "data_wait": self._waiting / elapsed,
            "pairs_per_second": self._pairs / elapsed,
            "pairs_per_second_per_gpu": self._pairs / elapsed / self.world.size,
            **self.meters.read(elapsed / len(figures), seq_lens),
            **more,
        }  # fmt: skip
        if None not in seq_lens:
            line["patches_per_second"] = self.world.sum([self._patches])[0] / elapsed
        # The ETA counts from the first line of metrics, because the steps before it include one-time work such as
        # compilation. It includes evaluations and checkpoints.
        first, seconds = self._first = self._first or (step, now)
        if step > first:
            self._left = (self.epochs.total_steps - step) * (now - seconds) / (step - first)
        if self._left is not None:
            line["eta"] = round(self._left, 1)
        line["data_seconds"] = dict(self._stages)  # by stage of data loading, the seconds of all data workers together
        if shown:
            log.info(self._text(line, kept[-1].loss if kept else math.nan))
        self.record(line)
        self._start_again()

    def look(self, step: int) -> None:
        """Fetch the metrics of the training steps since the last call, and look for signs of trouble in them.

        All ranks must call it; ``step`` is the number of finished steps.
        """
        if not self._figures:
            return
        stacked = torch.stack(self._figures)
        stacked[:, 0] = self.world.mean(stacked[:, 0])
        new = [Figures(*row) for row in stacked.tolist()]
        self._report(step - len(new), new)
        self._known += new
        self._figures.clear()

    def _report(self, before: int, figures: Sequence[Figures]) -> None:
        """Warn of signs that training goes wrong, and record them; ``figures`` are of the steps after ``before``."""
        for step, one in enumerate(figures, before + 1):
            for sign in self.signs.see(step, one) if self.world.is_main and not one.skipped else ():
                log.warning(sign.text[0].upper() + sign.text[1:])
                self.folder.record(step=step, warning=sign.kind, value=sign.value, usual=sign.usual)

    def _text(self, line: dict[str, Any], last: float) -> str:
        """Return the log line for a line of metrics: OpenCLIP's text, then more metrics; ``last`` is the last loss."""
        _, first, stop = self.epochs.after(line["step"] - 1)
        plan = self.epochs.plan
        pairs, total = (plan.before(step) - plan.before(first) for step in (line["step"], stop))
        mean = line.get("loss", math.nan)  # the mean loss is missing if all steps were skipped
        return (
            f"Train Epoch: {line['epoch']} [{pairs:>{len(str(total))}}/{total} ({100 * pairs / total:.0f}%)] "
            f"Data (t): {line['data_time']:.3f} Batch (t): {line['batch_time']:.3f}, "
            f"{line['pairs_per_second']:#g}/s, {line['pairs_per_second_per_gpu']:#g}/s/gpu "
            f"LR: {line['lr']:5f} Logit Scale: {line['logit_scale']:.3f} "
            f"Contrastive_loss: {last:#.5g} ({mean:#.5g}) Loss: {last:#.5g} ({mean:#.5g}) " + " ".join(self._ours(line))
        )

    def _ours(self, line: dict[str, Any]) -> Iterator[str]:
        """Yield the texts of a log line on training that OpenCLIP's log line does not have."""
        if line.get("memory"):
            yield f"Mem: {next(iter(line['memory'].values())) / 1e9:.1f} GB"
        if "patches_per_second" in line:
            yield f"Patches: {line['patches_per_second']:#g}/s"
        for name, key in (("MFU", "mfu"), ("Comm", "communication"), ("Data-wait", "data_wait")):
            if key in line:
                yield f"{name}: {100 * line[key]:.1f}%"
        if line["data_seconds"]:
            yield f"({self._stages.most_common(1)[0][0]})"
        if "eta" in line:
            yield f"ETA: {duration(line['eta'])}"

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Log and record the results of an evaluation on ``--val-data`` after ``step`` training steps."""
        from ..runs.metrics import evaluation_metrics

        # Accuracies by group are recorded but not logged, since there may be many groups.
        overall = {name: value for name, value in results.items() if name != "by_group"}
        self._evaluated(step, evaluation_metrics(overall), {"eval": results})

    def imagenet(self, step: int, accuracy: dict[str, float]) -> None:
        """Log and record the accuracy on ImageNet after ``step`` steps, by OpenCLIP's names."""
        self._evaluated(step, accuracy, {"imagenet": accuracy})

    def _evaluated(self, step: int, figures: dict[str, float], content: dict[str, Any]) -> None:
        """Log the metrics of an evaluation after ``step`` training steps; record ``content`` in ``metrics.jsonl``."""
        # As in OpenCLIP, this is the number of finished epochs, of which the last may have been cut short.
        epoch = self.epochs.after(step - 1).number + 1
        shown = "\t".join(f"{name}: {value:.4f}" for name, value in figures.items())
        log.info(f"Eval Epoch: {epoch} {shown}\tafter step {step}")
        self.record({"step": step, "epoch": epoch, "time": round(time.time(), 3), **content})

    def record(self, line: dict[str, Any]) -> None:
        """Write a line of metrics to ``metrics.jsonl`` and to TensorBoard and the other reports, on rank 0."""
        if self.world.is_main:
            self.folder.record(**line)
        if self.reports is not None:
            self.reports.add(line)

    def _start_again(self) -> None:
        """Reset the metrics and times of training steps, after they were logged."""
        self._figures: list[Tensor] = []  # metrics of the last steps, on the device
        self._known: list[Figures] = []  # metrics of the steps before, which :meth:`look` has fetched
        self._stages: collections.Counter[str] = collections.Counter()
        self._started, self._waiting, self._pairs, self._patches = time.perf_counter(), 0.0, 0, 0
