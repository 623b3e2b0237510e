"""Batches of packed images for NaFlex: each has as many pairs as a budget of tokens allows, and no padding."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..models.packed_images import PackedImages, pack_images
from .batch_plan import BudgetedBatches
from .crops import CroppedToSequence
from .loader import Batch, PairBatches, room_for


@dataclasses.dataclass
class PackedBatches(PairBatches):
    """The batches of a run whose images keep their aspect ratio and are packed.

    ``batch_size`` is the largest number of pairs of a batch. ``transform`` and ``gather`` are those of the latest batch
    that was made, and in the beginning those of the largest images.

    Attributes:
        plan: the position of each batch in the order of the samples, and the sizes of its images.
        patch_size: the side of a patch of the model, for batches that draw none.
        crops: options of :class:`CroppedToSequence`.
        for_gpu: round the number of patches up, as for :func:`pack_images`.
    """

    plan: BudgetedBatches = dataclasses.field(kw_only=True)
    patch_size: int = dataclasses.field(kw_only=True)
    crops: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    for_gpu: bool = False

    def __post_init__(self) -> None:
        """Refuse batches that cannot be divided among the ranks.

        Raises:
            ValueError: as above.
        """
        super().__post_init__()
        budget = self.plan.budget
        budget.refuse_ranks(self.world_size)
        self._prepare(max(budget.seq_lens), (budget.patch_sizes or (None,))[0])

    def __getitem__(self, number: int) -> Batch:
        """Read, decode, tokenize and pack batch ``number`` of the run, counted from 0.

        Raises:
            ValueError: far too many samples cannot be used.
        """
        planned = self.plan[number]
        assert planned.seq_len is not None
        self._prepare(planned.seq_len, planned.patch_size)
        return super().__getitem__(number)

    def extent(self, number: int) -> tuple[int, int]:
        """Return the position of the first pair of batch ``number``, and its number of pairs, of all ranks together."""
        return self.plan[number][:2]

    def _prepare(self, seq_len: int, patch_size: int | None) -> None:
        """Set ``transform`` and ``gather`` for a batch with up to ``seq_len`` patches of this size in each image."""
        patch_size = patch_size or self.patch_size
        self.transform = CroppedToSequence(patch_size, seq_len, **self.crops)
        self.gather = functools.partial(_packed, patch_size=patch_size, for_gpu=self.for_gpu)


def _packed(images: Iterable[Tensor], count: int, *, patch_size: int, for_gpu: bool) -> PackedImages:  # noqa: ARG001
    """Pack the images of a batch; in a data worker, into memory that is shared with the process that trains."""
    return pack_images(list(images), patch_size, for_gpu=for_gpu, room=room_for)
