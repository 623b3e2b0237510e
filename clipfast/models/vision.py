"""CLIP's vision transformer (Dosovitskiy et al. 2021), with a layer norm before the blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import patch_embed
from ..kernels.dtypes import accumulate_dtype
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from .freezing import Group, Lockable, groups_of_blocks
from .intermediates import Indices, check_format, collect_blocks
from .layers import LayerNorm
from .model_config import VisionConfig
from .transformer import Transformer, read_rows


def interpolate_positions(positional_embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize the positional embedding to another grid of patches, as OpenCLIP (``resize_pos_embed``) does on loading.

    The interpolation is bicubic with antialiasing, without aligned corners, in float32 at least, and differentiable.
    The position of the class token stays as it is.

    Args:
        positional_embedding: [1 + h * w, E], of any floating dtype; the class token comes first.
        old_grid: (h, w), its rows and columns of patches.
        new_grid: (H, W), the rows and columns to resize to.

    Returns:
        [1 + H * W, E] in the same dtype; ``positional_embedding`` itself if the grids are equal.

    Raises:
        ValueError: a grid is empty, or the size of ``old_grid`` differs from the number of positions.
    """
    if min(*old_grid, *new_grid) < 1 or len(positional_embedding) != 1 + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"interpolate_positions: expected 1 + h * w positions of grids of at least one patch, "
            f"got {len(positional_embedding)} for {old_grid} to {new_grid}"
        )
    if new_grid == old_grid:
        return positional_embedding
    return torch.cat([positional_embedding[:1], resize_grid(positional_embedding[1:], old_grid, new_grid)])


def resize_grid(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize positions without a class token like :func:`interpolate_positions`: [h * w, E] -> [H * W, E]."""
    grid = patches.to(accumulate_dtype(patches.dtype)).unflatten(0, old_grid)  # [h, w, E]
    # Two matrix products replace F.interpolate, whose backward pass on a GPU uses atomics and is not deterministic.
    with torch.autocast(grid.device.type, enabled=False):
        rows = (_resizing(old_grid[0], new_grid[0], grid) @ grid.flatten(1)).unflatten(1, grid.shape[1:])  # [H, w, E]
        resized = _resizing(old_grid[1], new_grid[1], grid) @ rows  # [H, W, E]
    return resized.flatten(0, 1).to(patches.dtype)


def _resizing(old: int, new: int, like: Tensor) -> Tensor:
    """Return the interpolation matrix [new, old] of positions along one side of the grid."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(identity, (new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def draw_kept_patches(batch: int, grid: tuple[int, int], dropout: float, device: torch.device) -> Tensor | None:
    """Draw the indices [batch, K] of the patches that patch dropout keeps; it drops the share ``dropout``.

    At least one patch is kept. None means that all are kept.
    """
    if dropout == 0:
        return None
    num_patches = grid[0] * grid[1]
    kept = max(1, int(num_patches * (1 - dropout)))
    return torch.rand(batch, num_patches, device=device).topk(kept, dim=1).indices


class VisionTransformer(Lockable):
    """CLIP's image tower: a vision transformer.

    It takes uint8 images as decoded, which the patch embedding normalises by ``image_mean`` and ``image_std``, or
    floating images that are normalised already. Height and width may be any multiples of the patch size; if they are
    not ``image_size``, positions are interpolated.

    In training mode, the share ``patch_dropout`` of the patches is dropped before they are embedded (FLIP: Li et al.
    2023). They are drawn anew for each image and each call, and at least one patch is kept.
    """

    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    resize_mode = "shortest"

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
        # The patch embedding op uses only the weight of this convolution, which gives it the published name and initial
        # values.
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
        """Compute the features of images: [B, 3, H, W] -> [B, embed_dim]."""
        x = read_rows(self.transformer, self.ln_pre(self.embed(images)))
        return self.ln_post(x) @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """Return the class token and the patches with their positions: [B, 3, H, W] -> [B, tokens, width]."""
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        positions: Tensor = self.positional_embedding
        # An empty grid is not interpolated, because the patch embedding op raises a clearer error about the images.
        if grid != self.grid_size and min(grid) > 0:
            positions = interpolate_positions(positions, self.grid_size, grid)
        keep = draw_kept_patches(len(images), grid, self.patch_dropout, images.device) if self.training else None
        return patch_embed(
            images, self.conv1.weight, self.class_embedding, positions, keep=keep,
            mean=self.image_mean, std=self.image_std, backend=self.backend,
        )  # fmt: skip

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Return the outputs of blocks, beside the features of the images.

        Args:
            x: images, [B, 3, H, W].
            indices: the blocks: a number n for the last n, a list of indices, or None for all.
            stop_early: do not run the blocks after the last one that is returned; features are computed from that
                block.
            normalize_intermediates: apply the last norm to the output of every block.
            intermediates_only: leave the features out.
            output_fmt: "NCHW" for [B, width, h, w], "NLC" for [B, h * w, width].
            output_extra_tokens: also return the class token of every block.

        Returns:
            ``image_intermediates``, ``image_intermediates_prefix`` ([B, 1, width] each) and ``image_features``.

        Raises:
            ValueError: an index or a format is unknown, or "NCHW" is wanted while patches are dropped.
        """
        check_format(output_fmt, ("NCHW", "NLC"))
        height, width = (side // self.patch_size for side in x.shape[-2:])
        x, found = collect_blocks(self.transformer, self.ln_pre(self.embed(x)), indices, stop_early)
        if normalize_intermediates:
            found = [self.ln_post(stage) for stage in found]
        patches = [stage[:, 1:] for stage in found]
        if output_fmt == "NCHW":
            if patches[0].shape[1] != height * width:
                raise ValueError(
                    "forward_intermediates: patches were dropped, so the others are no grid: call model.eval() first, "
                    "or ask for the format 'NLC'"
                )
            patches = [stage.transpose(1, 2).unflatten(2, (height, width)).contiguous() for stage in patches]
        output: dict[str, Any] = {"image_intermediates": patches}
        if output_extra_tokens:
            output["image_intermediates_prefix"] = [stage[:, :1] for stage in found]
        if not intermediates_only:
            output["image_features"] = self.ln_post(x[:, 0]) @ self.proj
        return output

    def layer_groups(self) -> list[Group]:
        """Return the groups of the tower's layers, from input to output, for locking and layer-wise learning rates."""
        embedding: Group = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        return [embedding, *groups_of_blocks(self.transformer.resblocks, self.ln_post), [self.proj]]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the image tower's embeddings and positions, which get no weight decay."""
        return {"positional_embedding", "class_embedding"}
