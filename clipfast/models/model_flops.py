"""FLOPs of a training step, as PyTorch counts them: the F of MFU."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import CLIP

COUNTED = 2  # pairs that are run: attention has more FLOPs for more tokens, but each pair has as many as another


def training_flops(model: CLIP, pairs: int) -> float:
    """Return the model FLOPs of a training step on ``pairs`` pairs, of all processes together.

    Counted are the products and convolutions of the forward pass, and of the backward pass for what is trained: a
    locked tower has none. Texts count with all their tokens, and so does padding. What is computed a second time, to
    save memory, does not count. The loss counts as published, with logits that are kept: 6 N^2 D.

    Args:
        model: lies on "meta", so that nothing is computed.
        pairs: N.
    """
    model.set_backend("torch")  # the counter knows PyTorch's own ops
    size = model.visual.image_size
    model.train()
    with FlopCounterMode(display=False) as counter:
        images = model.encode_image(torch.empty(COUNTED, 3, size, size, device="meta"))
        texts = model.encode_text(torch.empty(COUNTED, model.context_length, dtype=torch.long, device="meta"))
        features = [x for x in (images, texts) if x.requires_grad]
        torch.autograd.backward(features, [torch.empty_like(x) for x in features])
    return pairs / COUNTED * counter.get_total_flops() + 6.0 * pairs**2 * model.config.embed_dim
