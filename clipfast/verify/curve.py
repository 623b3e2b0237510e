"""Verify a training curve: compare the losses of fifty training steps with those of PyTorch in float64.

A small difference in one gradient grows from step to step, so the curve shows errors that no single call shows. The
allowed difference is measured: the reference backend is trained in the dtype of the check twice, the second time with
the pairs of each batch in another order, which changes only the order of sums. The losses of both runs differ from
those in float64. Three times the larger difference is allowed, as for gradients.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..kernels import contrastive_loss
from ..kernels.spec import CUDA
from ..models import CLIP, get_model_config
from ..train.optim import adamw
from ..train.schedule import cosine_lr, set_lr
from .context import exact_float32
from .options import CURVE
from .report import CheckResult, results_of
from .rule import GRADIENT, KINDS, Figure, Judgement

MODEL_NAME = "ViT-T-8-32"
STEPS, BATCH, CLASSES, TOKENS = 50, 16, 64, 12
VOCABULARY = 1024  # smaller than CLIP's 49,408 tokens, with which the same training only takes longer
LEARNING_RATE, WARMUP = 1e-3, 5
# The number of training runs of the reference backend. The first sees the pairs of a batch in the same order as the run
# with kernels. The other shuffles them, and so shows how far losses drift apart by rounding alone.
ORDERS = 2


def verify_curve(leg: str, dtype: str) -> list[CheckResult]:
    """Train with the kernels on a leg, in float32 or with bfloat16 autocast, and check the losses of all steps."""
    device = "cuda" if leg == CUDA else "cpu"
    autocast = None if dtype == "float32" else torch.bfloat16
    ours = train("auto", device, autocast=autocast)
    with exact_float32():
        truth = train("torch", device, double=True)
        references = [train("torch", device, autocast=autocast, order=order) for order in range(ORDERS)]
        drifts = [_relative_errors(losses, truth) for losses in references]
    figures = []
    for kind, error in _relative_errors(ours, truth).items():
        drift = max(drift[kind] for drift in drifts)
        figures.append(Figure(kind, error, drift, GRADIENT * drift + torch.finfo(torch.float32).eps))
    template = CheckResult(
        CURVE, leg, "training", f"{MODEL_NAME} with {VOCABULARY} words, {STEPS} steps of {BATCH} pairs", dtype,
        why=f"loss {truth[0].item():.3f} to {truth[-1].item():.3f}; relative, all steps; the allowance is the drift of "
        f"{ORDERS} runs of the reference",
        truth="float64",
    )  # fmt: skip
    fault = "" if ours.isfinite().all() else "the loss is not finite"
    return results_of(template, {"loss": Judgement(tuple(figures), fault)})


def _relative_errors(losses: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the largest ("max") and the RMS error of training losses [STEPS], relative to the losses in float64."""
    return {kind: reduce((losses - truth) / truth) for kind, reduce in KINDS.items()}


def train(
    backend: str, device: str, *, double: bool = False, autocast: torch.dtype | None = None, order: int = 0,
    steps: int | None = None, norms: list[float] | None = None,
) -> Tensor:  # fmt: skip
    """Train a small CLIP model on synthetic pairs for the verification and return its losses [STEPS] in float64.

    Args:
        backend: the backend of all ops: "auto" or "torch".
        device: "cpu" or "cuda".
        double: whether weights are float64 instead of float32.
        autocast: the dtype of autocast; None turns it off.
        order: 0 keeps the order of the pairs within each batch; any other value seeds a random order.
        steps: the number of steps, by default STEPS.
        norms: a list to which the norm of all gradients is appended in each step.
    """
    torch.manual_seed(0)
    config = get_model_config(MODEL_NAME)
    model = CLIP(dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=VOCABULARY)))
    model.set_backend(backend)
    model.to(device, torch.float64 if double else torch.float32)
    optimizer = adamw(model, LEARNING_RATE, (0.9, 0.98), 1e-6, 0.2)
    losses = []
    for step, (images, texts) in enumerate(itertools.islice(_batches(order), steps)):
        set_lr(optimizer, cosine_lr(step, LEARNING_RATE, WARMUP, STEPS))
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = contrastive_loss(*model(images.to(device), texts.to(device)), backend=backend)
        optimizer.zero_grad()
        loss.backward()
        if norms is not None:
            norms.append(get_total_norm([x.grad for x in model.parameters() if x.grad is not None]).item())
        optimizer.step()
        model.clamp_logit_scale()
        losses.append(loss.detach().double())
    return torch.stack(losses).cpu()


def _batches(order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield STEPS synthetic batches that a model can learn: noisy images of a class, and the fixed text of the class.

    Images are uint8 [BATCH, 3, 32, 32], texts int64 [BATCH, TOKENS]; ``order`` is that of :func:`train`.
    """
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
