"""CLIP (Radford et al. 2021): an image and a text encoder into one embedding space."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8_layers import check_recipe
from .freezing import freeze, groups_of_text
from .intermediates import Indices, add_logits, normalized, pair_logits, text_intermediates
from .layers import LayerNorm, is_plain, lowered
from .model_config import CLIPConfig
from .packed_text import PackedText, can_be_packed, pack_if_shorter
from .resnet import ModifiedResNet
from .texts import check_text, embed_text, refuse_foreign, takes_packed
from .transformer import ResidualAttentionBlock, Transformer, read_rows
from .vision import VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class CLIPOutput(NamedTuple):
    """The output of a CLIP model, for the loss: features of unit length, and the factor of their similarities."""

    image_features: Tensor | None  # [B, embed_dim]
    text_features: Tensor | None  # [B, embed_dim]
    logit_scale: Tensor  # [], exp(logit_scale)


class CLIP(nn.Module):
    """A CLIP model with the image tower in ``visual`` and the text tower's layers at the top level, as published."""

    backend = "auto"
    reads_padding = False  # whether features depend on the padding of a text
    pack_text = True  # whether texts are computed without their padding

    def __init__(self, config: CLIPConfig, *, output_dict: bool = False) -> None:
        super().__init__()
        self.config = config
        self.output_dict = output_dict
        text = config.text
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.visual = self._vision()
        self.transformer = Transformer(
            text.width, text.layers, text.heads, text.mlp_ratio, causal=True, quick_gelu=config.quick_gelu
        )
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INIT_LOGIT_SCALE))
        self.logit_bias: Tensor | None = None  # OpenCLIP's models without this bias have the attribute too
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)
        self.transformer.init_scaled()

    def _vision(self) -> Any:
        """Return a new image tower of the CLIP model: a vision transformer or a ResNet."""
        config = self.config
        if isinstance(config.vision.layers, int):
            return VisionTransformer(config.vision, config.embed_dim, quick_gelu=config.quick_gelu)
        return ModifiedResNet(config.vision, config.embed_dim)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Compute the features of images.

        Args:
            image: [B, 3, H, W]; uint8 as decoded, or floating and already normalised.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError, ValueError: ``image`` is not a tensor of this shape and dtype.
        """
        if not isinstance(image, Tensor):
            raise TypeError(f"encode_image: image must be a tensor [B, 3, H, W], got a {type(image).__name__}")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"encode_image: image must be [B, 3, H, W], RGB; got shape {tuple(image.shape)}")
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
        """Compute the features of texts, read at their end-of-text tokens.

        Args:
            text: [B, L] token ids, with L at most the context length, or packed texts (:func:`clipfast.pack_texts`).
                The transformer is causal, so that tokens after the end-of-text token change nothing. They are not
                computed: texts that are not packed are packed here, unless ``pack_text`` is False, little is padding,
                or a hook, a module of the user's, a compiler or a profiler would see the packed tokens.
            normalize: divide each feature vector by its length.

        Returns:
            [B, embed_dim].

        Raises:
            TypeError: ``text`` is neither a tensor nor packed, or it is packed and a block is not CLIP's.
            ValueError: ``text`` has more tokens than the model has positions.
        """
        check_text(text, self.context_length, may_be_packed=not self.reads_padding)
        if isinstance(text, PackedText):
            refuse_foreign(self.transformer)
        elif can_be_packed(text) and self.takes_packed():  # can_be_packed comes first because it takes less time
            text = pack_if_shorter(text)
        # argmax finds the end-of-text token, which has the highest id of the vocabulary.
        rows = text if isinstance(text, PackedText) else text.argmax(-1)
        x = read_rows(self.transformer, self.embed_text(text), rows)
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def takes_packed(self) -> bool:
        """Return whether texts may be packed: ``pack_text`` is set, and no hook or module of a user sees the tokens."""
        if not self.pack_text or self.reads_padding or not is_plain(self.token_embedding, nn.Embedding):
            return False
        # A subclass that changes the embedded texts, as learned prompts do, expects [B, L, width].
        is_own = type(self).embed_text is CLIP.embed_text and "embed_text" not in self.__dict__
        return is_own and not self.token_embedding.scale_grad_by_freq and takes_packed(self.transformer)

    def embed_text(self, text: Tensor | PackedText) -> Tensor:
        """Return the embeddings of tokens with their positions added: [B, L] -> [B, L, width]; packed, [1, T, width].

        Raises:
            TypeError, ValueError: as :meth:`encode_text`.
        """
        check_text(text, self.context_length)
        x = embed_text(self.token_embedding, self.positional_embedding, text, self.backend)
        return lowered(x, self.text_projection)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of all pairs of images and texts.

        Args:
            image, text: as for :meth:`encode_image` and :meth:`encode_text`, B images and T texts.

        Returns:
            ``(image_logits, text_logits)``: [B, T], and its transpose.
        """
        features = (self.encode_image(image, normalize=True), self.encode_text(text, normalize=True))
        logits = pair_logits(*features, self.logit_scale.exp(), self.logit_bias)
        return logits, logits.T

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: Indices = None,
        text_indices: Indices = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",  # noqa: ARG002
        text_output_extra_tokens: bool = False,  # noqa: ARG002
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Any]:
        """Return the outputs of blocks, beside the features, as OpenCLIP's method of this name does.

        Args:
            image, text: as for :meth:`encode_image` and :meth:`encode_text`; either may be None.
            image_indices, text_indices: the blocks: a number n for the last n, a list of indices (negative ones count
                from the end), or None for all. A ResNet's blocks are its stem and its four stages.
            stop_early: do not run the image blocks after the last one that is returned; a vision transformer's features
                are then computed from that block.
            normalize: divide the features by their length.
            normalize_intermediates: apply the tower's last norm to the output of every block.
            intermediates_only: leave out the features and the logits.
            image_output_fmt: "NCHW" for [B, width, h, w], "NLC" for [B, h * w, width].
            image_output_extra_tokens: also return the class token of every image block.
            text_output_fmt, text_output_extra_tokens: change nothing, as in OpenCLIP: texts are [B, L, width].
            output_logits: return the logits of all pairs.
            output_logit_scale_bias: return exp(logit_scale), and the bias of the logits if there is one.

        Returns:
            A dict with those of ``image_intermediates``, ``image_intermediates_prefix``, ``image_features``,
            ``text_intermediates``, ``text_features``, ``image_logits``, ``text_logits``, ``logit_scale`` and
            ``logit_bias`` that the arguments select.

        Raises:
            ValueError: an index or a format is unknown, or logits are asked for without images or texts.
        """
        with_logits = output_logits and not intermediates_only
        if with_logits and (image is None or text is None):
            raise ValueError("forward_intermediates: output_logits needs both images and texts")
        shared: Any = {"normalize_intermediates": normalize_intermediates, "intermediates_only": intermediates_only}
        output: dict[str, Any] = {}
        if image is not None:
            output |= self.visual.forward_intermediates(
                image, image_indices, stop_early, output_fmt=image_output_fmt,
                output_extra_tokens=image_output_extra_tokens, **shared,
            )  # fmt: skip
        if text is not None:
            output |= text_intermediates(self, text, indices=text_indices, **shared)
        if normalize:
            normalized(output, "image_features", "text_features")
        add_logits(self, output, logits=with_logits, scale_and_bias=output_logit_scale_bias)
        return output

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Make the parameters of the image tower constant (LiT: Zhai et al. 2022).

        Args:
            unlocked_groups: the number of groups that stay trainable, counted from the output: the projection (or the
                attention pooling of a ResNet or of SigLIP), then the blocks (or stages), then the embedding (or stem).
            freeze_bn_stats: let BatchNorm in the locked groups always use its running statistics, and never update
                them.
        """
        self.visual.lock(unlocked_groups, freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Make the parameters of the text tower constant.

        Args:
            unlocked_layers: the number of groups that stay trainable, counted from the output: the projection, then the
                blocks, then the embedding.
            freeze_layer_norm: must be True, as in OpenCLIP: norms are frozen with their block.

        Raises:
            ValueError: ``freeze_layer_norm`` is False.
        """
        if not freeze_layer_norm:
            raise ValueError("lock_text_tower: norms are frozen with their block, so freeze_layer_norm must be True")
        freeze(groups_of_text(self), unlocked_layers)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that get no weight decay, in addition to those of one dimension."""
        names: Any = getattr(self.visual, "no_weight_decay", set)()
        return {"positional_embedding", *(f"visual.{name}" for name in names)}

    def forward(
        self, image: Tensor | None = None, text: Tensor | PackedText | None = None
    ) -> CLIPOutput | dict[str, Tensor | None]:
        """Return normalised features of the given images and texts, and exp(logit_scale); a dict if ``output_dict``."""
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

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline", *, selective: bool = False) -> None:
        """Recompute transformer blocks in the backward pass instead of keeping their activations.

        Args:
            enable: False keeps the activations, which is the default of a new model.
            impl: must be "inline"; OpenCLIP has another implementation too.
            selective: recompute only norms and activation functions, and keep the results of matrix products and
                attention. This saves less memory, and costs hardly any time.

        Raises:
            ValueError: ``impl`` is not "inline".
        """
        if impl != "inline":
            raise ValueError(f"set_grad_checkpointing: impl must be 'inline', got {impl!r}")
        self._set("grad_checkpointing", "selective" if enable and selective else enable)  # of the stacks of blocks

    def set_backend(self, backend: str) -> None:
        """Set the backend of every op of the model: "auto", "triton", or "torch" for the references."""
        self._set("backend", backend)

    def _set(self, name: str, value: bool | str) -> None:
        """Set an attribute of all modules that have it; modules of other libraries, such as timm's, are left alone."""
        for module in self.modules():
            if any(each.__module__.startswith(__package__) for each in type(module).__mro__) and hasattr(module, name):
                vars(module)[name] = value

    def set_fp8(self, recipe: str | None, skip: tuple[int, int] = (0, 1)) -> None:
        """Let the linear layers of transformer blocks multiply in 8 bits (fp8), forward and backward.

        On a CPU, the products in 8 bits are emulated exactly: a step takes longer, and shows the effect of 8 bits on
        the loss. Weights keep their dtype; they are quantised in each forward pass.

        Args:
            recipe: "switchback" computes the gradients of weights in 16 bits, "full" in 8 bits too; None ends it.
            skip: how many of the first and how many of the last blocks of each tower keep 16 bits. A tower that reads
                one row, such as the class token, computes the last block only for that row, unless this block is in 8
                bits.

        Raises:
            ValueError: the recipe is unknown, or ``skip`` is not two numbers of at least 0.
        """
        check_recipe(recipe, skip, ("set_fp8: recipe", "set_fp8: skip"))
        for stack in self.modules():
            blocks = [part for part in stack.children() if isinstance(part, ResidualAttentionBlock)]
            for number, block in enumerate(blocks):
                is_skipped = number < skip[0] or number >= len(blocks) - skip[1]
                block.attn.fp8 = block.mlp.fp8 = None if is_skipped else recipe
