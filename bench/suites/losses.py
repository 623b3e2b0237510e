"""The losses beside the contrastive one: ours, PyTorch's, and the kernels that others have published for them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import info_nce_loss, nt_xent_loss, reference, sigmoid_loss
from clipfast.kernels.floors import Floor, info_nce_floor, nt_xent_floor, sigmoid_floor

from ..case import DTYPES, OURS, Candidate, Case, Function, Inputs, require_cuda
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"pairs": 4096, "embed_dim": 512}
SMALLEST: Mapping[str, int | str | bool] = {"pairs": 40, "embed_dim": 16}
QUEUE_FIELDS: Mapping[str, int | str | bool] = {"pairs": 1024, "queue": 65536, "embed_dim": 128}
QUEUE_SMALLEST: Mapping[str, int | str | bool] = {"pairs": 40, "queue": 70, "embed_dim": 16}
# Where training starts.
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
NCE_SCALE, NT_XENT_SCALE = 1 / 0.07, 1 / 0.1
# The references hold several matrices of all logits in float32.
GATE_PAIRS = {"cpu": 2048, "cuda": 8192}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """A large batch, and on a GPU a small one: the most telling first, since a run may be stopped."""
    sizes = (2048,) if device_type == "cpu" else (16384, 4096)
    return [{"pairs": pairs, "embed_dim": 512} for pairs in sizes]


def queue_shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """MoCo's queue, on a CPU a part of it."""
    pairs, queue = (256, 16384) if device_type == "cpu" else (1024, 65536)
    return [{"pairs": pairs, "queue": queue, "embed_dim": 128}]


def sigmoid(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Unit features at random, as in the first steps of training; all four inputs take gradients."""

    def inputs(pairs: int) -> Inputs:
        image, text = _unit((pairs, pairs), shape, dtype, device)
        return {"image": image, "text": text, **_numbers(device, logit_scale=SIGMOID_SCALE, logit_bias=SIGMOID_BIAS)}

    others = (
        Candidate("OpenCLIP SigLipLoss", _open_clip),
        Candidate("siglip-kernel", functools.partial(_siglip_kernel, device)),
    )
    floor = sigmoid_floor(shape["pairs"], shape["embed_dim"], DTYPES[dtype].itemsize, backward=True)
    functions = sigmoid_loss, reference.sigmoid_loss
    wants_grad = "image", "text", "logit_scale", "logit_bias"
    return _case("sigmoid", shape, dtype, device, inputs, functions, floor, wants_grad, others)


def info_nce(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Each query's key and a queue, no other keys: queries and scale take gradients, as with MoCo."""

    def inputs(pairs: int) -> Inputs:
        query, key, negatives = _unit((pairs, pairs, shape["queue"]), shape, dtype, device)
        return {"query": query, "key": key, "negatives": negatives, **_numbers(device, logit_scale=NCE_SCALE)}

    sizes = shape["pairs"], shape["queue"], shape["embed_dim"]
    floor = info_nce_floor(*sizes, DTYPES[dtype].itemsize, backward=True)
    functions = tuple(functools.partial(fn, in_batch=False) for fn in (info_nce_loss, reference.info_nce_loss))
    return _case("info_nce", shape, dtype, device, inputs, functions, floor, ("query", "logit_scale"))


def nt_xent(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Two views of each image, at random; both and the scale take gradients."""

    def inputs(pairs: int) -> Inputs:
        first, second = _unit((pairs, pairs), shape, dtype, device)
        return {"first": first, "second": second, **_numbers(device, logit_scale=NT_XENT_SCALE)}

    floor = nt_xent_floor(shape["pairs"], shape["embed_dim"], DTYPES[dtype].itemsize, backward=True)
    functions = nt_xent_loss, reference.nt_xent_loss
    return _case("nt_xent", shape, dtype, device, inputs, functions, floor, ("first", "second", "logit_scale"))


def _case(
    suite: str, shape: Mapping[str, Any], dtype: str, device: torch.device, inputs: Callable[[int], Inputs],
    functions: tuple[Function, ...], floor: Floor, wants_grad: tuple[str, ...], others: tuple[Candidate, ...] = (),
) -> Case:  # fmt: skip
    ours, plain = functions
    return Case(
        suite=suite,
        op=f"{suite}.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(inputs, shape["pairs"]),
        gate_inputs=functools.partial(inputs, min(shape["pairs"], GATE_PAIRS[device.type])),
        candidates=(
            Candidate(OURS, lambda: ours),
            Candidate("PyTorch", lambda: plain),
            Candidate("PyTorch compiled", lambda: peers.compiled(plain)),
            *others,
        ),
        reference=plain,
        floor=floor,
        items=(shape["pairs"], "pairs"),
        wants_grad=wants_grad,
    )


def _unit(rows: tuple[int, ...], shape: Mapping[str, Any], dtype: str, device: torch.device) -> list[Tensor]:
    drawn = (torch.randn(count, shape["embed_dim"], device=device) for count in rows)
    return [F.normalize(x, dim=-1).to(DTYPES[dtype]) for x in drawn]


def _numbers(device: torch.device, **values: float) -> Inputs:
    return {name: torch.tensor(value, device=device) for name, value in values.items()}


def _open_clip() -> Function:
    loss = peers.need("open_clip.loss", "open_clip_torch").SigLipLoss()

    def run(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return loss(image, text, logit_scale, logit_bias)

    return run


def _siglip_kernel(device: torch.device) -> Function:
    require_cuda(device)
    loss = peers.need("siglip_kernel", "siglip-kernel").fused_siglip_loss

    def run(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return loss(image, text, logit_scale.log(), logit_bias)

    return run
