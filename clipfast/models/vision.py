"""Vision transformer (Dosovitskiy et al. 2021) as CLIP uses it: layer norm before the blocks, class token projected."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import patch_embed
from ..kernels.dtypes import accumulate_dtype
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from .config import VisionConfig
from .transformer import LayerNorm, Transformer, pooled


def interpolate_positions(positional_embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions of a grid of patches for a grid of another size: what OpenCLIP (``resize_pos_embed``) does to those of
    a checkpoint. Bicubic with antialiasing, corners not aligned, in float32 at least; the class token's stays.
    Differentiable.

    Args:
        positional_embedding: [1 + h * w, E], the class token's first, of any floating dtype.
        old_grid: (h, w), rows and columns of patches.
        new_grid: (H, W), likewise.

    Returns:
        [1 + H * W, E] in the same dtype; ``positional_embedding`` itself where the grids are the same.

    Raises:
        ValueError: not as many positions as ``old_grid`` has, or a grid without any.
    """
    if min(*old_grid, *new_grid) < 1 or len(positional_embedding) != 1 + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"interpolate_positions: expected 1 + h * w positions of grids of at least one patch, "
            f"got {len(positional_embedding)} for {old_grid} to {new_grid}"
        )
    if new_grid == old_grid:
        return positional_embedding
    of_class, of_patches = positional_embedding[:1], positional_embedding[1:]
    grid = of_patches.to(accumulate_dtype(of_patches.dtype)).unflatten(0, old_grid)  # [h, w, E]
    # As two products, since the gradient of F.interpolate comes of atomics on a GPU.
    with torch.autocast(grid.device.type, enabled=False):
        rows = (_resizing(old_grid[0], new_grid[0], grid) @ grid.flatten(1)).unflatten(1, grid.shape[1:])  # [H, w, E]
        resized = _resizing(old_grid[1], new_grid[1], grid) @ rows  # [H, W, E]
    return torch.cat([of_class, resized.flatten(0, 1).to(of_class.dtype)])


def _resizing(old: int, new: int, like: Tensor) -> Tensor:
    """[new, old], what each of the old values counts in each of the new along one side."""
    each = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(each, (new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


class VisionTransformer(nn.Module):
    """Images to features.

    Takes uint8 images as decoded (normalised by ``image_mean`` and ``image_std`` inside the patch embedding) or
    floating images that are already normalised, of any size that is a multiple of the patch size: where it is not
    ``image_size`` squared, positions are interpolated.

    In training mode the share ``patch_dropout`` of each image's patches is dropped before they are embedded (FLIP: Li
    et al. 2023), others for each image and each time, and at least one is kept.
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
        self.patch_size, self.patch_dropout = config.patch_size, config.patch_dropout
        self.grid_size = (config.image_size // config.patch_size,) * 2
        tokens = 1 + self.grid_size[0] * self.grid_size[1]
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
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        positions: Tensor = self.positional_embedding
        # what is wrong with a grid without patches, the patch embedding says
        if grid != self.grid_size and min(grid) > 0:
            positions = interpolate_positions(positions, self.grid_size, grid)
        x = patch_embed(
            images, self.conv1.weight, self.class_embedding, positions, keep=self._kept_patches(images, grid),
            mean=self.image_mean, std=self.image_std, backend=self.backend,
        )  # fmt: skip
        x = pooled(self.transformer, x, norm=self.ln_pre)
        return self.ln_post(x) @ self.proj

    def _kept_patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """[B, K], the patches of each image that stay, drawn on the images' device; None where all do."""
        if not self.training or self.patch_dropout == 0:
            return None
        num_patches = grid[0] * grid[1]
        kept = max(1, int(num_patches * (1 - self.patch_dropout)))
        return torch.rand(len(images), num_patches, device=images.device).topk(kept, dim=1).indices
