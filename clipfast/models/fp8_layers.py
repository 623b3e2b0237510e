"""Linear layers of a transformer block in 8 bits (fp8), for :mod:`.whole_block`; their results equal ``fp8_linear``'s.

A block multiplies in 8 bits if :meth:`clipfast.models.CLIP.set_fp8` has set a recipe as the attribute ``fp8`` of its
attention and of its MLP. Then four linear layers do so: the projection to queries, keys and values, the output
projection of attention, and the two layers of the MLP. A linear layer that is not plain, such as an adapter's, keeps
its dtype, and so do all other ops.

Weights are quantised in each forward pass, for this pass and its backward pass. So no copy in 8 bits outlives an update
of the weights, and checkpoints hold none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.backends import NOT_INSIDE
from ..kernels.fp8 import E4M3, RECIPES, Fp8Rows, Fp8Weight
from ..kernels.fp8.multiply import multiply
from ..kernels.fp8_rows import rows_beside
from ..kernels.implementations import (
    Plans,
    compute,
    fp8_linear_bwd,
    fp8_linear_fwd,
    plans_of,
    quantize_both,
    quantize_rows,
)

SWITCHBACK, FULL = RECIPES


def check_recipe(recipe: str | None, skip: tuple[int, int], names: tuple[str, str]) -> None:
    """Refuse a recipe of 8 bits for a model's blocks, or numbers of blocks to skip; errors call them by ``names``.

    Raises:
        ValueError: the recipe is unknown, or ``skip`` is not two numbers of at least 0.
    """
    if recipe not in (None, *RECIPES):
        raise ValueError(f"{names[0]} must be {' or '.join(map(repr, RECIPES))} or None, got {recipe!r}")
    is_pair = isinstance(skip, Sequence) and len(skip) == 2 and all(isinstance(count, int) for count in skip)
    if not is_pair or min(skip) < 0:
        raise ValueError(f"{names[1]} must be two numbers of blocks, got {skip!r}")


def quantized(weights: Sequence[Tensor]) -> list[Fp8Weight]:
    """Return the weights [N, K] of a block's linear layers in 8 bits.

    Only the backward pass reads the columns of a weight. If no gradients are recorded, its rows fill their place.
    """
    found: list[Fp8Weight] = []
    plans = plans_of(quantized, weights[0].device, *[(weight.shape, weight.dtype) for weight in weights])
    with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
        for k, weight in enumerate(weights):
            if torch.is_grad_enabled():
                values, scale, *columns = compute(plans, quantize_both, k, weight, E4M3)
                found.append(Fp8Weight(Fp8Rows(values, scale), Fp8Rows(*columns)))
            else:
                rows = Fp8Rows(*compute(plans, quantize_rows, k, weight, E4M3)[1:])
                found.append(Fp8Weight(rows, rows))
    return found


def operand(plans: Plans, name: str, results: Sequence[Tensor], dtype: torch.dtype) -> Fp8Rows:
    """Return the input of a block's linear layer in 8 bits, from the results of the op before the layer.

    The results are one tensor, which is cast to ``dtype`` and quantised here, or carrier, values and scale of
    :class:`Fp8Rows`, if the op has quantised its result.
    """
    if len(results) == 1:
        x = results[0] if results[0].dtype is dtype else results[0].to(dtype)
        results = compute(plans, quantize_rows, name, x, E4M3)
    carrier, values, scale = results
    return Fp8Rows(values, scale, carrier)


def linear(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Return the output [M, N] of a block's linear layer, in the dtype that its input had before it was quantised."""
    rows, columns = weight
    y: Tensor = fp8_linear_fwd.run(x.carrier, *x[:2], rows.values, bias, *rows[:2], *columns[:2], False)
    return y


def full_grads(
    plans: Plans, name: str, grad: Tensor, x: Fp8Rows, columns: Fp8Rows, with_dw: bool, with_db: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias of a block's linear layer by the recipe ``full``; None for those
    that are not wanted.
    """
    args = grad, None, None, *x[:2], *columns[:2], True, True, with_dw, with_db
    found: tuple[Tensor, Tensor | None, Tensor | None] = compute(plans, fp8_linear_bwd, (name, with_dw, with_db), *args)
    return found


def input_grad(plans: Plans, name: str, grad: Tensor, columns: Fp8Rows) -> Tensor:
    """Return the gradient of the input of a block's linear layer by the recipe ``switchback``."""
    values, scale = rows_beside(grad)
    if values is None or scale is None:
        _, values, scale = compute(plans, quantize_rows, (name, "grad"), grad, E4M3)
    return multiply(values, scale, *columns[:2], grad.dtype)


def flattened(saved: Sequence[Any], backward: Callable[..., Any]) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return the values that a block saves as tensors, and a function that restores them and calls ``backward``.

    Of a weight in 8 bits, only the columns are saved, because the backward pass reads nothing else of it.
    """
    found = [value.columns if isinstance(value, Fp8Weight) else value for value in saved]
    are_rows = [isinstance(value, Fp8Rows) for value in found]
    tensors = tuple([x for value in found for x in (value[:2] if isinstance(value, Fp8Rows) else (value,))])
    count = len(tensors)

    def from_tensors(ctx: Any, *args: Any) -> Any:
        """Return the gradients of the block's inputs from those of its results and from the saved tensors."""
        rest = iter(args)
        grads = [next(rest) for _ in range(len(args) - count)]
        return backward(ctx, *grads, *[Fp8Rows(next(rest), next(rest)) if are else next(rest) for are in are_rows])

    return tensors, from_tensors
