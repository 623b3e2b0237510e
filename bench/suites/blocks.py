"""What a transformer block does beside attention and products: layer norms, and activations with their bias.

PyTorch's candidates do as a model in the dtype of the case does: parameters are kept in float32 and cast, which takes
next to nothing, and the arithmetic is left to PyTorch's own kernels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import bias_gelu, bias_quick_gelu, layer_norm, layer_norm_pair, reference
from clipfast.kernels.floors import Floor, bias_act_floor, layer_norm_floor, layer_norm_pair_floor

from ..case import DTYPES, OURS, AnyFunction, Candidate, Case, Inputs, Results, without_grads
from . import peers

Shape = Mapping[str, int | str | bool]
NORM_FIELDS: Shape = {"rows": 65792, "width": 1024, "residual": True}
NORM_SMALLEST: Shape = {"rows": 40, "width": 24, "residual": True}
PAIR_FIELDS: Shape = {"rows": 65792, "width": 1024}
PAIR_SMALLEST: Shape = {"rows": 40, "width": 24}
ACT_FIELDS: Shape = {"rows": 65792, "width": 4096, "quick": False}
ACT_SMALLEST: Shape = {"rows": 40, "width": 24, "quick": True}
# tokens, width, and width of the MLP, of the image towers L/14, B/16, H/14 and bigG/14; the most telling first, since a
# run may be stopped
TOWERS = ((257, 1024, 4096), (197, 768, 3072), (257, 1280, 5120), (257, 1664, 8192))
BATCH = {"cpu": 4, "cuda": 256}
IN_A_PASS = "the bias in a pass, where a linear layer adds it in its product"


def norm_shapes(device_type: str) -> list[Shape]:
    """One layer of each published image tower, with the residual's addition and without."""
    sizes = [(BATCH[device_type] * tokens, width) for tokens, width, _ in TOWERS]
    return [{"rows": rows, "width": width, "residual": on} for on in (True, False) for rows, width in sizes]


def pair_shapes(device_type: str) -> list[Shape]:
    """What enters each published image tower."""
    return [{"rows": BATCH[device_type] * tokens, "width": width} for tokens, width, _ in TOWERS]


def act_shapes(device_type: str) -> list[Shape]:
    """The MLP of each published image tower, with the activation that it was trained with and the other."""
    sizes = [(BATCH[device_type] * tokens, width) for tokens, _, width in TOWERS]
    return [{"rows": rows, "width": width, "quick": quick} for quick in (False, True) for rows, width in sizes]


def norm(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """A layer norm, with a residual or without; with one, both results have a gradient."""
    rows, width, residual = (shape[key] for key in NORM_FIELDS)

    def inputs() -> Inputs:
        drawn = {"x": _draw(dtype, device, rows, width), **_parameters(device, width, "weight", "bias")}
        if residual:
            drawn |= {name: _draw(dtype, device, rows, width) for name in ("residual", "grad_2")}
        return drawn | {"grad": _draw(dtype, device, rows, width)}

    op = "layer_norm_residual" if residual else "layer_norm"
    floor = functools.partial(layer_norm_floor, rows, width, DTYPES[dtype].itemsize, residual=residual)
    wants_grad = ("x", "weight", "bias", *(("residual",) if residual else ()))
    functions = layer_norm, reference.layer_norm, _norm
    return _case("layer_norm", op, shape, dtype, device, inputs, functions, _both(floor), wants_grad)


def norm_pair(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Two layer norms in a row; both results have a gradient."""
    rows, width = (shape[key] for key in PAIR_FIELDS)
    names = "weight_1", "bias_1", "weight_2", "bias_2"

    def inputs() -> Inputs:
        streams = {name: _draw(dtype, device, rows, width) for name in ("x", "grad", "grad_2")}
        return streams | _parameters(device, width, *names)

    floor = functools.partial(layer_norm_pair_floor, rows, width, DTYPES[dtype].itemsize)
    functions = layer_norm_pair, reference.layer_norm_pair, _norm_pair
    op = "layer_norm_pair"
    return _case(op, op, shape, dtype, device, inputs, functions, _both(floor), ("x", *names))


def bias_act(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """GELU or QuickGELU of a sum with a bias."""
    rows, width, quick = (shape[key] for key in ACT_FIELDS)

    def inputs() -> Inputs:
        streams = {name: _draw(dtype, device, rows, width) for name in ("x", "grad")}
        return streams | _parameters(device, width, "bias")

    floor = functools.partial(bias_act_floor, rows, width, DTYPES[dtype].itemsize)
    functions = (
        (bias_quick_gelu, reference.bias_quick_gelu, _bias_quick_gelu)
        if quick
        else (bias_gelu, reference.bias_gelu, _bias_gelu)
    )
    op = "bias_quick_gelu" if quick else "bias_gelu"
    return _case("bias_act", op, shape, dtype, device, inputs, functions, _both(floor), ("x", "bias"), IN_A_PASS)


def _case(
    suite: str, op: str, shape: Shape, dtype: str, device: torch.device, inputs: Callable[[], Inputs],
    functions: tuple[AnyFunction, AnyFunction, AnyFunction], floor: Floor, wants_grad: tuple[str, ...], note: str = "",
) -> Case:  # fmt: skip
    ours, specification, plain = (without_grads(function) for function in functions)
    return Case(
        suite=suite,
        op=f"{op}.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        candidates=(
            Candidate(OURS, lambda: ours),
            Candidate("PyTorch", lambda: plain, note=note),
            Candidate("PyTorch compiled", lambda: peers.compiled(plain), note=note),
        ),
        reference=specification,
        floor=floor,
        items=(int(shape["rows"]), "rows"),
        wants_grad=wants_grad,
    )


def _both(floor: Callable[..., Floor]) -> Floor:
    forward, backward = (floor(backward=backward) for backward in (False, True))
    return Floor(forward.flops + backward.flops, forward.bytes + backward.bytes)


def _draw(dtype: str, device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=device).to(DTYPES[dtype])


def _parameters(device: torch.device, width: int, *names: str) -> Inputs:
    return {name: torch.randn(width, device=device) for name in names}


def _norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Results:
    s = x if residual is None else x + residual
    y = F.layer_norm(s, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))
    return y if residual is None else (y, s)


def _norm_pair(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> tuple[Tensor, Tensor]:
    s = F.layer_norm(x, x.shape[-1:], weight_1.to(x.dtype), bias_1.to(x.dtype))
    return s, F.layer_norm(s, x.shape[-1:], weight_2.to(x.dtype), bias_2.to(x.dtype))


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


def _bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    u = x + bias.to(x.dtype)
    return u * torch.sigmoid(1.702 * u)
