"""Attention pooling of the ResNets: ours and PyTorch's."""

from collections.abc import Mapping
from typing import Any

import torch

from clipfast.kernels import attention_pool, reference
from clipfast.kernels.floors import attention_pool_floor

from ..case import DTYPES, OURS, Candidate, Case, Inputs, without_grads
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"batch": 256, "queries": 32, "tokens": 50, "width": 2048}
SMALLEST: Mapping[str, int | str | bool] = {"batch": 2, "queries": 3, "tokens": 7, "width": 24}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """RN50's pool: a query for each of 32 heads, and the mean in front of 49 places."""
    return [dict(FIELDS) | {"batch": 8 if device_type == "cpu" else 256}]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Random tokens, and queries of such a length that weights are neither equal nor one."""
    batch, queries, tokens, width = (shape[key] for key in FIELDS)

    def inputs() -> Inputs:
        drawn = {"query": queries, "tokens": tokens, "grad": queries}
        inputs = {name: torch.randn(batch, rows, width, device=device) for name, rows in drawn.items()}
        inputs["query"] /= width**0.5
        return {name: x.to(DTYPES[dtype]) for name, x in inputs.items()}

    ours, plain = (without_grads(function) for function in (attention_pool, reference.attention_pool))
    return Case(
        suite="attention_pool",
        op="attention_pool.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=(
            Candidate(OURS, lambda: ours),
            Candidate("PyTorch", lambda: plain),
            Candidate("PyTorch compiled", lambda: peers.compiled(plain)),
        ),
        reference=plain,
        floor=attention_pool_floor(batch, queries, tokens, width, DTYPES[dtype].itemsize, backward=True),
        items=(batch, "images"),
        wants_grad=("query", "tokens"),
    )
