"""Evaluation during training: each rank encodes its part of the validation images, and rank 0 gets the results."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Skipped
from ..distributed.ending import Interruption
from ..distributed.world import INDEXING, World
from ..evaluate.encoder import Encoder
from ..evaluate.evaluate import Evaluation, evaluate
from ..evaluate.features import LabelledFeatures, encode_set
from ..evaluate.imagenet import imagenet_accuracy, imagenet_classifier, imagenet_set
from ..evaluate.labelled import LabelledSet
from ..factory import transform_of
from ..io.progress import Advance, Progress, lines, progress
from ..models import CLIP
from ..models.file_tokenizer import FileTokenizer
from ..models.tokenizer import Tokenizer
from .data import validation_set
from .ema import WeightAverage
from .fsdp import is_sharded, unsharded
from .logs import TrainLog, log
from .train_config import TrainConfig


class ImageNet:
    """The ImageNet folders of a run (``--imagenet-val``, ``--imagenet-v2``), and the zero-shot accuracy on them.

    Attributes:
        sets: the image folders by the name that OpenCLIP gives to their accuracy.
        results: the last accuracies, under OpenCLIP's names.

    Raises:
        ValueError: a folder is not ImageNet's; the message names the flag.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.sets: dict[str, LabelledSet] = {}
        self.results: dict[str, float] = {}
        self._part: Tensor | None = None  # the classes of the zero-shot classifier that this rank has computed
        if config.zeroshot_frequency == 0:
            return
        for flag, name, folder in (
            ("--imagenet-val", "imagenet-zeroshot-val", config.imagenet_val),
            ("--imagenet-v2", "imagenetv2-zeroshot-val", config.imagenet_v2),
        ):
            try:
                if folder is not None:
                    self.sets[name] = imagenet_set(folder)
                    self.sets[name].check()
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from error

    def evaluate(
        self,
        model: CLIP,
        tokenizer: Callable[[list[str]], Tensor],
        encoded: Callable[[LabelledSet], LabelledFeatures | None],
        device: torch.device,
        world: World,
        show: Progress = progress,
    ) -> dict[str, float]:
        """Return the zero-shot accuracy of the trained model on each ImageNet folder; all ranks must call it.

        The prompts are encoded again for each evaluation if the text tower is trained.

        Args:
            model: the model, in evaluation mode.
            tokenizer: tokenizer of the model.
            encoded: a function that encodes an image set; all ranks call it, and only rank 0 gets the features.
            device: device of the model.
            world: the processes, each of which encodes the prompts of some classes.
            show: shows the progress.
        """

        def encode() -> None:
            """Compute the classes of ImageNet's zero-shot classifier that belong to this rank."""
            with world.phase("evaluation"):
                self._part = imagenet_classifier(model, tokenizer, device, world.rank, world.size, show).cpu()

        if self._part is None or _trains_texts(model):
            world.agree(encode)
        assert self._part is not None
        parts = world.gather(self._part)
        figures: dict[str, float] = {}
        for name, images in self.sets.items():
            features = encoded(images)
            if features is not None:
                accuracy = imagenet_accuracy(images, features, torch.cat(parts, 1).to(device))
                figures |= {f"{name}-{kind}": value for kind, value in accuracy.items()}
        self.results = world.on_main(lambda: figures)
        return self.results


def _trains_texts(model: CLIP) -> bool:
    """Return True if any trained weight affects text features, so that prompts must be encoded again."""
    others = ("visual.", "logit_")
    return any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(others))


BATCH_SIZE = 256  # number of validation images that a rank encodes at a time


