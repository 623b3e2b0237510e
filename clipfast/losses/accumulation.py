"""Exact gradients of a large batch in the memory of a micro-batch (GradCache: Gao et al. 2021).

Plain gradient accumulation, which sums the gradients of the micro-batches' losses, would lose the negatives between
them.

With micro-batches X_k, features F_k = f(X_k; w), scale s and the loss L of all features at once:

    pass 1, without a graph      F_k = f(X_k; w)
    loss                         L(F_1, ..., F_n, s),  G_k = dL/dF_k,  dL/ds
    pass 2, one graph at a time  f(X_k; w) again, backward from G_k:  dL/dw = sum_k G_k dF_k/dw

This is the chain rule, and it is exact if pass 2 computes the same features as pass 1. Therefore pass 2 draws the same
random numbers and starts from the same buffers. The cost is one more forward pass. Memory holds the activations of one
micro-batch, and the features and their gradients, [B, D] each, of the whole batch.

The loss and its gradients always equal those of L(f(X_1), ..., f(X_n)) in one graph. They also equal those of the whole
batch, L(f(X)), if f computes the features of a pair independently of other pairs:

    layer normalisation, attention, ...      yes
    BatchNorm in eval mode, or frozen        yes
    BatchNorm in train mode                  no: each micro-batch is normalised by its own statistics ("ghost batch
                                             normalisation", Hoffer et al. 2017), as each GPU would do with its share
    dropout, patch dropout, random depth     in distribution: random numbers are drawn micro-batch by micro-batch, so
                                             from the same seed a whole batch draws other numbers

Running statistics are updated once per micro-batch, in order, as in one pass over the micro-batches.
"""

from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..kernels import contrastive_loss

OUTPUTS = ("image_features", "text_features", "logit_scale", "logit_bias")


