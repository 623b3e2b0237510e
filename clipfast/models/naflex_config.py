"""The settings of NaFlex image towers, by the names of timm's models in OpenCLIP's configurations."""

import dataclasses

from .model_config import VisionConfig

EXACT, TANH = "none", "tanh"


@dataclasses.dataclass(frozen=True)
class NaFlexConfig(VisionConfig):
    """Settings of an image tower for images of several sizes; for those that others have too, see their class.

    Attributes:
        image_seq_len: the patches of an image in evaluation.
        pool: "map" (attention pooling) or "avg" (the mean of patches, a norm, and a projection).
        reg_tokens: register tokens before the patches of each image (Darcet et al. 2024).
        init_values: the initial factors of the branches of blocks, or None if these are not scaled.
        interpolation: how positions are resized, "bilinear" or "bicubic".
        pos_embed_grid_size: the rows and columns of the table of positions.
        gelu: "none" for the exact GELU, "tanh" for its approximation.
    """

    image_seq_len: int = 256
    pool: str = "map"
    reg_tokens: int = 0
    init_values: float | None = None
    interpolation: str = "bicubic"
    pos_embed_grid_size: tuple[int, int] = (16, 16)
    gelu: str = EXACT

    @property
    def depth(self) -> int:
        """The number of blocks."""
        assert isinstance(self.layers, int)
        return self.layers

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""
        assert self.patch_size is not None
        return self.patch_size
