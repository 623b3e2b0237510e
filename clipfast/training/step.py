"""One step of training on a device: forward, loss, backward and AdamW; as one CUDA graph if asked for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accumulation import accumulate_gradients
from ..data import Batch
from ..models import CLIP

WARMUP_STEPS = 3  # outside the graph: what is allocated or compiled once is there when it is captured

Step = Callable[[Tensor, Tensor], Tensor]


class Upload:
    """Batches to a device, on a stream of their own: a batch is copied while the step before it still runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images, as bytes, and texts of ``batch``; they lie in pinned memory if the device is a GPU."""
        if self._stream is None:
            return batch.images.to(self.device), batch.texts.to(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            images, texts = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.texts))
        current.wait_stream(self._stream)
        for x in (images, texts):
            x.record_stream(current)  # its memory belongs to the other stream, which must not use it again too early
        return images, texts


class TrainingStep:
    """Gradients of a batch, and the update of the weights.

    Args:
        model: in training mode when it is called.
        optimizer: of its parameters.
        loss: as :func:`clipfast.accumulate_gradients` takes it.
        autocast: makes the context of the forward pass.
        grad_clip_norm: as the option of ``clipfast train``.
        micro_batch_size: pairs at a time; may be set later.
    """

    def __init__(
        self,
        model: CLIP,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        autocast: Callable[[], torch.autocast],
        grad_clip_norm: float | None,
        micro_batch_size: int,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.autocast, self.grad_clip_norm, self.micro_batch_size = autocast, grad_clip_norm, micro_batch_size

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Take a step; returns the loss before it."""
        self.optimizer.zero_grad()
        with self.autocast():
            loss = accumulate_gradients(self.model, images, texts, self.micro_batch_size, self.loss)
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip_norm)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        return loss


class GraphedStep:
    """A step as one CUDA graph, so that the host starts one thing in place of a thousand kernels.

    The first calls run as they are. Then the step is captured, and replayed for every batch of that many pairs; another
    number of pairs, where some could not be decoded, runs as it is.

    Args:
        step: reads nothing from the host that changes from call to call: learning rates are tensors.
        context_length: texts are padded to it, so that every batch has one shape.
    """

    def __init__(self, step: Step, context_length: int) -> None:
        self.step, self.context_length = step, context_length
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Take a step; returns the loss before it."""
        texts = F.pad(texts, (0, self.context_length - texts.shape[1]))
        if self._inputs is None and self._calls < WARMUP_STEPS:
            self._calls += 1
            return self._beside(images, texts)
        if self._inputs is None:
            self._inputs = images.clone(), texts.clone()
            self._replay, self._loss = self._capture(*self._inputs)
        if images.shape != self._inputs[0].shape:
            return self.step(images, texts)
        for static, new in zip(self._inputs, (images, texts), strict=True):
            static.copy_(new)
        self._replay()
        return self._loss.clone()

    def _beside(self, images: Tensor, texts: Tensor) -> Tensor:
        """Run on a stream that is not the default one, on which nothing can be captured."""
        self._stream = self._stream or torch.cuda.Stream(images.device)
        current = torch.cuda.current_stream(images.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self.step(images, texts)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, images: Tensor, texts: Tensor) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(images, texts)
        return graph.replay, loss
