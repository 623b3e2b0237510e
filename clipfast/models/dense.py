"""Dense features: a feature of each patch in the embedding space of texts, from models trained on whole images.

The pooling at the end of an image tower is attention with one query, which averages the values of the patches. The
layers after the average can be applied to each value too, and the result is a feature of its patch (MaskCLIP: Zhou et
al. 2022).
"""

from typing import Any

from torch import Tensor

from .clip import CLIP
from .layers import add_norm
from .resnet import ModifiedResNet
from .siglip import SigLIPVision, TimmBlock
from .transformer import Plan, ResidualAttentionBlock, Transformer, plan, run_blocks
from .vision import VisionTransformer

KINDS = ("values", "tokens")


def dense_features(model: CLIP, images: Tensor, features: str = "values") -> Tensor:
    """Compute dense features: one for each patch, which can be compared with features of texts.

    For a vision transformer, "values" are the values of the last block's attention after its output projection, without
    the residual stream and the MLP of that block; "tokens" are the outputs of the last block. For a ResNet, "values"
    are the values of its attention pooling, without positions as in MaskCLIP. For SigLIP, they are the values of its
    attention pooling, followed by the layers after it.

    Args:
        model: a model of clipfast, in evaluation mode if it drops patches in training.
        images: [B, 3, H, W], as for ``encode_image``.
        features: "values", or for a CLIP vision transformer "tokens".

    Returns:
        [B, h, w, embed_dim], not of unit length, for h rows of w patches. A ResNet's patches are 32 pixels wide and
        high.

    Raises:
        TypeError: the model is not one of clipfast.
        ValueError: the name of the features is unknown, the model does not have them, or patches are dropped.
    """
    if features not in KINDS:
        raise ValueError(f"dense_features: features must be {' or '.join(KINDS)}, got {features!r}")
    visual: Any = getattr(model, "visual", None)
    if isinstance(visual, VisionTransformer):
        found = _of_vit(visual, images, features)
    elif not isinstance(visual, ModifiedResNet | SigLIPVision):
        raise TypeError(f"dense_features: model must be one of clipfast.create_model, got a {type(model).__name__}")
    elif features == "tokens":
        raise ValueError(
            "dense_features: 'tokens' are in the space of texts in CLIP's vision transformers only: use 'values'"
        )
    elif isinstance(visual, ModifiedResNet):
        return _of_resnet(visual, images)
    else:
        found = _of_siglip(visual, images)
    grid = tuple(side // visual.patch_size for side in images.shape[-2:])
    if found.shape[1] != grid[0] * grid[1]:
        raise ValueError("dense_features: patches were dropped, so the others are no grid: call model.eval() first")
    return found.unflatten(1, grid)


def _of_vit(visual: VisionTransformer, images: Tensor, features: str) -> Tensor:
    """Compute the dense features of a vision transformer."""
    x = visual.ln_pre(visual.embed(images))
    transformer: Transformer = visual.transformer
    if features == "tokens":
        x = transformer(x)
    else:
        recompute, blocks, *_ = plan(transformer)
        x, branch = run_blocks(Plan(recompute, blocks[:-1]), x)
        last: Any = blocks[-1]
        x = _values(last, add_norm(x, branch, last.ln_1)[1])
    return visual.ln_post(x[:, 1:]) @ visual.proj


def _values(block: ResidualAttentionBlock, normed: Tensor) -> Tensor:
    """Return the output of a block's attention as if each token attended only to itself."""
    values: Tensor = block.attn.in_proj(normed).chunk(3, -1)[2]
    return block.attn.out_proj(values)


def _of_siglip(visual: SigLIPVision, images: Tensor) -> Tensor:
    """Compute the dense features of SigLIP's image tower."""
    trunk = visual.trunk
    x, branch = run_blocks(Plan(False, list(trunk.blocks)), visual.embed(images), kind=TimmBlock)
    pool = trunk.attn_pool
    values = pool.proj(pool.kv(add_norm(x, branch, trunk.norm)[1]).chunk(2, -1)[1])
    return values + pool.mlp(pool.norm(values))


def _of_resnet(visual: ModifiedResNet, images: Tensor) -> Tensor:
    """Compute the dense features of a ResNet."""
    x = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    return visual.attnpool.c_proj(visual.attnpool.v_proj(x.permute(0, 2, 3, 1)))
