"""NaFlex image towers, with the parameter names of timm's ``NaFlexVit`` in OpenCLIP: images keep their aspect ratio.

A tower takes :class:`~clipfast.models.packed_images.PackedImages`. Its blocks are those of :mod:`.siglip` on packed
tokens, so that nothing is padded or masked.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import patch_embed_packed
from ..kernels.dtypes import accumulate_dtype
from ..kernels.packing import Packing, pack
from ..kernels.reference import CLIP_MEAN, CLIP_STD
from .clip import CLIP
from .freezing import Group, Lockable, groups_of_blocks
from .layers import LayerNorm, PackedTokens, add_norm
from .naflex_config import NaFlexConfig
from .packed_images import PackedImages, pack_images, patch_size_of, unpad_images
from .siglip import IMAGE_MEAN, IMAGE_STD, LatentPool, SigLIP, TimmBlock, init_linear_layers
from .siglip_config import EPS, EXACT, SigLIPConfig
from .transformer import Plan, run_blocks


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021)."""

    def __init__(self, width: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the factors, in the dtype of ``x``: [..., width] -> [..., width]."""
        return x * self.gamma.to(x.dtype)


class ScaledBlock(TimmBlock):
    """:class:`TimmBlock` with a :class:`LayerScale` at the end of both branches."""

    def __init__(self, width: int, heads: int, hidden: int, approximate: str, init_value: float) -> None:
        super().__init__(width, heads, hidden, approximate)
        self.ls1, self.ls2 = LayerScale(width, init_value), LayerScale(width, init_value)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Return the residual stream after both branches: [B, N, width] -> [B, N, width]; [1, T, width] if packed."""
        packed = () if packing is None else (packing,)
        x, normed = add_norm(x, self.ls1(self.attn(self.norm1(x), *packed)), self.norm2)
        return x + self.ls2(self.mlp(normed))


class NaFlexEmbeds(nn.Module):
    """The embedding of packed images, with timm's names: projection, positions, and registers before each image."""

    backend = "auto"

    def __init__(self, config: NaFlexConfig) -> None:
        super().__init__()
        width, registers = config.width, config.reg_tokens
        self.interpolation = config.interpolation
        self.proj = nn.Linear(3 * config.patch**2, width)
        self.pos_embed = nn.Parameter(torch.empty(1, *config.pos_embed_grid_size, width))
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        nn.init.normal_(self.pos_embed, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    @property
    def num_prefix(self) -> int:
        """The number of tokens before the patches of each image."""
        return 0 if self.reg_token is None else self.reg_token.shape[1]

    def forward(self, images: PackedImages, packing: Packing, mean: Any, std: Any) -> Tensor:
        """Embed the patches of images, and add positions: N patches of B images -> [N + B num_prefix, width].

        Patches may have another size than the tower's.
        """
        weight = self.proj.weight
        if weight.shape[1] != images.patches.shape[1]:
            weight = resize_weight(weight, images.patch_size, self.interpolation)
        return patch_embed_packed(
            images.patches, images.grids, weight, self.pos_embed[0], cu_seqlens=packing, bias=self.proj.bias,
            prefix=None if self.reg_token is None else self.reg_token[0], interpolation=self.interpolation,
            mean=mean, std=std, backend=self.backend,
        )  # fmt: skip


def places_of(images: PackedImages, num_prefix: int) -> Packing:
    """Return the bounds of each packed image among all tokens, with ``num_prefix`` tokens before its patches."""
    lengths = images.grids.prod(1) + num_prefix
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return pack(cu_seqlens, images.patches.shape[0] + num_prefix * images.grids.shape[0])


def resize_weight(weight: Tensor, patch_size: int, interpolation: str) -> Tensor:
    """Resize the projection of patches for patches of another size: [E, P P 3] -> [E, P' P' 3].

    The projection is multiplied by the pseudo-inverse of the matrix that resizes a patch (Beyer et al. 2023), as in
    timm, so that the projection of an enlarged patch equals that of the original patch.
    """
    old = patch_size_of(weight)
    values = weight.to(accumulate_dtype(weight.dtype)).unflatten(1, (old, old * 3))
    inverse = _inverse_of_resizing(old, patch_size, interpolation, values.dtype, values.device)
    with torch.autocast(values.device.type, enabled=False):
        rows = (inverse @ values).unflatten(2, (old, 3))  # [E, P', P, 3]
        resized = inverse @ rows  # [E, P', P', 3]
    return resized.flatten(1).to(weight.dtype)


def _inverse_of_resizing(old: int, new: int, interpolation: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the transposed pseudo-inverse [new, old] of the matrix that resizes one side of a patch."""
    return _known_inverse(old, new, interpolation, dtype, device)


# torch.compiler.assume_constant_result would set the same mark. Without the mark, torch.compile would ignore the cache,
# and trace how the matrix is computed.
_inverse_of_resizing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _known_inverse(old: int, new: int, interpolation: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Compute the matrix of :func:`_inverse_of_resizing`, once for each set of arguments."""
    # The cached matrix is used by later calls too. So it must be a normal tensor, even if this call has fake tensors or
    # is in inference mode.
    with _disable_current_modes(), torch.inference_mode(False):
        identity = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
        matrix = F.interpolate(identity, (new, old), mode=interpolation, antialias=True)[0, 0]
        inverse = torch.linalg.pinv(matrix).T.to(device, dtype)
        # This does the same as torch._dynamo.mark_static, but imports no compiler: the sizes of constants never change.
        inverse._dynamo_static_indices = {0, 1}
        return inverse


class NaFlexTrunk(nn.Module):
    """A vision transformer for images of several sizes, with timm's names; pooled by attention or by the mean."""

    def __init__(self, config: NaFlexConfig, gelu: str) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        sizes = width, config.heads, hidden, gelu
        self.grad_checkpointing: bool | str = False
        self.embeds = NaFlexEmbeds(config)
        if config.init_values is None:
            blocks = [TimmBlock(*sizes) for _ in range(config.depth)]
        else:
            blocks = [ScaledBlock(*sizes, config.init_values) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        has_pool = config.pool == "map"
        self.norm = LayerNorm(width, EPS) if has_pool else nn.Identity()
        self.attn_pool = LatentPool(*sizes) if has_pool else None
        self.fc_norm = nn.Identity() if has_pool else LayerNorm(width, EPS)
        self._init_as_timm_does()

    def _init_as_timm_does(self) -> None:
        """Initialise the linear layers as timm does: output layers get smaller weights in later blocks."""
        init_linear_layers(self)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, 1):
                parts: Any = block
                for weight in (parts.attn.proj.weight, parts.mlp.fc2.weight):
                    weight.div_((2 * number) ** 0.5)
        if self.attn_pool is not None:
            self.attn_pool.init_latent()

    def forward(self, images: PackedImages, mean: Any, std: Any) -> Tensor:
        """Compute the pooled output for packed images, in the order of their batch: [B, width]."""
        packing = places_of(images, self.embeds.num_prefix)
        x = self.embeds(images, packing, mean, std)[None]
        recompute = torch.is_grad_enabled() and self.grad_checkpointing
        x, branch = run_blocks(Plan(recompute, list(self.blocks)), x, packing, TimmBlock)
        if self.attn_pool is not None:
            pooled = self.attn_pool(add_norm(x, branch, self.norm)[1], PackedTokens(packing, images.max_patches))
        else:
            x = x if branch is None else x + branch
            pooled = self.fc_norm(mean_of_images(x[0], packing, self.embeds.num_prefix))
        return pooled[images.order]


def mean_of_images(x: Tensor, packing: Packing, num_prefix: int) -> Tensor:
    """Return the mean of the patches' tokens of each packed image, summed in float32: [T, width] -> [B, width]."""
    ends = packing.cu_seqlens
    in_image = torch.arange(x.shape[0], device=x.device) - packing.bounds[0]
    patches = x.to(accumulate_dtype(x.dtype)).where((in_image >= num_prefix)[:, None], 0)
    sums = torch.segment_reduce(patches, "sum", offsets=ends.long(), axis=0, unsafe=True)
    return (sums / (ends.diff()[:, None] - num_prefix)).to(x.dtype)


class NaFlexVision(Lockable):
    """A NaFlex image tower. It takes packed images, a padded batch of timm or transformers, or images to pack."""

    backend = "auto"

    def __init__(self, config: NaFlexConfig, embed_dim: int, gelu: str = EXACT, *, is_siglip: bool = False) -> None:
        super().__init__()
        self.image_mean: tuple[float, ...] = IMAGE_MEAN if is_siglip else CLIP_MEAN
        self.image_std: tuple[float, ...] = IMAGE_STD if is_siglip else CLIP_STD
        self.resize_mode = "squash" if is_siglip else "shortest"
        self.image_size, self.image_seq_len, self.patch_size = config.image_size, config.image_seq_len, config.patch
        self.trunk = NaFlexTrunk(config, gelu)
        has_head = config.pool == "avg"
        self.head = nn.ModuleDict({"proj": nn.Linear(config.width, embed_dim, bias=False)} if has_head else {})

    def forward(self, images: Any) -> Tensor:
        """Compute the features of images, in the order of their batch: [B, embed_dim]."""
        for_gpu = self.trunk.embeds.proj.weight.device.type != "cpu"
        if isinstance(images, Mapping):
            images = unpad_images(images, for_gpu=for_gpu)
        elif not isinstance(images, PackedImages):
            images = pack_images(images, self.patch_size, for_gpu=for_gpu and not isinstance(images, Tensor))
        features: Tensor = self.trunk(images, self.image_mean, self.image_std)
        for projection in self.head.values():
            features = projection(features)
        return features

    def layer_groups(self) -> list[Group]:
        """Return the groups of the tower's layers, from input to output, for locking and layer-wise learning rates."""
        trunk = self.trunk
        last: nn.Module = trunk.fc_norm if trunk.attn_pool is None else trunk.attn_pool
        of_head: list[Group] = [[part] for part in self.head.values()]
        return [[trunk.embeds], *groups_of_blocks(trunk.blocks, trunk.norm), [last], *of_head]


class _OfManySizes(CLIP):
    """The base of models for images of several sizes, whose image tower is a :class:`NaFlexVision`."""

    def _vision(self) -> NaFlexVision:
        """Return a new NaFlex image tower.

        Raises:
            TypeError: the configuration is that of a tower for images of one size.
        """
        config = self.config
        if not isinstance(config.vision, NaFlexConfig):
            raise TypeError(f"a NaFlex model needs a NaFlexConfig as vision, got a {type(config.vision).__name__}")
        if isinstance(config, SigLIPConfig):
            return NaFlexVision(config.vision, config.embed_dim, config.image_gelu, is_siglip=True)
        return NaFlexVision(config.vision, config.embed_dim)

    def encode_image(self, image: Any, normalize: bool = False) -> Tensor:
        """Compute the features of images.

        Args:
            image: a list of images of several sizes, each [3, H, W], or [B, 3, H, W], with sides that are multiples of
                the patch size; packed images (:func:`clipfast.models.packed_images.pack_images`), whose patches may
                have any size; or a padded batch of timm's NaFlex loader or of transformers' image processor for
                SigLIP 2. All are uint8 as decoded, or floating and already normalised.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError, ValueError: ``image`` is not one of these.
        """
        if not isinstance(image, PackedImages | Mapping | list | tuple):
            return super().encode_image(image, normalize)
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def forward_intermediates(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Raise an error, since images of several sizes have no grid of features in common.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("clipfast's NaFlex models return no outputs of their blocks, of images or of texts")

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that get no weight decay, in addition to those of one dimension."""
        prefix = "text." if hasattr(self, "text") else ""
        embeds = {"visual.trunk.embeds.pos_embed", "visual.trunk.embeds.reg_token"}
        return {f"{prefix}positional_embedding"} | {name for name, _ in self.named_parameters() if name in embeds}


class NaFlexCLIP(_OfManySizes):
    """A CLIP model with timm's NaFlex image tower, pooled by the mean."""


class NaFlexSigLIP(_OfManySizes, SigLIP):
    """SigLIP 2 for images of several sizes."""
