"""The training data of a run: its pairs, their order and batches, and the limit on pairs that cannot be used."""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import (
    MAX_OPEN,
    Batch,
    BatchPlan,
    BudgetedBatches,
    CroppedImages,
    EncodedCrops,
    IndexCache,
    Keys,
    Mix,
    Order,
    PackedBatches,
    PairBatches,
    ShardIndex,
    Skipped,
    Source,
    SyntheticBatches,
    SyntheticSource,
    Unique,
    WholeImages,
    expand_shards,
    identities,
    open_limit,
    open_sources,
    pair_loader,
)
from ..data.batch_plan import Unit
from ..data.keys import IMAGE_KEYS, TEXT_KEYS
from ..data.samples import sample_name
from ..distributed.ending import TrainingError
from ..distributed.world import ALONE, World
from ..evaluate.labelled import LabelledSet
from ..factory import transform_of
from ..models import CLIP
from ..models.aug_cfg import training_options
from ..models.file_tokenizer import FileTokenizer
from ..models.images import MAX_PIXELS, SampleError, augmentation
from ..models.tokenizer import Tokenizer
from .batches import plan_of, stream_of
from .optim import parse_arguments
from .option_checks import KEY_OPTIONS, flag_name
from .schedule import Epochs
from .train_config import AUGMENTATIONS, TrainConfig

BY_CHANCE = 1e-3  # the probability that a check stops a run whose data have just the allowed share of bad pairs
NO_FILES = Keys((), ())  # keys with which a sample is read without its image and its caption
ORDER = 2  # version of the order of pairs; within an epoch, a run resumes only from a checkpoint of the same version


class TrainingData:
    """The training data of a run: its pairs and batches, in an order that only the data and the seed determine.

    The batches of all epochs form one sequence. An epoch need not be a whole number of batches.

    Args:
        config: options of the run.
        plan: the sizes of the batches of all processes together; by default, those of ``config`` for one process.
        world: the processes; each of them gets its part of every batch.

    Attributes:
        shards: the names of all shards.
        sizes: the number of pairs in each shard.
        content: a checksum of all properties of the shards on which the order of the pairs depends.
        epochs: the steps with which each epoch of the run begins and ends.
        total_steps: the number of steps of the run.
        batch_size: number of pairs of all processes together in the largest batch.
        is_drawn: whether all pairs are synthetic and of one size; then the training device draws their images.
        damaged: the shards that are known to have lost pairs.

    Raises:
        ValueError: a shard is missing, a shard has lost too much, or the shards hold less than one batch.
    """

    def __init__(self, config: TrainConfig, plan: BatchPlan | None = None, world: World = ALONE) -> None:
        self.config, self.world = config, world
        self.plan = plan = plan or plan_of(config, ALONE, {})
        self.batch_size = plan.largest
        groups = [expand_shards(part) for part in parts(config)]
        self.shards = [shard for group in groups for shard in group]
        max_open = open_limit(len(groups))
        opened = [sources_of(config, group, config.workers, max_open) for group in groups]
        self.sources = [source for group in opened for source in group]
        self.is_drawn = all(isinstance(source, SyntheticSource) for source in self.sources) and not config.use_naflex
        if self.is_drawn:
            _refuse_changes(config)
        self.sizes = [size for source in self.sources for size in source.sizes]
        self.damaged = _damaged(self.sources, config.max_bad_fraction)
        seed, replacement = config.seed, config.dataset_resampled
        if not all(map(len, self.sources)):
            raise ValueError(f"the shards hold no samples: {config.train_data}")
        orders = [
            Order(source.sizes, seed, source=number, replacement=replacement)
            for number, source in enumerate(self.sources)
        ]
        given = config.train_data_upsampling_factors or (1.0,)
        factors = [factor for factor, group in zip(given, opened, strict=True) for _ in group]
        mix = Mix(orders, factors, seed)
        _refuse_less_than_a_batch(len(mix), config, plan)
        self.order: Mix | Unique = mix
        content = hashlib.sha256(b"".join(np.array(source.sizes, "<i8").tobytes() for source in self.sources))
        if config.unique_by is not None:
            alike = [identities(source, config.unique_by, config.keys()) for source in self.sources]
            self.order = Unique(mix, alike, plan.largest)
            for numbers in alike:
                content.update(np.ascontiguousarray(numbers, "<u8").data)  # copies only on big-endian machines
        self.content = content.hexdigest()
        unit: Unit = "tokens" if config.naflex_num_train_image_tokens else "pairs"
        length = config.naflex_num_train_image_tokens or config.train_num_samples or len(self.order)
        seen = config.samples_seen
        self.total_steps = plan.batches_for(seen) if seen else plan.batches_for(config.epochs * length, unit)
        self.epochs = Epochs(length, plan, self.total_steps, unit)

    def state_dict(self) -> dict[str, Any]:
        """Return everything on which the order of the training pairs depends: the entry "stream" of a checkpoint."""
        keys = ["train_data", "train_data_upsampling_factors", "dataset_resampled", "seed", "unique_by"]
        if self.config.use_naflex:
            keys.append("naflex_num_train_image_tokens")
        found = {key: getattr(self.config, key) for key in keys} | stream_of(self.plan)
        found["train_data_upsampling_factors"] = list(found["train_data_upsampling_factors"])
        num_samples = self.epochs.length if self.epochs.unit == "pairs" else None
        return {"order": ORDER, "num_samples": num_samples, "content": self.content, **found}

    def batches(
        self, first: int, model: CLIP, tokenizer: Tokenizer | FileTokenizer, *, pin_memory: bool
    ) -> Generator[Batch, None, None]:
        """Return the batches of the run from number ``first``, decoded and augmented by the data workers.

        Args:
            first: number of the first batch, from 0; no earlier batch is read.
            model, tokenizer: set the preprocessing of the images and the texts.
            pin_memory: place batches in memory that a GPU can copy from asynchronously.

        Raises:
            ValueError: far too many pairs cannot be used, or a data worker died.
        """
        batches = pair_batches(self.config, self.sources, self.order, model, tokenizer, self.plan, self.world)
        if isinstance(batches, PackedBatches):
            batches.for_gpu = pin_memory
        if self.is_drawn:
            batches = SyntheticBatches(**vars(batches), image_size=model.visual.image_size)
        workers, ranks = self.config.workers, self.world.local_size
        return pair_loader(batches, first, self.total_steps, workers, pin_memory=pin_memory, local_ranks=ranks)

    def names(self, number: int) -> list[str]:
        """Return the name (shard and key) of each training pair in this rank's part of a batch.

        A pair that cannot be read is named by its shard and position.

        Args:
            number: number of the batch, from 0.
        """
        planned = self.plan[number]
        part = planned.pairs // self.world.size
        first = planned.first + self.world.rank * part
        mine = self.order(first, first + part)
        names = []
        for place, sample in zip(mine.source.tolist(), mine.sample.tolist(), strict=True):
            source = self.sources[place]
            try:
                names.append(sample_name(source.read(sample, NO_FILES)))
            except SampleError:
                names.append(source.name(sample))
        return names


