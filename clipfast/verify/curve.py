"""Fifty steps of training: does the loss go where it goes with PyTorch?

A small difference in one gradient grows from step to step, so the curve sees what no single call shows. What may remain
is measured, not chosen: the same training with the reference backend, in float32, drifts from itself in float64, and
drifts again when the pairs of each batch come in another order, which changes nothing but the order of the sums. The
allowance is the rule's for gradients: three times the larger of these drifts.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import contrastive_loss
from ..kernels.spec import CUDA
from ..models import CLIP, get_model_config
from ..training.optim import adamw, cosine_lr
from .context import exact_float32
from .options import CURVE
from .report import FAIL, PASS, Row
from .rule import GRADIENT, Figure

MODEL_NAME = "ViT-T-8-32"
STEPS, BATCH, CLASSES, TOKENS = 50, 16, 64, 12
VOCABULARY = 1024  # of the 49,408: the rest would only cost time
LEARNING_RATE, WARMUP = 1e-3, 5
ORDERS = 2  # runs of the reference, the first in the order of ours


def verify_curve(leg: str, dtype: str) -> list[Row]:
    """One row for float32, one for bfloat16 autocast: relative difference of the loss, per step, from float64."""
    device = "cuda" if leg == CUDA else "cpu"
    autocast = None if dtype == "float32" else torch.bfloat16
    ours = train("auto", device, autocast=autocast)
    with exact_float32():
        truth = train("torch", device, double=True)
        drifts = [_apart(train("torch", device, autocast=autocast, order=order), truth) for order in range(ORDERS)]
    figures = []
    for kind, error in _apart(ours, truth).items():
        drift = max(drift[kind] for drift in drifts)
        figures.append(Figure(kind, error, drift, GRADIENT * drift + torch.finfo(torch.float32).eps))
    row = Row(
        CURVE, leg, "training", f"{MODEL_NAME} with {VOCABULARY} words, {STEPS} steps of {BATCH} pairs", dtype, "loss",
        why=f"loss {truth[0].item():.3f} to {truth[-1].item():.3f}; relative, all steps; the allowance is the drift of "
        f"{ORDERS} runs of the reference",
        truth="float64", figures=tuple(figures),
    )  # fmt: skip
    if not ours.isfinite().all():
        return [dataclasses.replace(row, verdict=FAIL, reason="the loss is not finite")]
    passed = all(figure.passed for figure in figures)
    reason = "" if passed else "; ".join(str(figure) for figure in figures if not figure.passed)
    return [dataclasses.replace(row, verdict=PASS if passed else FAIL, reason=reason)]


def _apart(losses: Tensor, truth: Tensor) -> dict[str, float]:
    relative = (losses - truth) / truth
    return {"max": relative.abs().max().item(), "rms": relative.square().mean().sqrt().item()}


def train(
    backend: str, device: str, *, double: bool = False, autocast: torch.dtype | None = None, order: int = 0
) -> Tensor:
    """Losses [STEPS], float64, of a model that starts and learns as any other call's does.

    Args:
        backend: of model and loss.
        device: "cpu" or "cuda".
        double: train in float64.
        autocast: dtype of the forward pass, None for that of the weights.
        order: another number is another order of the pairs within each batch.
    """
    torch.manual_seed(0)
    model = _model(backend, device)
    model = model.double() if double else model
    optimizer = adamw(model, LEARNING_RATE, (0.9, 0.98), 1e-6, 0.2)
    losses = []
    for step, (images, texts) in enumerate(_batches(order)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, LEARNING_RATE, WARMUP, STEPS)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = _loss(model, images.to(device), texts.to(device), backend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale()
        losses.append(loss.detach().double())
    return torch.stack(losses).cpu()


def _model(backend: str, device: str) -> CLIP:
    config = get_model_config(MODEL_NAME)
    model = CLIP(dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=VOCABULARY)))
    model.set_backend(backend)
    return model.to(device)


def _loss(model: CLIP, images: Tensor, texts: Tensor, backend: str) -> Tensor:
    call: Callable[..., tuple[Tensor, Tensor, Tensor]] = model
    return contrastive_loss(*call(images, texts), backend=backend)


def _batches(order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that can be learned: a pattern of colours with noise, and the words of its class."""
    generator = torch.Generator().manual_seed(1)
    patterns = 255 * torch.rand(CLASSES, 3, 4, 4, generator=generator)
    words = torch.randint(1, VOCABULARY - 2, (CLASSES, TOKENS), generator=generator)
    words[:, -1] = VOCABULARY - 1
    shuffles = torch.Generator().manual_seed(order)
    for _ in range(STEPS):
        classes = torch.randperm(CLASSES, generator=generator)[:BATCH]
        pictures = F.interpolate(patterns[classes], scale_factor=8.0)
        noisy = pictures + 40 * torch.randn(pictures.shape, generator=generator)
        images, texts = noisy.clamp(0, 255).to(torch.uint8), words[classes]
        moved = torch.randperm(BATCH, generator=shuffles) if order else torch.arange(BATCH)
        yield images[moved], texts[moved]
