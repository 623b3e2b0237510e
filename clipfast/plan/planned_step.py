"""Run a training step of one rank, or the loss alone, on fake tensors to count its memory, FLOPs and communication.

A rank is built as ``clipfast train`` builds it: the model, FSDP2, the optimizer, the average of the weights.
:mod:`clipfast.train.fsdp` describes the sharding. DistributedDataParallel needs no wrapper here, since it changes only
the communication.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import backends, contrastive_loss, distributed_contrastive_loss
from ..kernels.hardware import Card
from ..kernels.launch import record_launches
from ..kernels.spec import lengths_of
from ..losses.accumulation import accumulate_gradients
from ..losses.clip_loss import ClipLoss
from ..models import CLIP, CLIPConfig, build, get_model_config, transformer
from ..models.packed_text import PackedText, pack_texts
from ..train.ema import WeightAverage
from ..train.fsdp import shard
from ..train.optim import make_optimizer
from ..train.train_config import TrainConfig
from .ledger import Ledger

PARALLELS = ("ddp", "fsdp")
CHECKPOINTINGS = ("none", "selective", "full")
# The phases of a step. In the backward passes, the text tower comes first.
IMAGE_FORWARD, TEXT_FORWARD, LOSS = "forward of images", "forward of texts", "loss"
TEXT_BACKWARD, EMBEDDING_BACKWARD, IMAGE_BACKWARD = "backward of texts", "backward of tokens", "backward of images"
UPDATE = "update"
# Categories of memory. CATEGORIES maps a phase to the category of the memory that it allocates, if the names differ.
INPUTS, IMAGES, TEXTS, SCRATCH = "inputs", "activations of images", "activations of texts", "backward scratch"
CATEGORIES = {
    IMAGE_FORWARD: IMAGES,
    TEXT_FORWARD: TEXTS,
    TEXT_BACKWARD: SCRATCH,
    EMBEDDING_BACKWARD: SCRATCH,
    IMAGE_BACKWARD: SCRATCH,
    UPDATE: "update scratch",
}
# The phases of a run of the loss alone, and the category of the memory that they allocate.
LOSS_FORWARD, LOSS_BACKWARD = "loss forward", "loss backward"
OF_LOSS = {LOSS_FORWARD: LOSS, LOSS_BACKWARD: LOSS}
OPENCLIP = "openclip"
LOGIT_SCALE = 14.3  # exp(logit_scale) at the start of training, 1 / 0.07


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a planned loss: the features of a batch, and the number of GPUs that share the batch."""

    pairs: int  # on all GPUs together; rounded up to a multiple of ``gpus``
    gpus: int = 1
    dtype: torch.dtype = torch.bfloat16
    embed_dim: int = 512

    @property
    def rows(self) -> int:
        """The number of pairs on one GPU in the plan."""
        return -(-self.pairs // self.gpus)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of the loss that can be planned for this number of GPUs."""
        return ("default", "min") if self.gpus == 1 else ("gather", "ring", "scalars")


@dataclasses.dataclass(frozen=True)
class Setup:
    """The options of a training step that determine its memory and time, apart from its batch size.

    Attributes:
        model: a name of :func:`clipfast.list_models`.
        gpus: the number of ranks.
        parallel: "ddp" or "fsdp". On one GPU, both mean the plain model.
        checkpointing: the activations that the backward pass recomputes: "none", "selective" or "full".
        precision: "amp_bf16", "amp_fp8", "pure_bf16" or "fp32", as in ``clipfast train``.
        fp8_recipe: the recipe of 8 bits for "amp_fp8".
        opt: the optimizer, as in ``clipfast train``.
        has_ema: whether an average of the weights is kept.
        reshards: whether FSDP2 frees a block after its forward pass, and gathers it again for its backward pass.
        captions: whether texts are packed and have the lengths of captions, 18 tokens on average; otherwise they are as
            long as the context.
    """

    model: str
    gpus: int = 8
    parallel: str = "ddp"
    checkpointing: str = "none"
    precision: str = "amp_bf16"
    opt: str = "adamw"
    has_ema: bool = False
    reshards: bool = True
    captions: bool = False
    fp8_recipe: str = "switchback"

    @property
    def config(self) -> CLIPConfig:
        """The configuration of the planned model."""
        return get_model_config(self.model)

    @property
    def is_sharded(self) -> bool:
        """True if FSDP2 shards the weights in the planned training, so that a rank holds only its part of them."""
        return self.parallel == "fsdp" and self.gpus > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products and of features in the planned step."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights that the optimizer of the planned step updates."""
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32

    @property
    def train_config(self) -> TrainConfig:
        """The options of ``clipfast train`` that build the optimizer and the shards of this setup."""
        return TrainConfig(
            train_data="synthetic:1", opt=self.opt, fsdp=self.is_sharded,
            fsdp_no_reshard_after_forward=self.is_sharded and not self.reshards,
        )  # fmt: skip


@contextlib.contextmanager
def silent_group(gpus: int, rank: int) -> Iterator[None]:
    """Make this process a rank of a default process group whose ``gpus`` ranks send each other nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _fake_processes(gpus: int, *, is_fake: bool, rank: int = 0) -> Iterator[None]:
    """Make this process a rank of a silent group, if ``is_fake`` and several GPUs are planned."""
    group = silent_group(gpus, rank) if is_fake and gpus > 1 else contextlib.nullcontext()
    # PyTorch deprecates fake tensors' addresses, and some gathers.
    with warnings.catch_warnings(action="ignore"), group:
        yield


@contextlib.contextmanager
def _whole_blocks() -> Iterator[None]:
    """Let one function compute a whole block, as in training, although the present modes see its ops on fake tensors.

    In 8 bits, such a block keeps other tensors than its modules do.
    """
    modes = backends.num_dispatch_modes()

    def is_watched() -> bool:
        """Return whether a mode of checkpointing has to see the ops of a block."""
        return backends.num_dispatch_modes() > modes

    with (
        mock.patch.object(backends, "PLAIN", (*backends.PLAIN, FakeTensor)),
        mock.patch.object(transformer, "is_watched", is_watched),
    ):
        yield


@contextlib.contextmanager
def _ledger_of(
    card: Card | None, categories: Mapping[str, str], ledger_type: type[Ledger], *, is_fake: bool
) -> Iterator[Ledger]:
    """Yield a ledger that records the ops inside this context; tensors made there are fake tensors if ``is_fake``."""
    with contextlib.ExitStack() as stack:
        if is_fake:
            # Packed texts are real tensors, since the ops read the lengths of the texts from their values.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        launches = [] if card is None else stack.enter_context(record_launches(card.arch, card.multiprocessors))
        ledger = stack.enter_context(ledger_type(launches, categories))
        stack.enter_context(ledger.following_resizes())
        yield ledger


def run_loss(
    problem: Problem, mode: str, card: Card | None, *, is_fake: bool = True, rank: int = 0,
    ledger_type: type[Ledger] = Ledger,
) -> Ledger:  # fmt: skip
    """Run the distributed contrastive loss and its backward pass on one rank, and return the ledger.

    Args:
        problem: the sizes of the loss.
        mode: one of ``problem.modes``, or "openclip".
        card: the GPU whose kernels are recorded, or None to run the CPU paths. Tensors are on the CPU in both cases,
            because PyTorch without CUDA computes no gradients of fake tensors on "cuda".
        is_fake: run ``rank`` on fake tensors without computing or sending anything; otherwise run this process's rank.
        rank: the rank to run; the highest rank is the last to get its gradients in the mode "gather".
        ledger_type: the class of the ledger, such as a sub-class that measures real memory.
    """
    with (
        _fake_processes(problem.gpus, is_fake=is_fake, rank=rank),
        _ledger_of(card, OF_LOSS, ledger_type, is_fake=is_fake) as ledger,
    ):
        ledger.phase = INPUTS
        shape = problem.rows, problem.embed_dim
        image, text = (F.normalize(torch.randn(shape), dim=-1).to(problem.dtype).requires_grad_() for _ in range(2))
        scale = torch.full((), LOGIT_SCALE, requires_grad=True)
        ledger.begin()
        ledger.phase = LOSS_FORWARD
        loss = _loss(problem, mode, image, text, scale)
        ledger.phase = LOSS_BACKWARD
        loss.backward()
        ledger.book_launches()
    return ledger


def _loss(problem: Problem, mode: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute the planned loss of one rank in a mode of clipfast, or as OpenCLIP computes it."""
    if mode == OPENCLIP:  # OpenCLIP's ClipLoss under autocast, which computes cross-entropies in float32
        rank = dist.get_rank() if problem.gpus > 1 else 0
        options = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=problem.gpus)
        labels = options.get_ground_truth(image.device, len(image))
        of_images, of_texts = options.get_logits(image, text, scale)
        return (F.cross_entropy(of_images.float(), labels) + F.cross_entropy(of_texts.float(), labels)) / 2
    if problem.gpus == 1:
        return contrastive_loss(image, text, scale, memory=mode)
    return distributed_contrastive_loss(image, text, scale, mode=mode, sizes=[problem.rows] * problem.gpus)


