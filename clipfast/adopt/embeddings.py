"""The embeddings of OpenCLIP's towers: patches and texts become tokens in one pass, positions included."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import patch_embed, text_embed
from .places import Proposal, class_name, computes, is_left, is_plain, on_cpus

_VISION = "open_clip.transformer.VisionTransformer"
_DROPOUT = "open_clip.transformer.PatchDropout"


def propose_patch_embed(module: nn.Module) -> Proposal | None:
    """Say what to do with the embedding of images of ``module``; None if it embeds none."""
    kind, name = "patch_embed", class_name(module)
    if name == _VISION and hasattr(module, "_embeds"):  # OpenCLIP < 3 has no such method
        if not is_projection(module.conv1):
            return Proposal(kind, "its convolution has a hook, or is not a projection of square patches without a bias")
        return Proposal(kind, "clipfast.patch_embed", image_tokens, "_embeds")
    if name == "open_clip.modified_resnet.ModifiedResNet":
        return Proposal(kind, "a ResNet has convolutions in place of patches")
    if name.startswith("timm.layers.patch_embed."):
        return Proposal(kind, "timm's patch embedding adds neither positions nor a class token")
    return None


def is_projection(conv: Any) -> bool:
    """Return True if ``conv`` is a convolution that does nothing but project square patches."""
    if not is_plain(conv, nn.Conv2d) or conv.bias is not None or conv.groups != 1 or conv.padding not in ((0, 0), 0):
        return False
    height, width = conv.kernel_size
    return height == width and conv.stride == (height, width) and conv.dilation == (1, 1)


def is_table(table: Any) -> bool:
    """Return True if ``table`` is an embedding that does nothing but look up."""
    options = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
    values = [getattr(table, name, None) for name in options]
    # A padding_idx of 0 equals False, and asks for something.
    return is_plain(table, nn.Embedding) and all(value is None or value is False for value in values)


@on_cpus
def image_tokens(tower: Any, images: Tensor) -> Tensor:
    """Compute the tokens that enter the blocks of an OpenCLIP image tower: [B, 3, H, W] -> [B, 1 + patches, width].

    Images may be uint8 as decoded, where the tower knows its mean and standard deviation (``image_mean`` and
    ``image_std``, which OpenCLIP's factory sets). Patches that are dropped are not read.
    """
    grid = _grid(tower, images)
    if grid is None:
        return type(tower)._embeds(tower, images)
    options = {"mean": tower.image_mean, "std": tower.image_std} if images.dtype == torch.uint8 else {}
    keep = _kept_patches(tower.patch_dropout, len(images), grid[0] * grid[1])
    keep = None if keep is None else keep.to(images.device)
    tokens = patch_embed(
        images, tower.conv1.weight, tower.class_embedding, tower.positional_embedding, keep=keep, **options
    )
    return tower.ln_pre(tokens if keep is not None else tower.patch_dropout(tokens))


def _grid(tower: Any, images: Tensor) -> tuple[int, int] | None:
    """Return the rows and columns of patches; None if our op does not take ``images``."""
    if images.ndim != 4 or not is_projection(tower.conv1) or not computes(images):
        return None
    is_bytes = images.dtype == torch.uint8
    if is_bytes and not (hasattr(tower, "image_mean") and hasattr(tower, "image_std")):
        return None
    if not is_bytes and not images.is_floating_point():
        return None
    size = tower.conv1.kernel_size[0]
    height, width = images.shape[2:]
    grid = (height // size, width // size)
    is_whole = height % size == 0 and width % size == 0 and images.shape[1] == tower.conv1.in_channels
    return grid if is_whole and 1 + grid[0] * grid[1] == len(tower.positional_embedding) else None


def _kept_patches(dropout: Any, batch: int, num_patches: int) -> Tensor | None:
    """Draw the patches [B, K] that OpenCLIP's patch dropout keeps, from the same random numbers; None if it does none.

    None also stands for a dropout that is not OpenCLIP's own, and must be called.
    """
    if class_name(dropout) != _DROPOUT or not is_plain(dropout, type(dropout)):
        return None
    if not dropout.training or dropout.prob == 0 or not dropout.exclude_first_token:
        return None
    kept = max(1, int(num_patches * (1 - dropout.prob)))
    return torch.randn(batch, num_patches).topk(kept, dim=-1).indices


def text_tokens(tower: Any, text: Tensor) -> Tensor | None:
    """Compute tokens plus positions of an OpenCLIP text tower: [B, L] -> [B, L, width]; None if our op does not."""
    table, positions = tower.token_embedding, tower.positional_embedding
    dtype = tower.transformer.get_cast_dtype()
    is_same = is_table(table) and table.weight.dtype == positions.dtype == dtype
    is_text = text.ndim == 2 and text.shape[1] <= len(positions) and text.dtype in (torch.int32, torch.int64)
    if not is_same or not is_text or not computes(table.weight) or is_left(table.weight):
        return None
    # Under autocast, these tokens keep the dtype of the table, as theirs do.
    with torch.autocast(text.device.type, enabled=False):
        return text_embed(text, table.weight, positions)


@on_cpus
def text_embeds(tower: Any, text: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute ``TextTransformer._embeds``: the tokens [B, L, width], and the mask of as many tokens."""
    if attention_mask is not None:
        return type(tower)._embeds(tower, text, attention_mask)
    tokens = text_tokens(tower, text)
    if tokens is None:
        return type(tower)._embeds(tower, text)
    mask, length = tower.attn_mask, tokens.shape[1]
    return tokens, mask if mask is None or len(mask) == length else mask[:length, :length]
