"""Checks of losses of CLIP and SigLIP in other packages: ``pip install --no-deps memeff siglip-kernel``."""

import torch
import torch.nn.functional as F

from clipfast.kernels.reference import contrastive_loss
from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck

TEMPERATURE = 0.07


def memeff_loss(image, text):
    """Return memeff's CLIP loss of features of unit length."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=TEMPERATURE, normalized_inputs=True, stable=False)(image, text)


def siglip_loss(image, text, log_temperature, bias):
    """Return siglip-kernel's loss, by the kernel that it chooses for the dtype."""
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(image, text, log_temperature, bias)


def siglip_reference(image, text, log_temperature, bias):
    """Return the SigLIP loss in plain PyTorch."""
    logits = image @ text.T * log_temperature.exp() + bias
    return -F.logsigmoid(logits * (2 * torch.eye(len(image), device=image.device) - 1).to(logits)).sum() / len(image)


def features(draw, pairs, width):
    """Return image and text features of unit length, in which pairs are alike."""
    image = draw.unit(pairs, width)
    return {"image": image, "text": F.normalize(image + draw.unit(pairs, width), dim=-1)}


def floor(itemsize, pairs, width):
    """Return the least work of a loss, forward and backward: three products of all pairs, features and gradients."""
    return Floor(6 * pairs * pairs * width, 4 * itemsize * pairs * width)


MEMEFF = KernelCheck(
    function=memeff_loss, reference=lambda image, text: contrastive_loss(image, text, 1 / TEMPERATURE),
    inputs=features, shapes=[{"pairs": 24, "width": 64}, {"pairs": 70, "width": 128}],
    real={"pairs": 2048, "width": 512}, extremes=("zeros",), floor=floor,
)  # fmt: skip

SIGLIP = KernelCheck(
    function=siglip_loss, reference=siglip_reference,
    inputs=lambda draw, pairs, width: {
        **features(draw, pairs, width), "log_temperature": torch.tensor(2.3), "bias": torch.tensor(-10.0)
    },
    shapes=[{"pairs": 24, "width": 64}, {"pairs": 70, "width": 128}], real={"pairs": 2048, "width": 512},
    extremes=("zeros",), float32=("log_temperature", "bias"), floor=floor,
)  # fmt: skip