def accumulate_gradients(
    model: nn.Module, images: Any, texts: Any, micro_batch_size: int,
    loss: Callable[..., Tensor] = contrastive_loss, *, loss_scale: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """Compute ``loss(*model(images, texts)).backward()`` with the activations of only one micro-batch at a time.

    Gradients are added to ``.grad``. Afterwards, random number generators and buffers have the state that one forward
    pass over the micro-batches would leave. Call it inside ``torch.autocast`` if the model is to run under autocast;
    backward passes run outside. If one micro-batch holds the whole batch, the plain expression above is computed.

    ``DistributedDataParallel`` exchanges gradients in the last micro-batch only. The loss may be distributed
    (``distributed_contrastive_loss``, ``ClipLoss``), since it gets all features of this rank at once.

    Args:
        model: is called with images and texts of a micro-batch. It returns (image_features, text_features,
            logit_scale) and perhaps logit_bias, as a tuple or as a dict with these names. Scale and bias must be the
            same for every micro-batch. All state that its forward pass changes must be in buffers.
        images: [B, ...] or packed images; or a list of the images of each micro-batch, as the model takes them.
        texts: [B, ...]; or a list of the texts of each micro-batch, as the model takes them, such as packed texts.
        micro_batch_size: number of pairs in a micro-batch, at least 1; the last micro-batch may be smaller. If images
            are a list, its elements are the micro-batches, whatever this number is.
        loss: a ``ClipLoss``, a ``SigLipLoss`` or any function that maps the outputs of the model for all B pairs, in
            the order above, to one number. Parameters of the loss get their gradients as well.
        loss_scale: a factor for all gradients, such as ``scaler.scale(torch.ones((), ...))`` of a ``GradScaler``.

    Returns the loss, without ``loss_scale`` and without a graph.

    Raises:
        ValueError: if there are no pairs, not as many images as texts, a micro-batch size below 1, or a model that
            does not return one feature per image and text.
        TypeError: if the model returns something else, or the loss is not a tensor of one element.
    """
    parts = micro_batches(images, texts, micro_batch_size)
    if len(parts) == 1:
        return _loss_backward(loss, _outputs(model(*parts[0])), loss_scale)
    devices = _accelerators(model, parts[0][0])
    before, random_states, features = _Buffers(model), [], []
    with torch.no_grad():
        for part in parts:
            random_states.append(_random_state(devices))
            features.append(_outputs(model(*part)))
    torch.clear_autocast_cache()  # pass 2 must not reuse casts of weights that have no graph
    after = _Buffers(model)
    sizes = [len(part[0]) for part in parts]
    inputs = _join(features, sum(sizes))
    value = _loss_backward(loss, inputs, loss_scale)
    random_after = _random_state(devices)
    gradients = _gradients(inputs, sizes)
    before.restore()
    try:
        for index, (part, state) in enumerate(zip(parts, random_states, strict=True)):
            _set_random_state(devices, state)
            with _without_exchange(model, when=index < len(parts) - 1):
                _backward_from(model(*part), gradients[index])
            # Without this call, autocast would reuse the casts of weights in the next micro-batch. Their gradients
            # would then come at the end of its backward pass, after FSDP2 has reduced the gradients of each block, and
            # would be lost.
            torch.clear_autocast_cache()
    finally:
        after.restore()
        _set_random_state(devices, random_after)
    return value


def largest_micro_batch(
    model: nn.Module,
    images: Any,
    texts: Tensor,
    loss: Callable[..., Tensor] = contrastive_loss,
    *,
    start: int | None = None,
    reserve: int = 0,
) -> int:
    """Find by trying the largest micro-batch size for which :func:`accumulate_gradients` fits into the memory of a GPU.

    The search starts at ``start`` and halves the size at each ``torch.cuda.OutOfMemoryError``. Afterwards, gradients,
    buffers and random number generators are as before the search. With several processes, call this function before
    ``DistributedDataParallel`` wraps the model, and use the smallest result.

    Args:
        model: the model as it will be trained, under the same autocast.
        images: [B, ...] or packed images, a whole batch of the largest shape that will occur; values do not matter.
        texts: [B, ...], as for ``images``; a model that leaves out padding needs the longest texts that will occur.
        loss: as for :func:`accumulate_gradients`.
        start: the first size to try; the whole batch if it is None.
        reserve: bytes to leave free for what the first step allocates, such as the moments of the optimizer.

    Raises:
        torch.cuda.OutOfMemoryError: if not even one pair at a time fits.
        ValueError, TypeError: as for :func:`accumulate_gradients`.
    """
    size = len(images) if start is None else start
    micro_batches(images, texts, size)
    devices = _accelerators(model, images)
    buffers, random_state = _Buffers(model), _random_state(devices)
    gradients = [(parameter, parameter.grad) for parameter in _parameters(model, loss)]
    held = torch.empty(reserve, dtype=torch.uint8, device=images.device)
    try:
        while not _fits(model, images, texts, size, loss):
            size = (size + 1) // 2
        return size
    finally:
        del held
        for parameter, gradient in gradients:
            parameter.grad = gradient
        buffers.restore()
        _set_random_state(devices, random_state)


def _fits(model: nn.Module, images: Tensor, texts: Tensor, size: int, loss: Callable[..., Tensor]) -> bool:
    """Return True if the gradients with micro-batches of ``size`` pairs fit into memory."""
    for parameter in _parameters(model, loss):
        parameter.grad = None
    try:
        accumulate_gradients(model, images, texts, size, loss)
    except torch.cuda.OutOfMemoryError:
        if size == 1:
            raise
    else:
        return True
    # The cache is emptied after the except clause, since in it the exception's traceback still holds tensors.
    torch.cuda.empty_cache()
    return False


def _parameters(model: nn.Module, loss: Callable[..., Tensor]) -> list[nn.Parameter]:
    """Return the parameters of the model and the loss that get accumulated gradients."""
    return [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]


def micro_batches(images: Any, texts: Any, size: int) -> list[tuple[Any, Any]]:
    """Return the images and the texts of each micro-batch of ``size`` pairs; the last one may be smaller.

    Images are [B, ...] or packed images, and texts [B, ...]; or either is a list with an element per micro-batch.

    Raises:
        ValueError: there are no pairs, or not as many images as texts, or the size is below 1.
    """
    if size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {size}")
    parts = images if isinstance(images, list | tuple) else images.split(size)
    wanted = [*map(len, parts)]
    if not sum(wanted) or (isinstance(texts, Tensor) and sum(wanted) != len(texts)):
        raise ValueError(f"images and texts must be equally many, at least one, got {sum(wanted)} and {len(texts)}")
    listed = texts if isinstance(texts, list | tuple) else [texts]
    of_texts = texts.split(wanted) if isinstance(texts, Tensor) else listed
    given = [*map(_count, of_texts)]
    if len(given) != len(wanted) or (
        given != wanted and any(found not in (None, n) for found, n in zip(given, wanted, strict=True))
    ):
        raise ValueError(f"micro-batches of {wanted} images need texts of as many micro-batches and pairs, got {given}")
    return list(zip(parts, of_texts, strict=True))


def _count(texts: Any) -> int | None:
    """Return the number of texts of a micro-batch; None for a mapping, whose length is its number of keys."""
    return len(texts) if isinstance(texts, Sized) and not isinstance(texts, Mapping) else None


def _outputs(output: Any) -> tuple[Any, ...]:
    """Check a model's output and return it as a tuple (image_features, text_features, logit_scale[, logit_bias])."""
    found = tuple(output[name] for name in OUTPUTS if name in output) if isinstance(output, Mapping) else output
    if not isinstance(found, (tuple, list)) or len(found) not in (3, 4) or found[2] is None:
        raise TypeError(
            f"the model must return {', '.join(OUTPUTS[:3])} and perhaps {OUTPUTS[3]}, got {type(output).__name__}"
        )
    if not isinstance(found[0], Tensor) or not isinstance(found[1], Tensor):
        kinds = ", ".join(type(one).__name__ for one in found)
        raise TypeError(f"the model must return features of images and of texts, got ({kinds})")
    return tuple(found) if found[-1] is not None else tuple(found[:3])


def _join(features: list[tuple[Any, ...]], num_pairs: int) -> tuple[Any, ...]:
    """Join micro-batches into the inputs of the loss (features of all pairs, scale, bias), as leaves of a new graph."""
    images, texts = (torch.cat([outputs[side] for outputs in features]) for side in range(2))
    if len(images) != num_pairs or len(texts) != num_pairs:
        raise ValueError(
            f"the model must return one feature per image and text, got {len(images)} and {len(texts)} for {num_pairs}"
        )
    inputs = (images, texts, *features[-1][2:])
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs)


