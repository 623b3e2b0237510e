"""One step of training on a device: upload, forward, loss, backward and optimizer, as a CUDA graph on request."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ..data import Batch
from ..data.order import random_words
from ..distributed.world import ALONE, World
from ..losses.accumulation import accumulate_gradients, largest_micro_batch, micro_batches
from ..models import CLIP
from ..models.packed_images import PackedImages, pack_images
from ..models.packed_text import PackedText
from .fsdp import exchange_scalars
from .graphs import graphed
from .guard import Guard, GuardedLoss
from .logs import log

# The images of a batch: uint8 [B, 3, H, W], or a list of the packed images of each micro-batch.
Images = Tensor | list[PackedImages]
# The texts of a batch: token ids [B, L], packed texts, or a list with one of these two for each micro-batch.
Texts = Tensor | PackedText | list[Tensor | PackedText]
MAX_GRAPHS = 8


class Upload:
    """Copies training batches to the GPU on a CUDA stream of its own, while the previous step may still run.

    Args:
        device: the device.
        pack: packs the texts of a micro-batch on the host; None leaves texts as they are.
    """

    def __init__(self, device: torch.device, pack: Callable[[Tensor], Tensor | PackedText] | None = None) -> None:
        self.device, self._pack = device, pack
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch, micro_batch_size: int | None = None) -> tuple[Images, Texts]:
        """Return images (uint8) and texts of ``batch`` on the device. For a GPU, ``batch`` must be in pinned memory.

        Packed texts, and packed images of several sizes, are packed separately for each micro-batch. Packed images are
        a list even if there is only one micro-batch.
        """
        size = micro_batch_size or len(batch)
        texts: Texts = batch.texts
        if self._pack is not None:
            parts = [self._pack(part) for part in batch.texts.split(size)]
            texts = parts[0] if len(parts) == 1 else parts
        if self._stream is None:
            return self._on_device(batch, texts, size)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            images, texts = self._on_device(batch, texts, size)
        current.wait_stream(self._stream)
        for x in pytree.tree_leaves((images, texts)):
            x.record_stream(current)  # keeps the allocator from reusing the memory before the step has read it
        return images, texts

    def _on_device(self, batch: Batch, texts: Texts, size: int) -> tuple[Images, Texts]:
        """Copy images and texts of a training batch to the device; packed images become micro-batches of ``size``."""
        if isinstance(batch.images, PackedImages):
            parts = self._split(batch.images, size)
            images: Any = [part.to(self.device, non_blocking=True) for part in parts]
        else:
            images = batch.images_on(self.device)
        if self.device.type == "cpu":
            return images, texts
        return images, pytree.tree_map(lambda x: x.to(self.device, non_blocking=True), texts)

    def _split(self, images: PackedImages, size: int) -> list[PackedImages]:
        """Return packed images as micro-batches of ``size`` images, in pinned memory if they go to a GPU."""
        parts = images.split(size, for_gpu=self.device.type != "cpu")
        return [part.pin_memory() for part in parts] if self.device.type == "cuda" and len(parts) > 1 else parts


class TrainingStep:
    """A training step: computes the gradients of a batch and updates the weights.

    Args:
        model, optimizer: the model must be in training mode when a step is taken.
        loss: the loss function, as :func:`clipfast.accumulate_gradients` takes it.
        autocast: a function that returns the autocast context of the forward pass.
        grad_clip_norm: largest norm of the gradient; None does not clip it.
        micro_batch_size: number of pairs whose activations are held at a time; if images come as a list, its elements
            are the micro-batches.
        parallel: the wrapped model, which is called in place of ``model`` if there are several processes.
        shards: the processes over which FSDP2 has sharded the weights; None without FSDP2.
        loss_scale: returns the factor on the gradients for the number of pairs of this process; None for no factor.

    Attributes:
        guard: decides whether a step changes weights (only if its gradient is finite), and holds the step's metrics.
    """

    def __init__(
        self,
        model: CLIP,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        autocast: Callable[[], torch.autocast],
        grad_clip_norm: float | None,
        micro_batch_size: int,
        parallel: nn.Module | None = None,
        shards: World | None = None,
        loss_scale: Callable[[int], float] | None = None,
    ) -> None:
        self.parallel, self.shards = parallel or model, shards
        self.model, self.optimizer, self.loss = model, optimizer, GuardedLoss(loss, loss_scale)
        self.autocast, self.micro_batch_size = autocast, micro_batch_size
        self.guard = Guard(model, optimizer, grad_clip_norm)
        self.is_updating = False  # True while weights are updated; still True if an error has left them half updated

    def __call__(self, images: Images, texts: Texts) -> Tensor:
        """Take a training step, and return the loss of its batch before the update, a scalar without a graph."""
        self._zero_gradients(images, texts)
        self.guard.begin()
        loss = self.backward(images, texts)
        self.guard.judge(loss)
        self.is_updating = True
        self.guard.step()
        self.model.clamp_logit_scale()
        self.is_updating = False
        return loss

    def backward(self, images: Images, texts: Texts) -> Tensor:
        """Add the gradients of a training batch to ``.grad`` and return its loss, a scalar without a graph.

        With FSDP2, this also averages the gradients of logit scale and bias over the ranks.
        """
        loss = self._backward(images, texts)
        if self.shards is not None:
            exchange_scalars(self.model, self.shards)
        return loss

    def _backward(self, images: Images, texts: Texts) -> Tensor:
        """Run forward and backward on a training batch, in micro-batches if it exceeds their size; return its loss."""
        first, *others = micro_batches(images, texts, self.micro_batch_size)
        if others:
            with self.autocast():
                return accumulate_gradients(self.parallel, images, texts, self.micro_batch_size, self.loss)
        with self.autocast():
            loss = self.loss(*self.parallel(*first))
        loss.backward()
        return loss.detach()

    def _zero_gradients(self, images: Images, texts: Texts) -> None:
        """Reset all gradients before the backward pass of a training batch.

        DistributedDataParallel's gradients are views of its communication buckets, and are set to zero in place if
        micro-batches are summed. If they were set to None, the sums would take memory of their own beside the buckets,
        which only the last micro-batch would use.
        """
        is_ddp = isinstance(self.parallel, DistributedDataParallel)
        has_sums = is_ddp and len(micro_batches(images, texts, self.micro_batch_size)) > 1
        self.optimizer.zero_grad(set_to_none=not has_sums)

    def rehearse(self, images: Images, texts: Texts) -> None:
        """Run a backward pass of a micro-batch before the first training step, and discard its gradients.

        DistributedDataParallel changes the order of gradients in its buckets after its first backward pass, and the
        rounding of sums over more than two ranks depends on the position in a bucket. The first backward pass of a
        session is therefore not used for a step: otherwise a resumed run would round differently from one that never
        stopped. After this pass, gradients are views of the buckets.
        """
        before = [buffer.clone() for buffer in self.model.buffers()]
        part = micro_batches(images, texts, self.micro_batch_size)[0]
        with self.autocast():
            outputs = self.parallel(*part)
        torch.stack([output.float().sum() for output in outputs if output is not None]).sum().backward()
        self._zero_gradients(images, texts)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def fit_micro_batch(
        self, sizes: Mapping[int | None, int], loss: Callable[..., Tensor], world: World = ALONE
    ) -> None:
        """Halve the micro-batch until it fits into the memory of every GPU, and log the size that was found.

        Args:
            sizes: number of pairs of this process by sequence length: the most patches of an image for NaFlex, None for
                images of one size. The longest and the shortest images are tried, as batches of the shortest have the
                most texts; the size that is found is for the longest.
            loss: a loss of the pairs of one process, without communication: if this GPU runs out of memory, no other
                rank may be left waiting for it.
            world: the processes.
        """
        how, longest = "a CPU does not say what fits: nothing was tried", max(sizes, key=length_of)
        device = self.model.logit_scale.device
        if _can_run_out(device):
            weights = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
            self.model.train()
            for seq_len in dict.fromkeys((longest, min(sizes, key=length_of))):
                start = min(at_once(self.micro_batch_size, longest, seq_len), sizes[seq_len])
                with self.autocast():
                    found = largest_micro_batch(
                        self.model, *_largest(self.model, sizes[seq_len], seq_len), loss, start=start,
                        reserve=0 if self.optimizer.state else 2 * weights,  # bytes of AdamW's moments
                    )  # fmt: skip
                if found < start:
                    self.micro_batch_size = max(found * length_of(seq_len) // length_of(longest), 1)
            how = "the most that was found to fit"
        everyones = world.gather(self.micro_batch_size)
        found = self.micro_batch_size = world.on_main(lambda: min(everyones))
        whole = sizes[longest]
        pairs = f"{found} of {whole} pairs" if found < whole else f"the whole batch of {whole} pairs"
        pairs += "" if longest is None else f" with up to {longest} patches each"
        log.info(f"--micro-batch-size auto: {pairs} at a time ({how})")


def at_once(size: int, longest: int | None, seq_len: int | None) -> int:
    """Return the number of pairs of a training micro-batch whose images have up to ``seq_len`` patches.

    It has as many patches as a micro-batch of ``size`` pairs with ``longest`` patches each. ``longest`` and ``seq_len``
    are None for images of one size.
    """
    return size if seq_len == longest else size * length_of(longest) // length_of(seq_len)


def length_of(seq_len: int | None) -> int:
    """Return the number of patches ``seq_len`` of a training batch; 1 for None, which stands for images of one size."""
    return seq_len or 1


def _largest(model: CLIP, pairs: int, seq_len: int | None) -> tuple[Any, Tensor]:
    """Return zero images of ``seq_len`` patches each (None: of the model's size) and texts of the longest length.

    They need as much memory as the largest training batch of ``pairs`` pairs.
    """
    device, size = model.logit_scale.device, model.visual.image_size
    shape = (size, size)
    if seq_len is not None:
        shape = model.visual.patch_size, model.visual.patch_size * seq_len
    images: Any = torch.zeros(pairs, 3, *shape, dtype=torch.uint8, device=device)
    if seq_len is not None:
        images = pack_images(images, model.visual.patch_size, for_gpu=device.type != "cpu")
    texts = torch.zeros(pairs, model.context_length, dtype=torch.long, device=device)
    texts[:, -1] = model.vocab_size - 1  # with the end-of-text token at the end, every text has the full length
    return images, texts


def _can_run_out(device: torch.device) -> bool:
    """Return True if PyTorch raises an error when the memory of ``device`` runs out; on a CPU the process is killed."""
    return device.type == "cuda"


def seed_step(seed: int, model: CLIP, pairs: int, rank: int) -> None:
    """Seed PyTorch's random number generators for a training step, so that each rank draws other numbers.

    On a CPU, each pair of the batch gets the random numbers that it would get in a run of one process: the numbers of
    the pairs of lower ranks are drawn and discarded. This does not work on a GPU, whose random numbers depend on the
    size of each draw, so there each rank has a seed of its own.

    Args:
        seed: seed of the step.
        model: the model, in which only the vision transformer draws random numbers, for the patches that it drops.
        pairs: number of pairs of each rank.
        rank: rank of this process.
    """
    torch.manual_seed(seed)
    visual: Any = model.visual
    if rank == 0 or not getattr(visual, "patch_dropout", 0):
        return
    if model.logit_scale.device.type == "cpu":
        grid = (visual.trunk if hasattr(visual, "trunk") else visual).grid_size
        torch.rand(rank * pairs, grid[0] * grid[1])
    else:
        torch.manual_seed(int(random_words(1, seed, rank)[0]) >> 1)


def graphed_step(step: Callable[[Any, Any], Tensor], context_length: int) -> Callable[[Any, Any], Tensor]:
    """Return ``step`` with a CUDA graph for each batch shape, for the first ``MAX_GRAPHS`` shapes that are seen often.

    The number of tokens of packed texts is rounded up (:func:`clipfast.models.packed.rounded`), so that batches
    have few different shapes. Texts that are not packed are padded to ``context_length``.
    """
    replayed = graphed(step, max_graphs=MAX_GRAPHS)

    def take(images: Images, texts: Tensor | PackedText) -> Tensor:
        """Run a training step on a batch, by the CUDA graph for its shape if there is one."""
        if isinstance(texts, Tensor):
            texts = F.pad(texts, (0, context_length - texts.shape[1]))
        return replayed(images, texts)

    return take
