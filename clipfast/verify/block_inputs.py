"""Inputs of the cases of ``block_shapes``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_shapes import ActShape, NormShape, PairShape, PoolShape
from .cases import Case

# Name of the op, its options, its inputs by name, and the gradient of what it returns (of two results side by side).
Made = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]


def normal(generator: torch.Generator, *size: int) -> Tensor:
    """Of the standard normal distribution."""
    return torch.randn(size, generator=generator)


def _make_norm(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, NormShape):
        raise TypeError(f"expected a NormShape, got {shape!r}")
    size = shape.rows, shape.width
    x = _rows(case, size, generator)
    grad = normal(generator, shape.rows, (1 + shape.residual) * shape.width)
    inputs = {"x": x, "weight": normal(generator, shape.width), "bias": normal(generator, shape.width)}
    if shape.residual:
        inputs["residual"] = _rows(case, size, generator)
    return "layer_norm", {}, inputs, grad


def _make_pair(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, PairShape):
        raise TypeError(f"expected a PairShape, got {shape!r}")
    x = _rows(case, (shape.rows, shape.width), generator)
    names = "weight_1", "bias_1", "weight_2", "bias_2"
    inputs = {"x": x, **{name: normal(generator, shape.width) for name in names}}
    return "layer_norm_pair", {}, inputs, normal(generator, shape.rows, 2 * shape.width)


def _rows(case: Case, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Rows that are not centred, or as the case wants them."""
    x = normal(generator, *size) + 0.5
    if case.values == "constant rows":
        # small numbers, whose sums are exact
        x = torch.randint(-8, 9, (size[0], 1), generator=generator).float().repeat(1, size[1])
    elif case.values == "large mean":
        x += 3000
    elif case.values == "outlier":
        x[:, size[1] // 3] += 300
    elif case.values == "large":
        x *= 1e3
    elif case.values == "tiny":
        x *= 1e-4
    return x


def _make_act(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, ActShape):
        raise TypeError(f"expected an ActShape, got {shape!r}")
    x = 2 * normal(generator, shape.rows, shape.width)
    if case.values == "range":
        x = torch.linspace(-60, 60, shape.elements).view(shape.rows, shape.width)
    elif case.values == "large":
        x *= 1e3
    elif case.values == "tiny":
        x *= 1e-4
    scale = 1e-4 if case.values == "tiny" else 1.0
    inputs = {"x": x, "bias": scale * normal(generator, shape.width)}
    op = "bias_quick_gelu" if shape.quick else "bias_gelu"
    return op, {}, inputs, normal(generator, shape.rows, shape.width)


def _make_pool(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, PoolShape):
        raise TypeError(f"expected a PoolShape, got {shape!r}")
    query = normal(generator, shape.batch, shape.queries, shape.width) / shape.width**0.5
    tokens = normal(generator, shape.batch, shape.tokens, shape.width)
    if case.values == "one-hot":
        query *= 8
    elif case.values == "uniform":
        query *= 1e-4
    elif case.values == "duplicate rows":
        tokens = tokens[:, torch.arange(shape.tokens) // 2]
    grad = normal(generator, shape.batch, shape.queries, shape.width)
    return "attention_pool", {}, {"query": query, "tokens": tokens}, grad


BLOCK_MAKERS: dict[type, Callable[[Case, torch.Generator], Made]] = {
    NormShape: _make_norm,
    PairShape: _make_pair,
    ActShape: _make_act,
    PoolShape: _make_pool,
}
