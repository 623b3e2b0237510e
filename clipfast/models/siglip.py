"""SigLIP and SigLIP 2 at a fixed resolution, with the parameter names of OpenCLIP's ``CustomTextCLIP``.

The image tower has the parameter names of timm's vision transformers, such as ``visual.trunk.blocks.0.attn.qkv``. Its
layers are subclasses of those of :mod:`.transformer` with other names, and run through the same code.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import patch_embed
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from .clip import CLIP
from .freezing import Group, Lockable, groups_of_blocks
from .layers import MLP, Attention, LayerNorm, PackedTokens, add_norm, is_plain, single_query_attention
from .siglip_config import EPS, SigLIPConfig
from .texts import check_text, embed_text
from .transformer import Plan, ResidualAttentionBlock, Transformer, read_rows, run_blocks
from .vision import draw_kept_patches, resize_grid

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
_WEIGHT_STD = 0.02  # the standard deviation of timm's initial weights of linear layers and positions


class SigLIPOutput(NamedTuple):
    """The output of a SigLIP model, for the sigmoid loss: features of unit length, logit scale, and logit bias."""

    image_features: Tensor | None  # [B, embed_dim]
    text_features: Tensor | None  # [B, embed_dim]
    logit_scale: Tensor  # [], exp(logit_scale)
    logit_bias: Tensor  # []


def _renamed(name: str) -> Any:
    """Return a property that aliases the attribute ``name``: a layer with timm's names also has clipfast's names."""
    return property(lambda self: getattr(self, name))


class TimmMLP(MLP):
    """:class:`MLP` with timm's parameter names."""

    PARTS = ("fc2", "act", "fc1")
    c_fc, gelu, c_proj = _renamed("fc1"), _renamed("act"), _renamed("fc2")

    def __init__(self, width: int, hidden: int, approximate: str) -> None:
        nn.Module.__init__(self)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden, width)


