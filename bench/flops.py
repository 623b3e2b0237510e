"""FLOPs of CLIP models, counted by PyTorch on meta tensors: the F of MFU, and the floor of a training step.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, PaLM, appendix B) = model FLOPs of a step / (seconds of the step x
peak rate of the matrix units). A multiply-add is two operations; only products and convolutions are counted. Backward
takes two products for each product of the forward pass, so a step is three forward passes and the loss.

Two numbers belong to a step of N pairs with D features, and they differ on purpose:

* :func:`step_flops`, for MFU, counts the published architecture, whatever an implementation leaves out or does twice.
  Every token counts in every layer, and all scores of a causal layer count. The published loss keeps its logits, so it
  needs one product of the features forward and two backward, each of 2 N^2 D: 6 N^2 D.
* :func:`step_floor_flops`, for "of floor", counts the products of our own step. Our loss keeps no N x N matrix and
  computes the logits once more in backward: 8 N^2 D, as the specification of ``contrastive_loss`` says. Our
  attention pool of a ResNet has one query, where the published one has as many as there are positions.
"""

import functools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipfast import create_model
from clipfast.kernels.contrastive.cases import LossShape
from clipfast.kernels.hardware import card_named
from clipfast.kernels.spec import specs
from clipfast.models.resnet import ModifiedResNet

DEFINITION = "3 x forward of the published model + 6 N^2 D for the loss"


def step_flops(name: str, pairs: int) -> float:
    """Return the model FLOPs of a training step of the published model ``name`` on ``pairs`` pairs."""
    flops, embed_dim = forward_flops(name)
    return 3.0 * pairs * flops + 6.0 * pairs**2 * embed_dim


def step_floor_flops(name: str, pairs: int) -> float:
    """Return the FLOPs that our own training step needs at least.

    The counter sees all rows of the last block, also those that a step does not need. So a step may come nearer to this
    floor than seems possible.
    """
    flops, embed_dim = forward_flops(name, published=False)
    loss = specs()["contrastive_loss"]
    shape = LossShape(pairs, embed_dim)
    return 3.0 * pairs * flops + loss.floor(shape, 0, False).flops + loss.floor(shape, 0, True).flops


@functools.cache
def forward_flops(name: str, *, published: bool = True) -> tuple[float, int]:
    """Return the FLOPs of one pair through both towers of the model ``name``, and the number of features.

    ``published`` counts the attention pool of a ResNet as published: the queries, keys and values of all positions.
    """
    model = create_model(name, device="meta", backend="torch")
    size, embed_dim, pool = model.visual.image_size, model.config.embed_dim, 0.0
    if published and isinstance(model.visual, ModifiedResNet):
        tokens, width = model.visual.attnpool.positional_embedding.shape
        pool = tokens * (6.0 * width**2 + 4.0 * tokens * width + 2.0 * width * embed_dim)
        model.visual.add_module("attnpool", nn.Identity())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.empty(1, 3, size, size, device="meta"))
        model.encode_text(torch.empty(1, model.context_length, dtype=torch.long, device="meta"))
    return pool + counter.get_total_flops(), embed_dim


def data_sheet_flops_per_s(gpu: str, dtype: str) -> float | None:
    """Return the dense peak of the card whose driver name is ``gpu``, or None if the hardware table lacks it."""
    card = card_named(gpu)
    return None if card is None else card.peak(half=dtype != "fp32")
