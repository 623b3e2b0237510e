"""Vision transformer (Dosovitskiy et al. 2021) as CLIP uses it: layer norm before the blocks, class token projected."""

import torch
from torch import Tensor, nn

from ..kernels import patch_embed
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from .config import VisionConfig
from .transformer import LayerNorm, Transformer, pooled


class VisionTransformer(nn.Module):
    """Images to features.

    Takes uint8 images as decoded (normalised by ``image_mean`` and ``image_std`` inside the patch embedding) or
    floating images that are already normalised.
    """

    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    def __init__(self, config: VisionConfig, embed_dim: int, *, quick_gelu: bool) -> None:
        super().__init__()
        if not isinstance(config.layers, int) or config.patch_size is None:
            raise ValueError(f"a vision transformer needs a number of layers and a patch_size, got {config}")
        if config.image_size % config.patch_size or config.width % config.head_width:
            raise ValueError(f"image_size must be a multiple of patch_size, and width of head_width, got {config}")
        self.image_size, self.backend = config.image_size, "auto"
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        std = config.width**-0.5
        # A convolution in name only: it holds the projection under the key and with the initialisation of the
        # published models.
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(std * torch.randn(tokens, config.width))
        self.ln_pre = LayerNorm(config.width)
        self.transformer = Transformer(
            config.width, config.layers, config.heads, config.mlp_ratio, causal=False, quick_gelu=quick_gelu
        )
        self.ln_post = LayerNorm(config.width)
        self.proj = nn.Parameter(std * torch.randn(config.width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, embed_dim]."""
        x = patch_embed(
            images, self.conv1.weight, self.class_embedding, self.positional_embedding,
            mean=self.image_mean, std=self.image_std, backend=self.backend,
        )  # fmt: skip
        x = pooled(self.transformer, x, norm=self.ln_pre)
        return self.ln_post(x) @ self.proj
