"""A training run as far as its memory and its time depend on it, and one rank of it that takes steps.

The rank is built as the trainer builds it, of fake tensors or of real ones: the model, DistributedDataParallel or
FSDP2, the optimizer, the average of the weights. What FSDP2 shards, and how, is said in :mod:`clipfast.training.fsdp`.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..accumulation import accumulate_gradients
from ..kernels import contrastive_loss, distributed_contrastive_loss
from ..kernels.hardware import Card
from ..kernels.launch import record_launches
from ..ledger import Ledger
from ..models import CLIP, CLIPConfig, build, get_model_config
from ..training.config import TrainConfig
from ..training.ema import WeightAverage
from ..training.fsdp import blocks_of, shard
from ..training.optim import make_optimizer
from .step import data_parallel

PARALLELS = ("ddp", "fsdp")
CHECKPOINTINGS = ("none", "selective", "full")
PRECISIONS = ("amp_bf16", "pure_bf16", "fp32")
# The phases of a step. In the backward passes, the text tower comes first.
IMAGE_FORWARD, TEXT_FORWARD, LOSS = "forward of images", "forward of texts", "loss"
TEXT_BACKWARD, EMBEDDING_BACKWARD, IMAGE_BACKWARD = "backward of texts", "backward of tokens", "backward of images"
UPDATE = "update"
INPUTS = "inputs"
IMAGES, TEXTS, SCRATCH = "activations of images", "activations of texts", "backward scratch"
CATEGORIES = {
    IMAGE_FORWARD: IMAGES,
    TEXT_FORWARD: TEXTS,
    TEXT_BACKWARD: SCRATCH,
    EMBEDDING_BACKWARD: SCRATCH,
    IMAGE_BACKWARD: SCRATCH,
    UPDATE: "update scratch",
}
Parameters = list[nn.Parameter]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a step, apart from its batch.

    Attributes:
        model: a name of :func:`clipfast.list_models`.
        gpus: ranks.
        parallel: "ddp" or "fsdp". On one GPU both are the model alone.
        checkpointing: what the backward pass computes again: "none", "selective" or "full".
        precision: "amp_bf16", "pure_bf16" or "fp32", as of ``clipfast train``.
        opt: the optimizer, as of ``clipfast train``.
        has_ema: keep an average of the weights.
        reshards: FSDP2 frees a block after its forward pass, and gathers it again for its backward pass.
    """

    model: str
    gpus: int = 8
    parallel: str = "ddp"
    checkpointing: str = "none"
    precision: str = "amp_bf16"
    opt: str = "adamw"
    has_ema: bool = False
    reshards: bool = True

    @property
    def config(self) -> CLIPConfig:
        """The configuration of the model."""
        return get_model_config(self.model)

    @property
    def is_sharded(self) -> bool:
        """True if a rank holds only its part of the weights."""
        return self.parallel == "fsdp" and self.gpus > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products and of features."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights that the optimizer updates."""
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "amp_bf16")

    def optimizer(self, model: CLIP) -> torch.optim.Optimizer:
        """Return the trainer's optimizer of ``model``."""
        return make_optimizer(self.train_config, model)

    @property
    def train_config(self) -> TrainConfig:
        """The trainer's options that say the same."""
        return TrainConfig(
            train_data="synthetic:1", opt=self.opt, fsdp=self.is_sharded,
            fsdp_no_reshard_after_forward=self.is_sharded and not self.reshards,
        )  # fmt: skip


def groups(model: CLIP) -> tuple[list[Parameters], list[Parameters], Parameters]:
    """Return the parameters that FSDP2 gathers at a time: of each block of images, of each of texts, and all others.

    Scalars are never gathered.
    """
    of_texts = set(model.transformer.modules())
    images, texts = (
        [list(block.parameters()) for block in blocks_of(model) if (block in of_texts) == is_text]
        for is_text in (False, True)
    )
    known = {parameter for group in images + texts for parameter in group}
    return images, texts, [p for p in model.parameters() if p not in known and p.ndim > 0]


