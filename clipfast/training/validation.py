"""Evaluation of a run on its validation data."""

from collections.abc import Iterator

from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.labelled import LabelledImage, encode_labelled, read_labelled
from ..images import image_transform
from ..models import CLIP
from ..tokenizer import Tokenizer
from .config import TrainConfig

BATCH_SIZE = 256


class Validation:
    """The validation data of a run, if it has any.

    Raises:
        ValueError: the first sample cannot be used, which should show before an epoch has been spent.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.data, self.group_by, self.leave_out = config.val_data, config.val_group_by, config.val_leave_out
        if self.data is not None:
            next(self.images())

    def images(self) -> Iterator[LabelledImage]:
        """Return the images of the validation data; none if there is no such data."""
        return iter(()) if self.data is None else read_labelled(self.data, self.group_by)

    def evaluate(self, model: CLIP, tokenizer: Tokenizer) -> Evaluation | None:
        """Return zero-shot accuracy and retrieval of ``model``, which is left in evaluation mode; None without data."""
        if self.data is None:
            return None
        model.eval()
        transform = image_transform(model.visual.image_size, uint8=True)
        features = encode_labelled(model, self.images(), transform, BATCH_SIZE, model.logit_scale.device)
        return evaluate(model, tokenizer, features, leave_out=self.leave_out)