def _loss_backward(loss: Callable[..., Tensor], inputs: tuple[Any, ...], loss_scale: Tensor | float) -> Tensor:
    """Compute the loss of all pairs and the gradients of its inputs, the joined micro-batches."""
    value = loss(*inputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss must be a tensor of one element, got {kind}")
    # full_like fills the number in on the device. A copy from the host would wait, and a CUDA graph cannot hold it.
    factor = loss_scale.to(value) if isinstance(loss_scale, Tensor) else torch.full_like(value, loss_scale)
    _backward([value], [factor.expand_as(value)])
    return value.detach()


def _gradients(inputs: tuple[Any, ...], sizes: list[int]) -> list[tuple[Tensor | None, ...]]:
    """Return the gradients of each micro-batch's outputs, from the gradients of the loss's inputs.

    Scale and bias have one gradient for the whole batch. The last micro-batch gets it, because there
    ``DistributedDataParallel`` waits for a gradient of every parameter.
    """
    rows = [(torch.zeros_like(x) if x.grad is None else x.grad).split(sizes) for x in inputs[:2]]
    shared = tuple(x.grad if isinstance(x, Tensor) else None for x in inputs[2:])
    gradients = [(*pair, *(None for _ in shared)) for pair in zip(*rows, strict=True)]
    gradients[-1] = (*gradients[-1][:2], *shared)
    return gradients


def _backward_from(output: Any, gradients: tuple[Tensor | None, ...]) -> None:
    """Run the backward pass of a micro-batch, from those outputs that require a gradient and that the loss used."""
    pairs = zip(_outputs(output), gradients, strict=True)
    used = [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]
    if used:
        _backward([x for x, _ in used], [gradient for _, gradient in used])


def _backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Run the backward pass of a micro-batch outside of autocast."""
    with torch.autocast(outputs[0].device.type, enabled=False):
        torch.autograd.backward(outputs, gradients)


def _without_exchange(model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
    """Keep DistributedDataParallel from exchanging the gradients of a micro-batch."""
    stack = ExitStack()
    for module in model.modules() if when else ():
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
    return stack


def _accelerators(model: nn.Module, images: Any) -> list[torch.device]:
    """Return the accelerators of a model and its micro-batches, whose random number generators must be restored."""
    found = {tensor.device for tensor in (*model.parameters(), images)}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


def _random_state(devices: Iterable[torch.device]) -> list[Tensor]:
    """Return the states of the random number generators before a micro-batch, of the CPU and of ``devices``."""
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]


def _set_random_state(devices: Iterable[torch.device], states: list[Tensor]) -> None:
    """Restore the states of the random number generators for a micro-batch, of the CPU and of ``devices``."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


class _Buffers:
    """A snapshot of a model's buffers: the buffer tensors themselves, and copies of their values."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if not _is_expanded(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers before a micro-batch: the original tensors with the copied values."""
        for module, name, buffer, value in self.saved:
            buffer.copy_(value)
            setattr(module, name, buffer)


def _is_expanded(buffer: Tensor) -> bool:
    """Return True for an expanded buffer: its elements share memory, so it can be neither written nor restored."""
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
