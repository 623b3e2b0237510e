"""Evaluation during training, on all ranks: each encodes its part of the images, and rank 0 has the results."""

import contextlib
from collections.abc import Iterator, Sequence

from ..data import Skipped
from ..evaluation.encoder import Encoder
from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.features import LabelledFeatures, encode_set
from ..evaluation.labelled import LabelledSet
from ..factory import transform_of
from ..file_tokenizer import FileTokenizer
from ..models import CLIP
from ..progress import Advance, lines
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .data import validation_set
from .ema import WeightAverage
from .fsdp import is_sharded, unsharded
from .imagenet import ImageNet
from .interruption import Interruption
from .logs import TrainLog, log
from .world import INDEXING, World

BATCH_SIZE = 256


def validation_sets(config: TrainConfig) -> tuple[LabelledSet | None, ImageNet]:
    """Return what a run is evaluated on, before anything is built.

    Raises:
        ValueError: a set cannot be used.
    """
    return validation_set(config), ImageNet(config)


class Validation:
    """The evaluations of a run. All ranks call the same methods in the same order.

    Args:
        config: options of the run.
        sets: what to evaluate on, as :func:`validation_sets` returns it.
        model, tokenizer: what is evaluated; the model is in evaluation mode afterwards.
        average: of the weights, which is evaluated in their place; None if there is none.
        train_log: of the run.
        world: the processes.

    Attributes:
        labelled: the images of ``--val-data``; None if there are none.
        imagenet: the folders of ImageNet, and the last figures on them.
        interruption: of the run; None heeds no signals.

    Evaluations that a signal interrupts raise :class:`clipfast.training.interruption.Interrupted` on all ranks.
    """

    interruption: Interruption | None = None

    def __init__(
        self,
        config: TrainConfig,
        sets: tuple[LabelledSet | None, ImageNet],
        model: CLIP,
        tokenizer: Tokenizer | FileTokenizer,
        average: WeightAverage | None,
        train_log: TrainLog,
        world: World,
    ) -> None:
        self.config, self.model, self.tokenizer, self.average = config, model, tokenizer, average
        self.labelled, self.imagenet = sets
        self.log, self.world = train_log, world
        self._is_sharded = is_sharded(config, world)

    def evaluate(self, step: int) -> Evaluation | None:
        """Return zero-shot accuracy and retrieval after ``step`` steps, logged and recorded; None without any data."""
        images = self.labelled
        if images is None:
            return None
        with self.averaged():
            evaluation = self._evaluated(images)
        self.world.on_main(lambda: self._record(step, evaluation, images.skipped))
        return evaluation

    def evaluate_last_weights(self) -> Evaluation | None:
        """Return the same figures of the last weights, beside those of their average; None without average or data."""
        return None if self.labelled is None or self.average is None else self._evaluated(self.labelled)

    def evaluate_imagenet(self, step: int) -> None:
        """Log and record the zero-shot accuracy on ImageNet after ``step`` steps, if that was asked for."""
        if not self.imagenet.sets:
            return
        self.model.eval()
        device = self.model.logit_scale.device
        with self.averaged(), self._whole():
            found = self.imagenet.evaluate(self.model, self.tokenizer, self._encoded, device, self.world, self._show)
        self.log.imagenet(step, found)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the average of its weights, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    @contextlib.contextmanager
    def _show(self, total: int, what: str, unit: str) -> Iterator[Advance]:
        """Log how far an evaluation is, and heed signals."""
        say = lines(total, what, unit, log.info)

        def advance(new: int) -> None:
            say(new)
            if self.interruption is not None:
                self.interruption.check()

        yield advance

    def _record(self, step: int, evaluation: Evaluation, skipped: Sequence[Skipped]) -> None:
        """Log and record an evaluation, and the images that it left out."""
        folder = self.log.folder
        if skipped:
            folder.record_skipped(step, skipped)
            log.warning(
                f"{len(skipped)} validation image(s) cannot be used and are left out, as {folder.skipped_path} says; "
                f"first: {skipped[0]}"
            )
        self.log.evaluation(step, evaluation.results)

    def _evaluated(self, images: LabelledSet) -> Evaluation:
        """Return zero-shot accuracy and retrieval of the weights that the model has now."""
        self.model.eval()
        with self._whole():
            features = self._encoded(images)
            return self.world.on_main(lambda: self._results(features, len(images.left_out)), INDEXING)

    def _results(self, features: LabelledFeatures | None, skipped: int) -> Evaluation:
        if features is None:
            raise RuntimeError("the features of an evaluation are on rank 0, and this is another one")
        at_once = self.config.micro_batch_size
        return evaluate(
            self.model, self.tokenizer, features, leave_out=self.config.val_leave_out, skipped=skipped,
            loss_batch=at_once if isinstance(at_once, int) else self.config.batch_size, show=self._show,
        )  # fmt: skip

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which every rank has all weights, and encodes what it likes without the others."""
        return unsharded(self.config, self.model) if self._is_sharded else contextlib.nullcontext()

    def _encoded(self, images: LabelledSet) -> LabelledFeatures | None:
        """Return the features of a set on rank 0, of which each rank encodes its part."""
        device = self.model.logit_scale.device
        self.world.share_buffers(self.model)
        transform = transform_of(self.model, uint8=True)
        encoder = Encoder(self.config.model, self.model, self.tokenizer, transform, device)
        found = encode_set([encoder], images, batch_size=BATCH_SIZE, world=self.world, show=self._show)
        return found[0].to(device) if found else None
