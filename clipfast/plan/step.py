"""One training step of one rank, run for what it takes: on fake tensors, or on real ones to check the fake ones."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from ..accumulation import accumulate_gradients
from ..factory import create_model
from ..kernels import contrastive_loss, distributed_contrastive_loss
from ..kernels.hardware import Card
from ..kernels.launch import record_launches
from ..ledger import Ledger
from ..losses import ClipLoss
from ..models import CLIP
from ..training.optim import adamw

FORWARD, LOSS_FORWARD, LOSS_BACKWARD = "forward", "loss forward", "loss backward"
BACKWARD, UPDATE = "backward", "update"
# The phases of a step, and the category of memory that the tensors of each belong to.
PHASES = {
    FORWARD: "activations",
    LOSS_FORWARD: "loss",
    LOSS_BACKWARD: "loss",
    BACKWARD: "activation gradients",
    UPDATE: "update scratch",
}
OPENCLIP = "openclip"
LOGIT_SCALE = 14.3
SETTLE_S = 0.01  # after this time, gloo has let go of a block that has arrived


@dataclasses.dataclass(frozen=True)
class Problem:
    """A batch, the GPUs that share it, and what is trained on it."""

    pairs: int  # of all GPUs; every GPU holds as many, so they are rounded up to a multiple of ``gpus``
    gpus: int = 1
    dtype: torch.dtype = torch.bfloat16  # of the features, and with a model that of autocast
    model: str | None = None  # a name of :func:`clipfast.list_models`; None runs the loss alone
    embed_dim: int = 512

    @property
    def rows(self) -> int:
        """Pairs of one GPU."""
        return -(-self.pairs // self.gpus)

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of the loss that there are on so many GPUs."""
        return ("default", "min") if self.gpus == 1 else ("gather", "ring", "scalars")


def run_step(
    problem: Problem, mode: str, card: Card | None, *, is_fake: bool = True, ledger_type: type[Ledger] = Ledger
) -> Ledger:
    """Run a step of one rank, and return its ledger.

    Args:
        problem: what to run.
        mode: one of ``problem.modes``, or "openclip".
        card: the GPU that kernels are recorded for. Tensors are on the CPU all the same, because PyTorch without CUDA
            computes no gradients of fake tensors on "cuda". None runs the kernels of the CPU.
        is_fake: run rank 0 on fake tensors, so that nothing is computed or sent; otherwise the rank of this process.
        ledger_type: the kind of ledger to keep.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = None if problem.model is None else create_model(problem.model, device="meta")
    with contextlib.ExitStack() as stack:
        # the address of a fake tensor, and a gather of PyTorch, are deprecated
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if is_fake and problem.gpus > 1:
            dist.init_process_group("fake", rank=0, world_size=problem.gpus, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        if is_fake:
            stack.enter_context(FakeTensorMode())
        launches = [] if card is None else stack.enter_context(record_launches(card.arch, card.multiprocessors))
        ledger = stack.enter_context(ledger_type(launches, PHASES))
        loss = functools.partial(_loss, ledger, problem, mode)
        if model is None:
            ledger.settle_s = 0.0 if is_fake else SETTLE_S
            _loss_step(problem, loss, ledger)
        else:
            _model_step(problem, model, loss, ledger)
        ledger.book_launches()
    return ledger


def _loss_step(problem: Problem, loss: Callable[..., Tensor], ledger: Ledger) -> None:
    ledger.phase = "inputs"
    shape = problem.rows, problem.embed_dim
    image, text = (F.normalize(torch.randn(shape), dim=-1).to(problem.dtype).requires_grad_() for _ in range(2))
    scale = torch.full((), LOGIT_SCALE, requires_grad=True)
    ledger.begin()
    loss(image, text, scale).backward()


def _model_step(problem: Problem, model: CLIP, loss: Callable[..., Tensor], ledger: Ledger) -> None:
    """Make everything that lives from step to step, then take one step."""
    ledger.phase = "weights"
    model._apply(lambda meta: torch.zeros(meta.shape, dtype=meta.dtype))  # type: ignore[no-untyped-call]
    ledger.phase = "optimizer state"
    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
    optimizer.step()
    optimizer.zero_grad()
    ledger.phase = "gradients"
    trained = model if problem.gpus == 1 else data_parallel(model)
    ledger.phase = "inputs"
    images = torch.zeros(problem.rows, 3, *[model.visual.image_size] * 2, dtype=torch.uint8)
    texts = torch.zeros(problem.rows, model.context_length, dtype=torch.long)
    ledger.begin()
    ledger.phase = FORWARD
    with torch.autocast("cpu", problem.dtype, enabled=problem.dtype != torch.float32):
        accumulate_gradients(trained, images, texts, problem.rows, loss)
    ledger.phase = UPDATE
    optimizer.step()


def data_parallel(model: CLIP) -> DistributedDataParallel:
    """Return DDP of ``model`` as it is after its first step, for real processes or for those that are not there."""
    # DDP has one bucket in its first step, and buckets of 1 and 25 MiB later: the only step here is like a later one.
    # init_sync would read the weights. The default hook does not know the backend "fake"; this one does the same.
    name = "_compute_bucket_assignment_by_size"
    assign = getattr(dist, name)
    with mock.patch.object(dist, name, lambda tensors, _, *rest: assign(tensors, [2**20, 25 * 2**20], *rest)):
        parallel = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    parallel.register_comm_hook(None, _all_reduce_mean)
    return parallel


def _all_reduce_mean(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    gradients = bucket.buffer().div_(dist.get_world_size())
    dist.all_reduce(gradients)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients)
    return future


def _loss(ledger: Ledger, problem: Problem, mode: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss, and tell the ledger when it and its backward pass begin and end."""
    ledger.phase = LOSS_FORWARD
    if mode == OPENCLIP:  # its ClipLoss under autocast, which takes cross-entropies in float32
        rank = dist.get_rank() if problem.gpus > 1 else 0
        options = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=problem.gpus)
        labels = options.get_ground_truth(image.device, len(image))
        of_images, of_texts = options.get_logits(image, text, scale)
        value = (F.cross_entropy(of_images.float(), labels) + F.cross_entropy(of_texts.float(), labels)) / 2
    elif problem.gpus == 1:
        value = contrastive_loss(image, text, scale, memory=mode)
    else:
        value = distributed_contrastive_loss(image, text, scale, mode=mode, sizes=[problem.rows] * problem.gpus)
    if problem.model is not None:
        for features in (image, text):
            features.register_hook(lambda _: setattr(ledger, "phase", BACKWARD))
    ledger.phase = LOSS_BACKWARD
    return value
