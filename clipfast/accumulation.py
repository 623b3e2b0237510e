"""Gradients of a large batch in the memory of a small one, exactly; summing the gradients of small batches' losses
would lose the negatives.

With micro-batches X_k, features F_k = f(X_k; w), scale s and the loss L of all features at once:

    pass 1, without a graph    F_k = f(X_k; w)
    loss                       L(F_1, ..., F_n, s),  G_k = dL/dF_k,  dL/ds
    pass 2, one graph a time   f(X_k; w) again, backward from G_k:  dL/dw = sum_k G_k dF_k/dw

That is the chain rule, so nothing is approximated, provided that pass 2 computes the features of pass 1: it draws the
same random numbers, and starts from the same buffers. It costs one more forward pass. Activations are those of one
micro-batch; features and their gradients, [B, D], are those of all.

What equals what. The loss and its gradients are those of L(f(X_1), ..., f(X_n)) in one graph, always. They are those of
the whole batch, L(f(X)), if f treats every pair on its own:

    layer normalisation, attention, ...      yes
    BatchNorm in eval mode, or frozen        yes
    BatchNorm in train mode                  no: each micro-batch is normalised by its own statistics ("ghost batch
                                             normalisation", Hoffer et al. 2017), as a GPU would do with its share of
                                             a batch
    dropout, patch dropout, random depth     yes in distribution: numbers are drawn micro-batch by micro-batch, so a
                                             whole batch draws others from the same seed

Running statistics are updated once per micro-batch, in order, as one pass over the micro-batches would.
Method: GradCache (Gao et al. 2021).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .kernels import contrastive_loss

OUTPUTS = ("image_features", "text_features", "logit_scale", "logit_bias")


def accumulate_gradients(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    micro_batch_size: int,
    loss: Callable[..., Tensor] = contrastive_loss,
    *,
    loss_scale: Tensor | float = 1.0,
) -> Tensor:
    """In place of ``loss(*model(images, texts)).backward()``, with the activations of one micro-batch at a time.

    Gradients are added to ``.grad``. Random number generators and buffers are left as one forward pass over the
    micro-batches and the loss would leave them. Call it inside ``torch.autocast`` if the model is to run so; backward
    passes run outside. A batch of one micro-batch is a plain step.

    Under ``DistributedDataParallel`` gradients are exchanged in the last micro-batch only; the loss may be distributed
    (``distributed_contrastive_loss``, ``ClipLoss``), as it sees all features of this rank at once.

    Args:
        model: called with a micro-batch of images and texts. Gives (image_features, text_features, logit_scale), or
            logit_bias as a fourth, as a tuple or as a dict with these names. Scale and bias are the same for every
            micro-batch. State that its forward pass changes must be in buffers.
        images: [B, ...].
        texts: [B, ...].
        micro_batch_size: pairs at a time, at least 1; the last micro-batch may be smaller.
        loss: from what the model gives, in this order, for all B pairs, to one number; a ``ClipLoss``, a ``SigLipLoss``
            or any function. Its own parameters get their gradients as well.
        loss_scale: factor on all gradients: of a ``GradScaler``, ``scaler.scale(torch.ones((), device=...))``.

    Returns:
        The loss, without its factor and without a graph.

    Raises:
        ValueError: no pairs, not as many images as texts, a micro-batch size below 1, or a model that does not give one
            feature per image and text.
        TypeError: the model gives something else, or the loss is not one number in a tensor.
    """
    _check(images, texts, micro_batch_size)
    parts = list(zip(images.split(micro_batch_size), texts.split(micro_batch_size), strict=True))
    if len(parts) == 1:
        return _backward_of(loss, _outputs(model(images, texts)), loss_scale)
    devices = _accelerators(model, images, texts)
    before, random_states = _Buffers(model), []
    features = []
    with torch.no_grad():
        for part in parts:
            random_states.append(_random_state(devices))
            features.append(_outputs(model(*part)))
    torch.clear_autocast_cache()  # weights as they were cast in this pass are cut off from their gradients
    after = _Buffers(model)
    inputs = _join(features, len(images))
    value = _backward_of(loss, inputs, loss_scale)
    random_after = _random_state(devices)
    gradients = _gradients(inputs, micro_batch_size)
    before.restore()
    try:
        for index, (part, state) in enumerate(zip(parts, random_states, strict=True)):
            _set_random_state(devices, state)
            with _without_exchange(model, when=index < len(parts) - 1):
                _backward_from(model(*part), gradients[index])
    finally:
        after.restore()
        _set_random_state(devices, random_after)
    return value


def largest_micro_batch(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    loss: Callable[..., Tensor] = contrastive_loss,
    *,
    start: int | None = None,
    reserve: int = 0,
) -> int:
    """Largest micro-batch size that :func:`accumulate_gradients` has the memory for on a GPU, found by trying.

    From ``start`` down, halved at each ``torch.cuda.OutOfMemoryError``. Gradients, buffers and random number generators
    are left as they were. Of several processes, try before ``DistributedDataParallel`` and take the least.

    Args:
        model: as it will be trained, in the same autocast.
        images: [B, ...], a whole batch of the largest shape there will be; memory does not depend on values.
        texts: [B, ...], likewise.
        loss: as for :func:`accumulate_gradients`.
        start: the first size to try; default: the whole batch.
        reserve: bytes to leave for what the first step allocates, such as the optimiser's moments.

    Raises:
        torch.cuda.OutOfMemoryError: not even one pair at a time fits.
        ValueError, TypeError: as for :func:`accumulate_gradients`.
    """
    size = len(images) if start is None else start
    _check(images, texts, size)
    devices = _accelerators(model, images, texts)
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
    for parameter in _parameters(model, loss):
        parameter.grad = None
    try:
        accumulate_gradients(model, images, texts, size, loss)
    except torch.cuda.OutOfMemoryError:
        if size == 1:
            raise
    else:
        return True
    # only here has the exception let go of the tensors of its frames
    torch.cuda.empty_cache()
    return False


def _parameters(model: nn.Module, loss: Callable[..., Tensor]) -> list[nn.Parameter]:
    return [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]


def _check(images: Tensor, texts: Tensor, size: int) -> None:
    if len(images) != len(texts) or len(images) == 0:
        raise ValueError(f"images and texts must be equally many, at least one, got {len(images)} and {len(texts)}")
    if size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {size}")


def _outputs(output: Any) -> tuple[Any, ...]:
    """What a model gives, as (image_features, text_features, logit_scale) or with logit_bias."""
    found = tuple(output[name] for name in OUTPUTS if name in output) if isinstance(output, Mapping) else output
    if not isinstance(found, (tuple, list)) or len(found) not in (3, 4) or found[2] is None:
        raise TypeError(f"the model must give {', '.join(OUTPUTS[:3])} and perhaps {OUTPUTS[3]}, got {_kinds(output)}")
    if not isinstance(found[0], Tensor) or not isinstance(found[1], Tensor):
        raise TypeError(f"the model must give features of images and of texts, got {_kinds(output)}")
    return tuple(found) if found[-1] is not None else tuple(found[:3])


def _kinds(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(type(one).__name__ for one in output)})"
    return type(output).__name__


def _join(features: list[tuple[Any, ...]], num_pairs: int) -> tuple[Any, ...]:
    """Features of all pairs, with scale and bias: inputs of the loss, to which gradients flow and no further."""
    images, texts = (torch.cat([outputs[side] for outputs in features]) for side in range(2))
    if len(images) != num_pairs or len(texts) != num_pairs:
        raise ValueError(
            f"the model must give one feature per image and text, got {len(images)} and {len(texts)} for {num_pairs}"
        )
    inputs = (images, texts, *features[-1][2:])
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs)


def _backward_of(loss: Callable[..., Tensor], inputs: tuple[Any, ...], loss_scale: Tensor | float) -> Tensor:
    value = loss(*inputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss must be a tensor of one element, got {kind}")
    # a number is filled in on the device: a copy from the host would be a wait, and cannot be in a CUDA graph
    factor = loss_scale.to(value) if isinstance(loss_scale, Tensor) else torch.full_like(value, loss_scale)
    _backward([value], [factor.expand_as(value)])
    return value.detach()


def _gradients(inputs: tuple[Any, ...], size: int) -> list[tuple[Tensor | None, ...]]:
    """For each micro-batch, gradients of its outputs. Those of scale and bias are of the whole batch: the last takes
    them, where ``DistributedDataParallel`` waits for a gradient of every parameter.
    """
    rows = [_rows(x, size) for x in inputs[:2]]
    shared = tuple(x.grad if isinstance(x, Tensor) else None for x in inputs[2:])
    gradients = [(*pair, *(None for _ in shared)) for pair in zip(*rows, strict=True)]
    gradients[-1] = (*gradients[-1][:2], *shared)
    return gradients


def _rows(features: Tensor, size: int) -> tuple[Tensor, ...]:
    gradient = torch.zeros_like(features) if features.grad is None else features.grad
    return gradient.split(size)


def _backward_from(output: Any, gradients: tuple[Tensor | None, ...]) -> None:
    """Backward from what a model gives, but for what is frozen and what the loss does not use."""
    pairs = zip(_outputs(output), gradients, strict=True)
    used = [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]
    if used:
        _backward([x for x, _ in used], [gradient for _, gradient in used])


def _backward(outputs: list[Tensor], gradients: list[Tensor]) -> None:
    with torch.autocast(outputs[0].device.type, enabled=False):
        torch.autograd.backward(outputs, gradients)


def _without_exchange(model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for module in model.modules() if when else ():
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
    return stack


def _accelerators(model: nn.Module, *tensors: Tensor) -> list[torch.device]:
    """Devices with random number generators of their own."""
    found = {tensor.device for tensor in (*model.parameters(), *tensors)}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


def _random_state(devices: Iterable[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in devices)]


def _set_random_state(devices: Iterable[torch.device], states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


class _Buffers:
    """The buffers of a model as they were: their values, and which tensors held them."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if not _is_expanded(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, into the tensors that they were in."""
        for module, name, buffer, value in self.saved:
            buffer.copy_(value)
            setattr(module, name, buffer)


def _is_expanded(buffer: Tensor) -> bool:
    """Whether elements share memory: nothing writes to such a tensor, nor could it be restored."""
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