class Validation:
    """The evaluations of a run. All ranks call the same methods in the same order.

    Args:
        config: options of the run.
        model, tokenizer: the model, which is in evaluation mode afterwards, and its tokenizer.
        average: the moving average of the weights, which is evaluated in their place; None without one.
        train_log: log of the run.
        world: the processes.

    Attributes:
        labelled: the images of ``--val-data``; None if there are none.
        imagenet: the folders of ImageNet, and the last accuracies on them.
        interruption: the signals that came to the run; with None, signals do not interrupt an evaluation.

    Evaluations that a signal interrupts raise :class:`clipfast.distributed.ending.Interrupted` on all ranks.
    """

    interruption: Interruption | None = None

    def __init__(
        self,
        config: TrainConfig,
        model: CLIP,
        tokenizer: Tokenizer | FileTokenizer,
        average: WeightAverage | None,
        train_log: TrainLog,
        world: World,
    ) -> None:
        self.config, self.model, self.tokenizer, self.average = config, model, tokenizer, average
        self.labelled, self.imagenet = validation_set(config), ImageNet(config)
        self.log, self.world = train_log, world
        self._is_sharded = is_sharded(config, world)

    def evaluate(self, step: int) -> Evaluation | None:
        """Compute, log and record zero-shot accuracy and retrieval after ``step`` steps; None without data."""
        images = self.labelled
        if images is None:
            return None
        with self.averaged():
            evaluation = self._evaluated(images)
        self.world.on_main(lambda: self._record(step, evaluation, images.skipped))
        return evaluation

    def evaluate_last_weights(self) -> Evaluation | None:
        """Evaluate the last weights on ``--val-data`` if other evaluations are of their average, else return None."""
        return None if self.labelled is None or self.average is None else self._evaluated(self.labelled)

    def evaluate_imagenet(self, step: int) -> None:
        """Compute, log and record the accuracy on the ImageNet folders after ``step`` steps, if there are any."""
        if not self.imagenet.sets:
            return
        self.model.eval()
        device = self.model.logit_scale.device
        with self.averaged(), self._whole():
            found = self.imagenet.evaluate(self.model, self.tokenizer, self._encoded, device, self.world, self._show)
        self.log.imagenet(step, found)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the trained model has the moving average of its weights, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    @contextlib.contextmanager
    def _show(self, total: int, what: str, unit: str) -> Iterator[Advance]:
        """Yield a function that logs the progress of an evaluation during training, and ends it after a signal."""
        say = lines(total, what, unit, log.info)

        def advance(new: int) -> None:
            """Log that ``new`` more units are done; raise Interrupted if a signal came."""
            say(new)
            if self.interruption is not None:
                self.interruption.check()

        yield advance

    def _record(self, step: int, evaluation: Evaluation, skipped: Sequence[Skipped]) -> None:
        """Log and record the results of an evaluation during training, and the images that it left out."""
        folder = self.log.folder
        if skipped:
            folder.record_skipped(step, skipped)
            log.warning(
                f"{len(skipped)} validation image(s) cannot be used and are left out, as {folder.skipped_path} says; "
                f"first: {skipped[0]}"
            )
        self.log.evaluation(step, evaluation.results)

    def _evaluated(self, images: LabelledSet) -> Evaluation:
        """Encode the validation data by the model's current weights on all ranks, and evaluate on rank 0."""
        self.model.eval()
        with self._whole():
            features = self._encoded(images)
            return self.world.on_main(lambda: self._results(features, len(images.left_out)), INDEXING)

    def _results(self, features: LabelledFeatures | None, skipped: int) -> Evaluation:
        """Compute zero-shot accuracy and retrieval from the features of the validation data, on rank 0."""
        if features is None:
            raise RuntimeError("the features of an evaluation are on rank 0, and this is another rank")
        at_once = self.config.micro_batch_size
        return evaluate(
            self.model, self.tokenizer, features, leave_out=self.config.val_leave_out, skipped=skipped,
            loss_batch=at_once if isinstance(at_once, int) else self.config.batch_size, show=self._show,
        )  # fmt: skip

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every rank has all weights (gathered by FSDP2), to encode images by itself."""
        return unsharded(self.config, self.model) if self._is_sharded else contextlib.nullcontext()

    def _encoded(self, images: LabelledSet) -> LabelledFeatures | None:
        """Encode a validation set, each rank a part of it; return the features on rank 0, and None on others."""
        device = self.model.logit_scale.device
        self.world.share_buffers(self.model)
        transform: Any = transform_of(self.model, uint8=True)
        if self.config.naflex_patch_sizes:
            transform = dataclasses.replace(transform, patch_size=self.config.naflex_patch_sizes[0])
        encoder = Encoder(self.config.model, self.model, self.tokenizer, transform, device)
        found = encode_set([encoder], images, batch_size=BATCH_SIZE, world=self.world, show=self._show)
        return found[0].to(device) if found else None
