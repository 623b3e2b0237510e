"""Attention on the packed projection: ours, PyTorch's by backend, and flash-attn."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfast.kernels import attention, reference
from clipfast.kernels.floors import attention_floor

from ..case import DTYPES, OURS, Candidate, Case, Function, Inputs, require_cuda, without_grads
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"batch": 64, "tokens": 197, "heads": 12, "head_dim": 64, "causal": False}
SMALLEST: Mapping[str, int | str | bool] = {"batch": 2, "tokens": 9, "heads": 2, "head_dim": 16, "causal": True}
# tokens, heads, head_dim, causal of one layer: L/14, text of B, B/16, B/32, H/14, L/14 at 336 pixels; the most telling
# first, since a run may be stopped
LAYERS = (
    (257, 16, 64, False),
    (77, 8, 64, True),
    (197, 12, 64, False),
    (50, 12, 64, False),
    (257, 16, 80, False),
    (577, 16, 64, False),
)
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """One layer of each published vision tower, and of the text tower."""
    batch = 8 if device_type == "cpu" else 256
    return [dict(zip(FIELDS, (batch, *layer), strict=True)) for layer in LAYERS]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """A random projection, and a random gradient of the output."""
    batch, tokens, heads, head_dim, causal = (shape[key] for key in FIELDS)

    def inputs() -> Inputs:
        qkv = torch.randn(batch, tokens, 3 * heads * head_dim, device=device).to(DTYPES[dtype])
        return {"qkv": qkv, "grad": torch.randn(batch, tokens, heads * head_dim, device=device).to(DTYPES[dtype])}

    return Case(
        suite="attention",
        op="attention.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=_candidates(heads, causal, device),
        reference=without_grads(functools.partial(reference.attention, num_heads=heads, causal=causal)),
        floor=attention_floor(batch, tokens, heads, head_dim, DTYPES[dtype].itemsize, causal=causal, backward=True),
        items=(batch, "sequences"),
        wants_grad=("qkv",),
    )


def _candidates(heads: int, causal: bool, device: torch.device) -> tuple[Candidate, ...]:
    ours = functools.partial(attention, num_heads=heads, causal=causal)
    plain = functools.partial(reference.attention, num_heads=heads, causal=causal)
    return (
        Candidate(OURS, lambda: without_grads(ours)),
        Candidate("PyTorch", lambda: without_grads(plain)),
        Candidate("PyTorch compiled", lambda: peers.compiled(without_grads(plain))),
        *(Candidate(name, functools.partial(_sdpa, backend, heads, causal)) for name, backend in SDPA.items()),
        Candidate("flash-attn", functools.partial(_flash_attn, heads, causal, device)),
    )


def _sdpa(backend: SDPBackend, heads: int, causal: bool) -> Function:
    def run(qkv: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).reshape(batch, tokens, -1)

    return run


def _flash_attn(heads: int, causal: bool, device: torch.device) -> Function:
    require_cuda(device)
    packed = peers.need("flash_attn", "flash-attn").flash_attn_qkvpacked_func

    def run(qkv: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
        batch, tokens, _ = qkv.shape
        return packed(qkv.view(batch, tokens, 3, heads, -1), causal=causal).reshape(batch, tokens, -1)

    return run
