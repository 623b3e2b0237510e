"""FLOPs of a training step, as PyTorch counts them: the F of MFU."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import CLIP
from .naflex import NaFlexVision

COUNTED = 2  # FLOPs are counted for this many pairs, and then multiplied, since all pairs take equally many


def training_flops(model: CLIP, pairs: int, seq_len: int | None = None) -> float:
    """Return the model FLOPs of a training step on ``pairs`` pairs, of all processes together.

    The count includes the matrix products and convolutions of the forward pass, and of the backward pass for trainable
    layers; a locked tower has no backward pass. All tokens of a text count, including padding, also where texts are
    packed. Recomputation to save memory does not count. The loss counts as if the N x N logits were kept, with 6 N^2 D
    for features of D numbers.

    Args:
        model: the model on the device "meta", on which nothing is computed.
        pairs: the number of pairs N.
        seq_len: the patches of each image of a NaFlex model; default: those of images of the model's own size.
    """
    model.set_backend("torch")  # PyTorch's counter knows only PyTorch's own ops
    model.train()
    with FlopCounterMode(display=False) as counter:
        images = _image_features(model, seq_len)
        texts = model.encode_text(torch.empty(COUNTED, model.context_length, dtype=torch.long, device="meta"))
        features = [x for x in (images, texts) if x.requires_grad]
        torch.autograd.backward(features, [torch.empty_like(x) for x in features])
    return pairs / COUNTED * counter.get_total_flops() + 6.0 * pairs**2 * model.config.embed_dim


def _image_features(model: CLIP, seq_len: int | None) -> Tensor:
    """Return features on the device "meta" of ``COUNTED`` images, so that the FLOPs of the image tower are counted."""
    visual, size = model.visual, model.visual.image_size
    if not isinstance(visual, NaFlexVision):
        return model.encode_image(torch.empty(COUNTED, 3, size, size, device="meta"))
    # Packing reads the sizes of images, and tensors on "meta" have no values: these tokens are not packed.
    trunk = visual.trunk
    shape = COUNTED, seq_len or (size // visual.patch_size) ** 2, trunk.embeds.proj.in_features
    x = trunk.embeds.proj(torch.empty(shape, device="meta"))
    x = torch.cat([x.new_empty(COUNTED, trunk.embeds.num_prefix, x.shape[-1]), x], 1)
    for block in trunk.blocks:
        x = block(x)
    x = trunk.fc_norm(x.mean(1)) if trunk.attn_pool is None else trunk.attn_pool(trunk.norm(x))
    for projection in visual.head.values():
        x = projection(x)
    return x
