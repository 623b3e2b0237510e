"""Contrastive loss: ours, PyTorch's, OpenCLIP's, and the kernels that others have published for it."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import contrastive_loss, reference
from clipfast.kernels.floors import contrastive_floor

from ..case import DTYPES, OURS, Candidate, Case, Function, Inputs, MissingError, require_cuda
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"pairs": 4096, "embed_dim": 512}
SMALLEST: Mapping[str, int | str | bool] = {"pairs": 40, "embed_dim": 16}
LOGIT_SCALE = 1 / 0.07  # where training starts
# The reference holds several N x N matrices in float32.
GATE_PAIRS = {"cpu": 4096, "cuda": 16384}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """Batches from a small training's to the paper's, and past it on a GPU."""
    if device_type == "cpu":
        return [{"pairs": pairs, "embed_dim": 512} for pairs in (1024, 2048, 4096, 8192, 16384)]
    # the most telling first, since a run may be stopped
    sizes = [(16384, 512), (32768, 768), (4096, 512), (65536, 768), (8192, 512), (32768, 512)]
    return [{"pairs": pairs, "embed_dim": embed_dim} for pairs, embed_dim in sizes]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Unit features at random, as in the first steps of training; all three inputs take gradients."""
    pairs, embed_dim = shape["pairs"], shape["embed_dim"]
    draw = functools.partial(_inputs, embed_dim=embed_dim, dtype=DTYPES[dtype], device=device)
    return Case(
        suite="loss",
        op="contrastive.fwd_bwd",
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(draw, pairs),
        gate_inputs=functools.partial(draw, min(pairs, GATE_PAIRS[device.type])),
        candidates=_candidates(device),
        reference=reference.contrastive_loss,
        floor=contrastive_floor(pairs, embed_dim, DTYPES[dtype].itemsize, backward=True),
        items=(pairs, "pairs"),
        wants_grad=("image", "text", "logit_scale"),
    )


def _inputs(pairs: int, embed_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    image, text = (F.normalize(torch.randn(pairs, embed_dim, device=device), dim=-1).to(dtype) for _ in range(2))
    return {"image": image, "text": text, "logit_scale": torch.tensor(LOGIT_SCALE, device=device)}


def _candidates(device: torch.device) -> tuple[Candidate, ...]:
    python_scale = "its temperature is a number, not learned"
    return (
        Candidate(OURS, lambda: contrastive_loss),
        Candidate(
            f"{OURS}, memory=min",
            functools.partial(_on_gpu, device, functools.partial(contrastive_loss, memory="min")),
            note="10 N^2 D operations, no float32 copy of the text gradients",
        ),
        Candidate("PyTorch", lambda: reference.contrastive_loss),
        Candidate("PyTorch compiled", lambda: peers.compiled(reference.contrastive_loss)),
        Candidate("OpenCLIP ClipLoss", _open_clip),
        Candidate("OpenCLIP ClipLoss compiled", lambda: peers.compiled(_open_clip())),
        Candidate("F.linear_cross_entropy x2", _linear_cross_entropy),
        Candidate("Inf-CL", functools.partial(_inf_cl, device)),
        Candidate("memeff", functools.partial(_memeff, device), lacks=("logit_scale",), note=python_scale),
        Candidate("Cut Cross-Entropy x2", functools.partial(_cut_cross_entropy, device)),
        Candidate("Liger x2", functools.partial(_liger, device)),
    )


def _on_gpu(device: torch.device, function: Function) -> Function:
    require_cuda(device)
    return function


def _open_clip() -> Function:
    loss = peers.need("open_clip.loss", "open_clip_torch").ClipLoss()

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return loss(image, text, logit_scale)

    return run


def _two_sided(one_sided: Function) -> Function:
    """The symmetric loss from a cross-entropy of a linear layer, whose weight is the other modality."""

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        targets = torch.arange(len(image), device=image.device)
        scaled = (logit_scale * image).to(image.dtype), (logit_scale * text).to(text.dtype)
        return (one_sided(scaled[0], text, targets) + one_sided(scaled[1], image, targets)) / 2

    return run


def _linear_cross_entropy() -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError("needs torch 2.13")
    options = peers.need("torch.nn", "torch").LinearCrossEntropyOptions()
    return _two_sided(functools.partial(F.linear_cross_entropy, options=options))


def _inf_cl(device: torch.device) -> Function:
    require_cuda(device)
    flash_loss = peers.need("inf_cl.flash", "inf-cl").cal_flash_loss

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        # heads must divide the width, and be a power of two of at most 256
        head_dim = math.gcd(image.shape[1], 256)
        loss = flash_loss(image, text, None, logit_scale, head_dim) + flash_loss(
            text, image, None, logit_scale, head_dim
        )
        return loss.mean() / 2

    return run


def _memeff(device: torch.device) -> Function:
    require_cuda(device)
    module = peers.need("memeff", "memeff")

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:  # noqa: ARG001
        # stable=True would scale the gradient by the batch size
        return module.MemoryEfficientCLIPLoss(1 / LOGIT_SCALE, normalized_inputs=True, stable=False)(image, text)

    return run


def _cut_cross_entropy(device: torch.device) -> Function:
    require_cuda(device)
    return _two_sided(peers.need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy)


def _liger(device: torch.device) -> Function:
    require_cuda(device)
    function = peers.need("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function.LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)[0]

    return _two_sided(run)
