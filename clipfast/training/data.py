"""The training data of a run: its shards, the batches of each epoch, and how many pairs may be unusable."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..data import Batch, PairStream, count_samples, expand_shards, pair_loader
from ..file_tokenizer import FileTokenizer
from ..images import augmentation, image_transform
from ..models import CLIP
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .errors import TrainingError

MIN_SEEN_FOR_BAD_FRACTION = 100


class TrainingData:
    """Shards and the batches from them, in an order that the state determines.

    ``saved`` is the state of the run that is continued, or nothing. If it is of the same shards, their number of
    samples is taken from it, and the shards need not be read to count them.

    Raises:
        ValueError: a shard is missing, or the shards hold less than one batch.
    """

    def __init__(self, config: TrainConfig, saved: dict[str, Any]) -> None:
        self.config = config
        self.shards = expand_shards(config.train_data)
        known = saved.get("num_samples") if saved.get("train_data") == config.train_data else None
        self.num_samples: int = config.train_num_samples or known or count_samples(self.shards)
        self.steps_per_epoch = self.num_samples // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"the shards hold {self.num_samples} pairs, less than one batch of {config.batch_size}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the order of the data depends on."""
        keys = ("train_data", "batch_size", "workers", "seed", "unique_by")
        own = {"num_samples": self.num_samples, "steps_per_epoch": self.steps_per_epoch}
        return own | {key: getattr(self.config, key) for key in keys}

    def batches(
        self, epoch: int, first: int, model: CLIP, tokenizer: Tokenizer | FileTokenizer, *, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Return the batches of an epoch from number ``first``, decoded and augmented by the data workers.

        Args:
            epoch, first: numbers of the epoch and of the first batch, from 0; batches before it are not decoded.
            model, tokenizer: what the images and the texts are prepared for.
            pin_memory: place batches in memory that a GPU can copy from asynchronously.

        Raises:
            ValueError: there are more data workers than shards, or the shards cannot be read.
        """
        config = self.config
        augment = augmentation(config.affine, config.color_jitter, config.hue, config.gray_prob)
        transform = image_transform(
            model.visual.image_size, train=True, scale=config.crop_scale, augment=augment, uint8=True,
            resize_mode=model.visual.resize_mode,
        )  # fmt: skip
        stream = PairStream(
            self.shards, transform, tokenizer, config.batch_size, self.steps_per_epoch, config.seed, epoch, first,
            config.unique_by, config.keyword_prob, model.reads_padding,
        )  # fmt: skip
        return pair_loader(stream, config.workers, pin_memory=pin_memory)


@dataclasses.dataclass
class SkipBudget:
    """How many pairs were seen, how many of them had to be skipped, and how many may be."""

    limit: float  # largest share of skipped pairs
    listed_in: Path  # the file that lists the skipped pairs, for the error
    seen: int = 0  # skipped ones included
    skipped: int = 0

    def count(self, batch: Batch) -> None:
        """Count the pairs of a batch.

        Raises:
            TrainingError: too many were skipped.
        """
        self.seen += len(batch) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        enough = self.seen >= MIN_SEEN_FOR_BAD_FRACTION
        if batch.skipped and enough and self.skipped > self.limit * self.seen:
            raise TrainingError(
                f"{self.skipped} of {self.seen} pairs could not be used, more than --max-bad-fraction {self.limit}; "
                f"they are listed in {self.listed_in}; last: {': '.join(batch.skipped[-1])}"
            )
