"""The inputs of a case: drawn from a seed that its name makes, in the memory layout that it asks for."""

import dataclasses
import zlib

import torch
from torch import Tensor

from ..kernels.spec import EXPANDED, Call, Case, Draw, OpSpec


def inputs_of(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, number: int = 0) -> Call:
    """Make the inputs of a case: in each draw (``number``) the same values on every machine, device and leg."""
    draw = Draw(zlib.crc32(f"{case.name} {number}".encode()))
    call = spec.call(case.shape, case.values, draw, dtype)
    inputs = {name: lay_out(x.to(device), case.layout) for name, x in call.inputs.items()}
    grads = tuple(lay_out(grad.to(device), case.layout) for grad in call.grads)
    if case.layout == EXPANDED:
        if all(grad.ndim == 0 for grad in grads):
            first = next(iter(inputs))
            inputs[first] = inputs[first][:1].expand_as(inputs[first])
        grads = tuple(grad.flatten()[0].expand_as(grad) for grad in grads)
    return dataclasses.replace(call, inputs=inputs, grads=grads)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout; a tensor that the layout does not suit stays as it is."""
    if x.ndim == 0:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "hwc":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.ndim == 4 else x
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        # one element past an aligned address, where a vector load would fault
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x
