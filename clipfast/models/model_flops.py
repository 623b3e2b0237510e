"""FLOPs of a training step, as PyTorch counts them: the F of MFU."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import CLIP

COUNTED = 2  # FLOPs are counted for this many pairs, and then multiplied, since every pair has the same number


def training_flops(model: CLIP, pairs: int) -> float:
    """Return the model FLOPs of a training step on ``pairs`` pairs, of all processes together.

    The count includes the matrix products and convolutions of the forward pass, and of the backward pass for trainable
    layers; a locked tower has no backward pass. All tokens of a text count, including padding, also where texts are
    packed. Recomputation to save memory does not count. The loss counts as if the logits were kept, with 6 N^2 D.

    Args:
        model: the model on the device "meta", on which nothing is computed.
        pairs: the number of pairs N.
    """
    model.set_backend("torch")  # PyTorch's counter knows only PyTorch's own ops
    size = model.visual.image_size
    model.train()
    with FlopCounterMode(display=False) as counter:
        images = model.encode_image(torch.empty(COUNTED, 3, size, size, device="meta"))
        texts = model.encode_text(torch.empty(COUNTED, model.context_length, dtype=torch.long, device="meta"))
        features = [x for x in (images, texts) if x.requires_grad]
        torch.autograd.backward(features, [torch.empty_like(x) for x in features])
    return pairs / COUNTED * counter.get_total_flops() + 6.0 * pairs**2 * model.config.embed_dim
