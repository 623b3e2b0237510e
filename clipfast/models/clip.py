"""CLIP (Radford et al. 2021): an image and a text encoder into one embedding space."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CLIPConfig
from .layers import LayerNorm
from .resnet import AttentionPool2d, ModifiedResNet
from .transformer import MLP, Attention, Transformer, embed_text, read_rows
from .vision import VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class CLIPOutput(NamedTuple):
    """The input of a loss: features of unit length, and the factor on their cosine similarities."""

    image_features: Tensor | None  # [B, embed_dim]
    text_features: Tensor | None  # [B, embed_dim]
    logit_scale: Tensor  # [], after exp


class CLIP(nn.Module):
    """The image tower in ``visual``, the text tower at the top level, as in the published checkpoints."""

    backend = "auto"
    reads_padding = False  # whether features depend on the padding of a text

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
        """Compute the features of images.

        Args:
            image: [B, 3, H, W]; uint8 as decoded, or floating and already normalised.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError, ValueError: ``image`` is not such a tensor.
        """
        if not isinstance(image, Tensor):
            raise TypeError(f"encode_image: image must be a tensor [B, 3, H, W], got a {type(image).__name__}")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"encode_image: image must be [B, 3, H, W], RGB; got shape {tuple(image.shape)}")
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Compute the features of texts, read at their end-of-text tokens.

        Args:
            text: [B, L] token ids, with L at most the context length. Columns that are padding in every row may be cut
                off: the transformer is causal, so they change nothing.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError: ``text`` is not a tensor.
            ValueError: ``text`` has more tokens than the model has positions.
        """
        check_text(text, self.context_length)
        x = embed_text(self.token_embedding, self.positional_embedding, text, self.backend)
        # The end-of-text token has the highest id of the vocabulary.
        x = read_rows(self.transformer, x, text.argmax(-1))
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> CLIPOutput | dict[str, Tensor | None]:
        """Return normalised features of the inputs that are given, and exp(logit_scale); a dict if ``output_dict``."""
        output = CLIPOutput(
            None if image is None else self.encode_image(image, normalize=True),
            None if text is None else self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )
        return output._asdict() if self.output_dict else output

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp exp(logit_scale) to [1, 100] without a host sync; training does it after each step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool = True, *, selective: bool = False) -> None:
        """Recompute transformer blocks in the backward pass instead of keeping their activations.

        Args:
            enable: False keeps the activations, as a new model does.
            selective: recompute norms and activation functions only, and keep the results of matrix products and
                attention. It saves less memory, and costs hardly any time.
        """
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = "selective" if enable and selective else enable

    def set_backend(self, backend: str) -> None:
        """Set the backend of every op of the model: "auto", "triton", or "torch" for the references."""
        for module in self.modules():
            if isinstance(module, (CLIP, Attention, AttentionPool2d, LayerNorm, MLP, VisionTransformer)):
                module.backend = backend


def check_text(text: Tensor, context_length: int) -> None:
    """Refuse what is not a batch of token ids.

    Raises:
        TypeError, ValueError: as ``encode_text`` says.
    """
    if not isinstance(text, Tensor):
        raise TypeError(f"encode_text: text must be a tensor of token ids [B, L], got a {type(text).__name__}")
    if text.ndim != 2 or text.shape[1] > context_length:
        raise ValueError(
            f"encode_text: text must be [B, L] with L at most {context_length}, got shape {tuple(text.shape)}"
        )