def pair_batches(
    config: TrainConfig,
    sources: Sequence[Source],
    order: Mix | Unique,
    model: CLIP,
    tokenizer: Tokenizer | FileTokenizer,
    plan: BatchPlan | None = None,
    world: World = ALONE,
) -> PairBatches:
    """Return the batches of a training run in the given order, decoded and augmented as its options say.

    Args:
        config: the options.
        sources, order: the sources of the pairs, and their order.
        model, tokenizer: set the preprocessing of the images and the texts.
        plan: the sizes of the batches of all processes together; by default, those of ``config`` for one process.
        world: the processes; this one gets its part of every batch.
    """
    augment = augmentation(config.affine, config.color_jitter, config.hue, config.gray_prob)
    arguments = parse_arguments(config.aug_cfg)
    given = training_options(arguments, naflex=config.use_naflex) if config.aug_cfg else {"scale": config.crop_scale}
    cut: dict[str, Any] = {"augment": augment, **given}
    max_pixels = config.max_image_pixels or MAX_PIXELS
    crops = CroppedImages(model.visual.image_size, **cut, max_pixels=max_pixels)
    plan = plan or plan_of(config, ALONE, {})
    batches = PairBatches(
        sources, order, crops, tokenizer, plan.largest, config.seed, config.unique_by, config.keyword_prob,
        config.keys(), model.reads_padding or model.takes_packed(), world.rank, world.size,
    )  # fmt: skip
    if isinstance(plan, BudgetedBatches):
        patch_size = model.config.vision.patch_size
        assert patch_size is not None
        options = {**cut, "max_pixels": max_pixels}
        return PackedBatches(**vars(batches), plan=plan, patch_size=patch_size, crops=options)
    if config.decode_on_device:
        encoded = EncodedCrops(crops)
        batches.transform, batches.gather = encoded, encoded.gathered
    elif cut == {"augment": augment, "scale": (1.0, 1.0)}:
        batches.transform = WholeImages(transform_of(model, train=True, uint8=True, **cut), max_pixels)
    return batches


def sources_of(config: TrainConfig, names: Sequence[str], workers: int = 0, max_open: int = MAX_OPEN) -> list[Source]:
    """Open the sources of pairs as the options of a run say; arguments and errors are those of ``open_sources``."""
    return open_sources(names, workers, IndexCache(separator=config.separator()), max_open)


