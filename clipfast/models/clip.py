"""CLIP (Radford et al. 2021): two encoders that meet in one space."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import text_embed
from .config import CLIPConfig
from .resnet import AttentionPool2d, ModifiedResNet
from .transformer import MLP, Attention, LayerNorm, Transformer, is_plain, pooled
from .vision import VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class CLIPOutput(NamedTuple):
    """What a training step needs: features of unit length and the factor on their cosine."""

    image_features: Tensor | None  # [B, embed_dim]
    text_features: Tensor | None  # [B, embed_dim]
    logit_scale: Tensor  # [], exponentiated


def _is_plain_table(table: nn.Embedding) -> bool:
    """Whether each row is looked up as it is, and gets the whole gradient of its tokens."""
    return (table.padding_idx, table.max_norm, table.scale_grad_by_freq, table.sparse) == (None, None, False, False)


class CLIP(nn.Module):
    """Image tower ``visual``, text tower at the top level, ``logit_scale``: the layout of the published checkpoints."""

    backend = "auto"

    def __init__(self, config: CLIPConfig, *, output_dict: bool = False) -> None:
        super().__init__()
        self.config = config
        self.output_dict = output_dict
        text = config.text
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.visual = (
            VisionTransformer(config.vision, config.embed_dim, quick_gelu=config.quick_gelu)
            if isinstance(config.vision.layers, int)
            else ModifiedResNet(config.vision, config.embed_dim)
        )
        self.transformer = Transformer(
            text.width, text.layers, text.heads, text.mlp_ratio, causal=True, quick_gelu=config.quick_gelu
        )
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INIT_LOGIT_SCALE))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)
        self.transformer.init_scaled()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features of images.

        Args:
            image: [B, 3, H, W], uint8 as decoded or floating and normalised.
            normalize: divide each feature by its length.

        Returns:
            [B, embed_dim].
        """
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features of texts, read at each end-of-text token.

        Args:
            text: [B, L] token ids, L at most the context length. Columns that are padding in every row may be cut off:
                the transformer is causal, so they change nothing.
            normalize: divide each feature by its length.

        Returns:
            [B, embed_dim].

        Raises:
            ValueError: more tokens than the model has positions.
        """
        if text.ndim != 2 or text.shape[1] > self.context_length:
            raise ValueError(
                f"encode_text: text must be [B, L] with L at most {self.context_length}, got shape {tuple(text.shape)}"
            )
        table = self.token_embedding
        if is_plain(table, nn.Embedding) and _is_plain_table(table):
            x = text_embed(text, table.weight, self.positional_embedding, backend=self.backend)
        else:
            x = table(text) + self.positional_embedding[: text.shape[1]]
        # The end-of-text token has the highest id of the vocabulary.
        x = pooled(self.transformer, x, text.argmax(-1))
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> CLIPOutput | dict[str, Tensor | None]:
        """Normalised features of what is given, and the exponentiated scale; a dict where ``output_dict`` is set."""
        output = CLIPOutput(
            None if image is None else self.encode_image(image, normalize=True),
            None if text is None else self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )
        return output._asdict() if self.output_dict else output

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale between 1 and 100, as training does after each step (without a host sync)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool = True, *, selective: bool = False) -> None:
        """Recompute transformer blocks in the backward pass instead of keeping their activations.

        Args:
            enable: or keep them, as at first.
            selective: recompute norms and activations only, and keep what products and attention gave: less memory
                saved, and hardly any time lost.
        """
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = "selective" if enable and selective else enable

    def set_backend(self, backend: str) -> None:
        """Choose what every op of the model runs on: "auto", "triton", or "torch" for the references."""
        for module in self.modules():
            if isinstance(module, (CLIP, Attention, AttentionPool2d, LayerNorm, MLP, VisionTransformer)):
                module.backend = backend