def local_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """Return the shape of the first rank's part of a parameter, which FSDP2 cuts along its first dimension."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape else ()


@contextlib.contextmanager
def staged(
    setup: Setup, config: CLIPConfig, card: Card | None, *, is_fake: bool = True, ledger_type: type[Ledger] = Ledger
) -> Iterator["Rank"]:
    """Yield a rank with its ledger open.

    Args:
        setup: what is trained.
        config: the setup's configuration of the model, or one with fewer blocks.
        card: the GPU that kernels are recorded for; None runs the kernels of the CPU.
        is_fake: build rank 0 of fake tensors, so that nothing is computed or sent; otherwise the rank of this process.
        ledger_type: the kind of ledger to keep.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with torch.device("meta"):
        model = build(config).to(setup.weight_dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if is_fake and setup.gpus > 1:
            dist.init_process_group("fake", rank=0, world_size=setup.gpus, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("cpu", (setup.gpus,)) if setup.is_sharded else None
        if is_fake:
            stack.enter_context(FakeTensorMode())
        launches = [] if card is None else stack.enter_context(record_launches(card.arch, card.multiprocessors))
        ledger = stack.enter_context(ledger_type(launches, CATEGORIES))
        stack.enter_context(ledger.following_resizes())
        yield Rank(setup, model, mesh, ledger)


class Rank:
    """What one rank holds from step to step.

    Args:
        setup: what is trained.
        model: on "meta", in the dtype of its weights.
        mesh: all ranks, if the weights are sharded.
        ledger: the ledger that is open, which is told what is what.
    """

    def __init__(self, setup: Setup, model: CLIP, mesh: Any, ledger: Ledger) -> None:
        self.setup, self.model, self.ledger = setup, model, ledger
        ledger.phase = "weights"
        model._apply(lambda meta: torch.zeros(meta.shape, dtype=meta.dtype))  # type: ignore[no-untyped-call]
        if mesh is not None:
            shard(setup.train_config, model, mesh)
        ledger.phase = "gradients"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ledger.phase = "optimizer state"
        self.optimizer = setup.optimizer(model)
        self.optimizer.step()
        self.trained: nn.Module = model
        if setup.gpus > 1 and not setup.is_sharded:
            self.optimizer.zero_grad()
            ledger.phase = "gradients"
            self.trained = data_parallel(model)
        ledger.phase = "average of weights"
        self.average = WeightAverage(model, 0.999) if setup.has_ema else None
        for name, forward, backward in (
            ("encode_image", IMAGE_FORWARD, IMAGE_BACKWARD),
            ("encode_text", TEXT_FORWARD, TEXT_BACKWARD),
            ("embed_text", TEXT_FORWARD, EMBEDDING_BACKWARD),
        ):
            setattr(model, name, self._marked(getattr(model, name), forward, backward))

    def set_checkpointing(self, checkpointing: str) -> None:
        """Choose what the backward pass computes again."""
        self.model.set_grad_checkpointing(checkpointing != "none", selective=checkpointing == "selective")

    def step(self, rows: int, micro_rows: int | None = None, *, is_whole: bool = False) -> None:
        """Compute the gradients of a batch.

        Args:
            rows: pairs of this rank.
            micro_rows: pairs whose activations are held at a time; None for all.
            is_whole: take the loss of all ranks and update the weights; otherwise a sum takes the place of the loss.
        """
        self.ledger.phase = INPUTS
        images = torch.zeros(rows, 3, *[self.model.visual.image_size] * 2, dtype=torch.uint8)
        texts = torch.zeros(rows, self.model.context_length, dtype=torch.long)
        self.ledger.begin()
        loss = functools.partial(self._loss, is_whole=is_whole)
        with self.setup.autocast():
            accumulate_gradients(self.trained, images, texts, micro_rows or rows, loss)
        if is_whole:
            self.ledger.phase = UPDATE
            self.optimizer.step()
            if self.average is not None:
                self.average.update(1, torch.zeros(()))
        self.ledger.book_launches()

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor, *, is_whole: bool) -> Tensor:
        self.ledger.phase = LOSS
        if not is_whole:
            return (image * text).sum() * scale
        if self.setup.gpus == 1:
            return contrastive_loss(image, text, scale)
        return distributed_contrastive_loss(image, text, scale, sizes=[len(image)] * self.setup.gpus)

    def _marked(self, function: Callable[..., Tensor], forward: str, backward: str) -> Callable[..., Tensor]:
        """Return ``function``, which tells the ledger when it and its backward pass begin."""

        def call(*args: Any, **options: Any) -> Tensor:
            self.ledger.phase = forward
            out = function(*args, **options)
            if out.requires_grad:
                out.register_hook(lambda _: setattr(self.ledger, "phase", backward))
            return out

        return call