class TimmAttention(Attention):
    """:class:`Attention` with timm's parameter names."""

    PARTS = ("qkv", "proj")
    in_proj, out_proj = _renamed("qkv"), _renamed("proj")

    def __init__(self, width: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.causal, self.backend = heads, False, "auto"
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class TimmBlock(ResidualAttentionBlock):
    """:class:`ResidualAttentionBlock` with timm's parameter names."""

    PARTS = ("norm1", "attn", "norm2", "mlp")
    ln_1, ln_2 = _renamed("norm1"), _renamed("norm2")

    def __init__(self, width: int, heads: int, hidden: int, approximate: str) -> None:
        nn.Module.__init__(self)
        self.norm1 = LayerNorm(width, EPS)
        self.attn = TimmAttention(width, heads)
        self.norm2 = LayerNorm(width, EPS)
        self.mlp = TimmMLP(width, hidden, approximate)


class LatentPool(nn.Module):
    """Attention pooling by one learned query (MAP: Lee et al. 2019, Zhai et al. 2022), then an MLP with a shortcut."""

    backend = "auto"

    def __init__(self, width: int, heads: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.num_heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = LayerNorm(width, EPS)
        self.mlp = TimmMLP(width, hidden, approximate)

    def init_latent(self) -> None:
        """Initialise the query as timm does."""
        std = self.latent.shape[-1] ** -0.5
        nn.init.trunc_normal_(self.latent, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, packed: PackedTokens | None = None) -> Tensor:
        """Pool the tokens of each image into one: [B, N, width] -> [B, width].

        With ``packed``, x is [1, T, width], the tokens of one image after the other.
        """
        pooled = self.proj(self._attend(x, packed))
        return pooled + self.mlp(self.norm(pooled))

    def _attend(self, x: Tensor, packed: PackedTokens | None) -> Tensor:
        """Return the attention of the learned query to the tokens: [B, N, width] -> [B, width]."""
        heads = (self.num_heads, -1)
        q = self.q(self.latent)[0].unflatten(-1, heads)  # [1, heads, head_dim]
        longest = x.shape[1] if packed is None else packed.max_seqlen
        if not is_plain(self.kv, nn.Linear) or longest > MAX_TOKENS or self.num_heads > MAX_HEADS:
            x, seen = (x, None) if packed is None else _padded(x[0], packed)
            k, v = self.kv(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim]
            q = q[:, :, None].expand(len(x), -1, -1, -1)
            return F.scaled_dot_product_attention(q, k, v, seen).flatten(1)
        weight_k, weight_v = self.kv.weight.unflatten(0, (2, *heads)).unbind(0)
        bias_k, bias_v = self.kv.bias.chunk(2)
        return single_query_attention(q, x, weight_k, weight_v, None, self.backend, bias_k, bias_v, packed=packed)


def _padded(x: Tensor, packed: PackedTokens) -> tuple[Tensor, Tensor]:
    """Return packed tokens [T, width] with padding, [B, N, width], and a mask [B, 1, 1, N], False at the padding."""
    ends = packed.packing.cu_seqlens
    places = ends[:-1, None] + torch.arange(packed.max_seqlen, device=x.device)
    is_token = places < ends[1:, None]
    # In place of padding, tokens of the next image are gathered. Zeros replace them, since attention multiplies them by
    # 0, and a NaN times 0 is NaN.
    return x[places.clamp(max=x.shape[0] - 1)].masked_fill(~is_token[..., None], 0), is_token[:, None, None]


def init_linear_layers(trunk: nn.Module) -> None:
    """Initialise the linear layers of an image tower as timm does."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_WEIGHT_STD)
            nn.init.zeros_(module.bias)


class SigLIPTrunk(nn.Module):
    """SigLIP's vision transformer with timm's names: no class token, no norm before the blocks, attention pooling."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        vision, gelu = config.vision, config.image_gelu
        assert isinstance(vision.layers, int)  # SigLIPConfig has checked that layers is one number
        assert vision.patch_size is not None
        width, hidden = vision.width, int(vision.width * vision.mlp_ratio)
        self.grid_size = (vision.image_size // vision.patch_size,) * 2
        self.grad_checkpointing: bool | str = False
        # The patch embedding op uses only weight and bias of this convolution, which gives them timm's names and
        # initial values.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, vision.patch_size, vision.patch_size)})
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], width))
        self.blocks = nn.ModuleList(TimmBlock(width, vision.heads, hidden, gelu) for _ in range(vision.layers))
        self.norm = LayerNorm(width, EPS)
        self.attn_pool = LatentPool(width, vision.heads, hidden, gelu)
        self._init_as_timm_does()

    def _init_as_timm_does(self) -> None:
        """Initialise the weights of SigLIP's image tower as timm does."""
        init_linear_layers(self)
        nn.init.trunc_normal_(self.pos_embed, std=_WEIGHT_STD)
        self.attn_pool.init_latent()

    @property
    def projection(self) -> nn.Conv2d:
        """The convolution whose weight and bias project the patches."""
        projection: Any = self.patch_embed["proj"]
        return projection

    def forward(self, x: Tensor) -> Tensor:
        """Compute the pooled output for the tokens of patches: [B, N, width] -> [B, width]."""
        recompute = torch.is_grad_enabled() and self.grad_checkpointing
        x, branch = run_blocks(Plan(recompute, list(self.blocks)), x, kind=TimmBlock)
        return self.attn_pool(add_norm(x, branch, self.norm)[1])


class SigLIPVision(Lockable):
    """SigLIP's image tower.

    It takes images as :class:`~clipfast.models.vision.VisionTransformer` does, in any size of at least one patch. Rows
    and columns of pixels at the edge that fill no patch are cut off, as in OpenCLIP.
    """

    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    resize_mode = "squash"

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        assert config.vision.patch_size is not None
        self.image_size, self.backend = config.vision.image_size, "auto"
        self.patch_size, self.patch_dropout = config.vision.patch_size, config.vision.patch_dropout
        self.trunk = SigLIPTrunk(config)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images: [B, 3, H, W] -> [B, embed_dim]."""
        return self.trunk(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """Return the embedded patches of images with their positions: [B, 3, H, W] -> [B, patches, width]."""
        size, projection = self.patch_size, self.trunk.projection
        grid = (images.shape[-2] // size, images.shape[-1] // size)
        positions = self.trunk.pos_embed[0]
        if grid != self.trunk.grid_size and min(grid) > 0:
            positions = resize_grid(positions, self.trunk.grid_size, grid)
        keep = draw_kept_patches(len(images), grid, self.patch_dropout, images.device) if self.training else None
        # The patch embedding op also adds a class token. For SigLIP the token is zero, and is cut off afterwards.
        bias: Any = projection.bias
        positions = F.pad(positions + bias, (0, 0, 1, 0))
        if min(grid) > 0:
            images = images[..., : grid[0] * size, : grid[1] * size]
        tokens = patch_embed(
            images, projection.weight, torch.zeros_like(bias), positions, keep=keep,
            mean=self.image_mean, std=self.image_std, backend=self.backend,
        )  # fmt: skip
        return tokens[:, 1:].contiguous()

    def layer_groups(self) -> list[Group]:
        """Return the groups of the tower's layers, from input to output, for locking and layer-wise learning rates."""
        trunk = self.trunk
        return [[trunk.patch_embed, trunk.pos_embed], *groups_of_blocks(trunk.blocks, trunk.norm), [trunk.attn_pool]]