@contextlib.contextmanager
def rank_of(
    setup: Setup, config: CLIPConfig, card: Card | None, *, is_fake: bool = True, ledger_type: type[Ledger] = Ledger
) -> Iterator["Rank"]:
    """Yield a rank of a training, with a model of this ``config``, whose ledger records while the context is open.

    Args:
        setup: the model, optimizer and parallelism of the training.
        config: the setup's configuration of the model, or one with fewer blocks.
        card, is_fake, ledger_type: as for :func:`run_loss`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    with torch.device("meta"):
        model = build(config).to(setup.weight_dtype)
    if setup.precision == "amp_fp8":
        model.set_fp8(setup.fp8_recipe)
    with _fake_processes(setup.gpus, is_fake=is_fake):
        mesh = init_device_mesh("cpu", (setup.gpus,)) if setup.is_sharded else None
        is_whole = setup.precision == "amp_fp8" and is_fake and card is not None
        with (
            _ledger_of(card, CATEGORIES, ledger_type, is_fake=is_fake) as ledger,
            _whole_blocks() if is_whole else contextlib.nullcontext(),
        ):
            yield Rank(setup, model, mesh, ledger)


@functools.lru_cache(maxsize=16)
def captions_of(pairs: int, most: int) -> PackedText:
    """Return ``pairs`` packed texts of at most ``most`` tokens with lengths of real captions, for a planned step.

    They are real tensors even under a fake mode, since their values give the number of tokens.
    """
    with _disable_current_modes():
        texts = torch.zeros(pairs, most, dtype=torch.long)
        for text, length in zip(texts, lengths_of(pairs, most), strict=True):
            text[length - 1] = 1
        return pack_texts(texts, for_gpu=True)


class Rank:
    """One rank of a training on fake tensors: its model, optimizer and weight average, whose memory a ledger records.

    Args:
        setup: the model, optimizer and parallelism of the training.
        model: the model on the device "meta", in the dtype of its weights.
        mesh: the mesh of all ranks, if the weights are sharded.
        ledger: the open ledger; the rank sets its phase.
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
        self.optimizer = make_optimizer(setup.train_config, model)
        self.optimizer.step()
        ledger.phase = "average of weights"
        self.average = WeightAverage(model, 0.999) if setup.has_ema else None
        self.trained: nn.Module = model
        for name, forward, backward in (
            ("encode_image", IMAGE_FORWARD, IMAGE_BACKWARD),
            ("encode_text", TEXT_FORWARD, TEXT_BACKWARD),
            ("embed_text", TEXT_FORWARD, EMBEDDING_BACKWARD),
        ):
            setattr(model, name, self._marked(getattr(model, name), forward, backward))

    def set_checkpointing(self, checkpointing: str) -> None:
        """Choose which activations the planned backward pass recomputes: "none", "selective" or "full"."""
        self.model.set_grad_checkpointing(checkpointing != "none", selective=checkpointing == "selective")

    def step(self, rows: int, micro_rows: int | None = None, *, is_whole: bool = False) -> None:
        """Run the planned training step: compute the gradients of a batch and, if ``is_whole``, update the weights.

        Args:
            rows: pairs of this rank.
            micro_rows: pairs whose activations are held at a time; None for all.
            is_whole: compute the loss of all ranks and update the weights; otherwise a sum of products of the features
                replaces the loss, and no weight changes.
        """
        self.ledger.phase = INPUTS
        images = torch.zeros(rows, 3, *[self.model.visual.image_size] * 2, dtype=torch.uint8)
        length = self.model.context_length
        texts: Any = captions_of(rows, length) if self.setup.captions else torch.zeros(rows, length, dtype=torch.long)
        self.ledger.begin()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setup.precision.startswith("amp")):
            loss = functools.partial(self._loss, is_whole=is_whole)
            accumulate_gradients(self.trained, images, texts, micro_rows or rows, loss)
        if is_whole:
            self.update()
        self.ledger.book_launches()

    def update(self) -> None:
        """Run the optimizer step and update the weight average, which end the planned training step."""
        self.ledger.phase = UPDATE
        self.optimizer.step()
        if self.average is not None:
            self.average.update(1, torch.zeros(()))

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor, *, is_whole: bool) -> Tensor:
        """Compute the planned loss of all ranks or, if not ``is_whole``, a sum of products of the features."""
        self.ledger.phase = LOSS
        if not is_whole:
            return (image * text).sum() * scale
        if self.setup.gpus == 1:
            return contrastive_loss(image, text, scale)
        return distributed_contrastive_loss(image, text, scale, sizes=[len(image)] * self.setup.gpus)

    def _marked(self, function: Callable[..., Tensor], forward: str, backward: str) -> Callable[..., Tensor]:
        """Return a version of ``function`` that sets the ledger's phase when it and its backward pass begin."""

        def call(*args: Any, **options: Any) -> Tensor:
            """Call ``function`` in the phase ``forward``; its backward pass starts the phase ``backward``."""
            self.ledger.phase = forward
            out = function(*args, **options)
            if out.requires_grad:
                out.register_hook(lambda _: setattr(self.ledger, "phase", backward))
            return out

        return call
