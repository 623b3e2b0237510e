"""The registration of a loss's gradients with PyTorch, the same for every loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def register_gradients(forward: CustomOpDef, backward: CustomOpDef, *, optional: Sequence[int] = ()) -> None:
    """Make ``backward`` the gradient of ``forward``, and say what shapes it returns.

    Args:
        forward: an op ``(*tensors, *options) -> (loss, *saved)``.
        backward: an op ``(grad_loss, *tensors, *saved, *options, *required) -> gradients``, one for each of
            ``tensors``, contiguous and of the same shape.
        optional: the positions of tensors whose gradient costs work that is left out if nobody requires it.
            ``required`` has a bool for each of them; where it is False, ``backward`` returns a tensor without rows.
    """
    tensor_count = sum(
        isinstance(argument.type, torch.TensorType) for argument in forward._opoverload._schema.arguments
    )

    @backward.register_fake
    def _(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        required = dict(zip(optional, arguments[len(arguments) - len(optional) :], strict=True))
        return tuple(
            x.new_empty(x.shape if required.get(position, True) else (0, *x.shape[1:]))
            for position, x in enumerate(arguments[:tensor_count])
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[tensor_count:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensor_count], *output[1:])

    def gradients(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        required = {position: ctx.needs_input_grad[position] for position in optional}
        found = backward(grad_loss, *ctx.saved_tensors, *ctx.options, *required.values())
        kept = [grad if required.get(position, True) else None for position, grad in enumerate(found)]
        return *kept, *(None,) * len(ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
