"""The linear layers of a transformer block in 8 bits (fp8), for :mod:`.whole_block`, with the bits of ``fp8_linear``.

A block multiplies in 8 bits where :meth:`clipfast.models.CLIP.set_fp8` has set a recipe as the attribute ``fp8`` of its
attention and of its MLP. Then its four linear layers do: the projections to queries, keys and values and from the
heads, and the two of the MLP. A layer that is not plain, such as an adapter's, and all else keep their dtype.

Weights are quantised in each forward pass, for it and its backward pass. So no copy in 8 bits outlives an update of the
weights, and checkpoints hold none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..kernels.backends import NOT_INSIDE
from ..kernels.fp8 import E4M3, RECIPES, Fp8Rows, Fp8Weight
from ..kernels.hardware import LEAST_FP8, has_fp8
from ..kernels.implementations import fp8_linear_bwd, fp8_linear_fwd, quantize_both, quantize_rows
from ..kernels.launch import arch_of

FULL = "full"


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


def check_fp8(device: torch.device) -> None:
    """Refuse a GPU that cannot multiply 8-bit numbers for a model; a CPU emulates it.

    Raises:
        ValueError: the GPU is not one of NVIDIA's with compute capability 8.9 or higher, or it is one with 8.9 under
            PyTorch 2.11, whose products of rows in 8 bits may hang there.
    """
    if device.type != "cuda":
        return
    if arch_of(device) == LEAST_FP8 and TorchVersion(torch.__version__) < "2.12":
        raise ValueError(
            f"fp8 on a {torch.cuda.get_device_name(device)} needs PyTorch 2.12 or newer: {torch.__version__} starts "
            "products outside the current CUDA stream, and may hang (pytorch/pytorch#177651)"
        )
    if not has_fp8(arch_of(device)):
        has = "is not one" if torch.version.hip is not None else f"has {arch_of(device) / 10:.1f}"
        raise ValueError(
            "fp8 needs a GPU of NVIDIA with compute capability 8.9 or higher, such as RTX 40, L40S and H100, and "
            f"{torch.cuda.get_device_name(device)} {has}"
        )


def quantized(weights: Sequence[Tensor]) -> list[Fp8Weight]:
    """Return a block's weights [N, K] in 8 bits; without gradients, the rows of each take the place of its columns."""
    found: list[Fp8Weight] = []
    with torch._C._ExcludeDispatchKeyGuard(NOT_INSIDE):
        for weight in weights:
            if torch.is_grad_enabled():
                values, scale, *columns = quantize_both.run(weight, E4M3)
                found.append(Fp8Weight(Fp8Rows(values, scale), Fp8Rows(*columns)))
            else:
                rows = Fp8Rows(*quantize_rows.run(weight, E4M3)[1:])
                found.append(Fp8Weight(rows, rows))
    return found


def rows_of(x: Tensor | Fp8Rows) -> Fp8Rows:
    """Return the input [M, K] of a block's linear layer in 8 bits."""
    if isinstance(x, Fp8Rows):
        return x
    carrier, values, scale = quantize_rows.run(x, E4M3)
    return Fp8Rows(values, scale, carrier)


def operand(results: Sequence[Tensor], dtype: torch.dtype) -> Fp8Rows:
    """Return an op's result, or its carrier, values and scale, as a block's linear layer takes it from ``dtype``."""
    if len(results) > 1:
        carrier, values, scale = results
        return Fp8Rows(values, scale, carrier)
    return rows_of(results[0] if results[0].dtype is dtype else results[0].to(dtype))


def linear(x: Tensor | Fp8Rows, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Return the output [M, N] of a block's linear layer, in the dtype that its input had before it was quantised."""
    x, (rows, columns) = rows_of(x), weight
    y: Tensor = fp8_linear_fwd.run(x.carrier, *x[:2], rows.values, bias, *rows[:2], *columns[:2], False)
    return y


def linear_grads(
    grad: Tensor, x: Tensor | Fp8Rows, columns: Fp8Rows, recipe: str | None, with_dw: bool, with_db: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias of a block's linear layer; None for those that are not wanted.

    The rows ``x`` of the input are quantised here if they were saved in 16 bits.
    """
    dx, dw, db = fp8_linear_bwd.run(grad, *rows_of(x)[:2], *columns[:2], recipe == FULL, True, with_dw, with_db)
    return dx, dw if with_dw else None, db if with_db else None


def flattened(saved: Sequence[Any], backward: Callable[..., Any]) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return a block's saved values as tensors, and a function that calls ``backward`` with the values made of these.

    Of a weight in 8 bits, only the columns are saved.
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