class SigLIPText(nn.Module):
    """SigLIP's text tower: without a causal mask; the output at the last position, even of padding, is the feature."""

    backend = "auto"

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        text = config.text
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(
            text.width, text.layers, text.heads, text.mlp_ratio, causal=False, approximate=config.text_gelu, eps=EPS
        )
        self.ln_final = LayerNorm(text.width, EPS)
        self.text_projection = nn.Linear(text.width, config.embed_dim) if config.text_proj else None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.transformer.init_scaled()
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
            nn.init.zeros_(self.text_projection.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Compute the features of texts from their token ids: [B, L] -> [B, embed_dim]."""
        x = self.embed(text)
        last = text.new_full(text.shape[:1], text.shape[1] - 1, dtype=torch.int64)
        x = self.ln_final(read_rows(self.transformer, x, last))
        return x if self.text_projection is None else self.text_projection(x)

    def embed(self, text: Tensor) -> Tensor:
        """Return the embeddings of tokens with their positions added: [B, L] -> [B, L, width]."""
        return embed_text(self.token_embedding, self.positional_embedding, text, self.backend)


class SigLIP(CLIP):
    """SigLIP (Zhai et al. 2023) or SigLIP 2 (Tschannen et al. 2025), trained by the sigmoid loss."""

    config: SigLIPConfig
    visual: SigLIPVision
    logit_bias: Tensor
    reads_padding = True
    pack_text = False

    def __init__(self, config: SigLIPConfig, *, output_dict: bool = False) -> None:
        nn.Module.__init__(self)  # not CLIP's constructor, which would build CLIP's towers
        self.config, self.output_dict = config, output_dict
        self.context_length, self.vocab_size = config.text.context_length, config.text.vocab_size
        self.visual = self._vision()
        self.text = SigLIPText(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.init_logit_bias)))

    def _vision(self) -> Any:
        """Return a new SigLIP image tower."""
        return SigLIPVision(self.config)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:  # type: ignore[override]
        """Compute the features of texts, read at their last positions.

        Args:
            text: [B, L] token ids, padded to the context length: features depend on the padding. Shorter texts are
                accepted, as OpenCLIP does, and have other features.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError, ValueError: as for :class:`CLIP`.
        """
        check_text(text, self.context_length, may_be_packed=False)
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def embed_text(self, text: Tensor) -> Tensor:  # type: ignore[override]
        """Return the embeddings of tokens with their positions added: [B, L] -> [B, L, width]."""
        check_text(text, self.context_length, may_be_packed=False)
        return self.text.embed(text)

    def forward(  # type: ignore[override]
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> SigLIPOutput | dict[str, Tensor | None]:
        """Return the normalised features of the given images and texts, exp(logit_scale) and logit_bias.

        The result is a dict if ``output_dict``.
        """
        output = SigLIPOutput(
            None if image is None else self.encode_image(image, normalize=True),
            None if text is None else self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
            self.logit_bias,
        )
        return output._asdict() if self.output_dict else output

    def forward_intermediates(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Raise an error, since only CLIP models return the outputs of their blocks.

        Raises:
            NotImplementedError: always; the message says which other model has this method.
        """
        raise NotImplementedError(
            "clipfast's SigLIP has no forward_intermediates: build the model with open_clip.create_model, and hand it "
            "to clipfast.apply_to_open_clip"
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that get no weight decay, in addition to those of one dimension."""
        return {"visual.trunk.pos_embed", "text.positional_embedding"}