def validation_set(config: TrainConfig) -> LabelledSet | None:
    """Return the labelled set of ``--val-data``, or None; the keys of training come before the default keys."""
    if config.val_data is None or config.val_frequency == 0:
        return None
    given = config.keys()
    keys = Keys((*given.images, *IMAGE_KEYS), (*given.texts, *TEXT_KEYS), given.is_json)
    return LabelledSet(config.val_data, config.val_group_by, keys=keys, separator=config.separator())


def parts(config: TrainConfig) -> list[str]:
    """Return the parts of ``--train-data`` that '::' joins if they have upsampling factors, otherwise all as one."""
    factors, named = config.train_data_upsampling_factors, config.train_data.split("::")
    if factors and len(factors) != len(named):
        raise ValueError(
            f"--train-data-upsampling-factors needs a factor for each of the {len(named)} parts of --train-data, got "
            f"{len(factors)}"
        )
    return named if factors else [config.train_data]


def _refuse_changes(config: TrainConfig) -> None:
    """Raise ValueError if options would change images or captions of synthetic pairs, which the device draws."""
    given = [flag_name(key) for key in (*AUGMENTATIONS, "aug_cfg", *KEY_OPTIONS) if getattr(config, key)]
    if given:
        raise ValueError(f"{', '.join(given)}: synthetic pairs are drawn on the device as they are: leave it out")


def _refuse_less_than_a_batch(pairs: int, config: TrainConfig, plan: BatchPlan) -> None:
    """Raise ValueError if the training data, or an epoch of the length that the options set, hold less than a batch."""
    if pairs < plan.largest:
        option = "--naflex-max-tokens-per-batch" if config.use_naflex else "--batch-size"
        raise ValueError(
            f"the shards hold {pairs} pairs, less than one batch of {plan.largest}: lower {option}, or name more "
            "shards in --train-data"
        )
    lengths = [(config.train_num_samples, "--train-num-samples", plan.largest, "pairs")]
    if isinstance(plan, BudgetedBatches):
        tokens = config.naflex_num_train_image_tokens
        lengths.append((tokens, "--naflex-num-train-image-tokens", plan.most_tokens, "tokens"))
    for given, flag, least, unit in lengths:
        if given is not None and given < least:
            raise ValueError(f"{flag} {given} is less than one batch of {least} {unit} of all processes")


def _damaged(sources: Sequence[Source], limit: float) -> list[ShardIndex]:
    """Return the training shards that have lost pairs to damage.

    Pairs beyond the end of a truncated shard are not counted, since their number is unknown.

    Raises:
        ValueError: more than the share ``limit`` of all pairs is lost.
    """
    damaged = list({shard.name: shard for source in sources for shard in source.shards if shard.damage}.values())
    lost = sum(shard.lost for shard in damaged)
    total = lost + sum(map(len, sources))
    if lost > limit * total:
        raise ValueError(
            f"about {lost} of {total} pairs are lost in {len(damaged)} damaged shard(s), more than --max-bad-fraction "
            f"{limit}; the first is {damaged[0].name}"
        )
    return damaged


@dataclasses.dataclass
class SkipBudget:
    """Counts the pairs that training has seen and skipped, by reason, and stops the run when too many were skipped."""

    limit: float  # the largest allowed share of skipped pairs (--max-bad-fraction)
    listed_in: Path  # the file with the skipped pairs, which the error message names
    doctor: str  # the command that finds all bad pairs, which the error message names
    seen: int = 0
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def skipped(self) -> int:
        """The number of training pairs that were skipped."""
        return self.kinds.total()

    def is_exceeded_by(self, skipped: int) -> bool:
        """Return True if ``skipped`` of the pairs seen so far show that the training data have too many bad pairs.

        The bad share of the first few pairs may exceed the limit by chance. This returns True only if, by Chernoff's
        bound, data with just the allowed share would have so many bad pairs with a probability below ``BY_CHANCE``.
        """
        if skipped <= self.limit * self.seen or self.limit == 0:
            return skipped > self.limit * self.seen
        bad = min(1.0, skipped / self.seen)  # the ratio may exceed 1, since ranks may count their last bad pairs twice
        good = 1 - bad
        divergence = bad * math.log(bad / self.limit) + (good * math.log(good / (1 - self.limit)) if good else 0.0)
        return math.exp(-self.seen * divergence) < BY_CHANCE

    def count(self, skipped: Sequence[Skipped]) -> None:
        """Count skipped training pairs.

        Raises:
            TrainingError: they are too many.
        """
        self.kinds.update(sample.kind for sample in skipped)
        if skipped and self.is_exceeded_by(self.skipped):
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.kinds.most_common())
            raise TrainingError(
                f"{self.skipped} of {self.seen} pairs could not be used, more than --max-bad-fraction {self.limit}: "
                f"{kinds}; they are listed in {self.listed_in}; last: {skipped[-1]}; all bad pairs are listed by: "
                f"{self.doctor}"
            )
