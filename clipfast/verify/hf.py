"""Hugging Face's ``CLIPModel`` with the weights of one of our models. Nothing is downloaded.

Only vision transformers have a counterpart. Parameters have other names there, and the packed projection of attention
is three parameters.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..models import CLIP, CLIPConfig

# Our names on the left, theirs on the right; modules stand for their weight and bias. Then the same inside blocks.
_OUTER = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = re.compile(r"((?:visual\.)?transformer)\.resblocks\.(\d+)\.(.+)")


class NoCounterpartError(ValueError):
    """Hugging Face's CLIP cannot express this model."""


def build(model: CLIP) -> nn.Module:
    """Build a ``CLIPModel`` with the weights, dtype and device of ``model``, in evaluation mode.

    Raises:
        NoCounterpartError: the model has a ResNet.
    """
    _hide_own_kernels()
    from transformers import CLIPModel

    like = next(model.parameters())
    other: nn.Module = CLIPModel(_config(model.config))
    other.to(like.device, like.dtype).eval()
    other.load_state_dict(_from_ours(model.state_dict()), strict=True)
    return other


def _hide_own_kernels() -> None:
    """Keep transformers from importing the folder ``kernels`` of a checkout that is the working directory.

    It would take it for the package of that name, and so register its ops over those that are verified.
    """
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and Path(spec.origin).samefile(str(kernels.__file__)):
        sys.modules["kernels"] = None  # type: ignore[assignment]


def caller(other: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return a function like our models: it gives normalised image and text features, and the exponentiated scale."""

    def call(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = other(input_ids=texts, pixel_values=images)
        return output.image_embeds, output.text_embeds, other.logit_scale.exp()

    return call


def _config(config: CLIPConfig) -> Any:
    vision, text = config.vision, config.text
    if not isinstance(vision.layers, int):
        raise NoCounterpartError("Hugging Face's CLIP has no ResNets")
    from transformers import CLIPConfig as Theirs

    activation = "quick_gelu" if config.quick_gelu else "gelu"
    common = {"hidden_act": activation, "projection_dim": config.embed_dim, "attention_dropout": 0.0}
    theirs = Theirs(
        projection_dim=config.embed_dim,
        vision_config=common | {
            "hidden_size": vision.width, "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads,
            "image_size": vision.image_size, "patch_size": vision.patch_size,
        },
        text_config=common | {
            "hidden_size": text.width, "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1, "pad_token_id": 0,
        },
    )  # fmt: skip
    # the other implementation computes the softmax in float32 for every dtype, so it cannot be the truth
    theirs._attn_implementation = "sdpa"
    return theirs


def _from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.T.contiguous() if name in _TRANSPOSED else value
        names = _their_names(name)
        theirs |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))
    return theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of ``theirs`` by our ``names``. One that is missing is missing in the result too."""
    ours: dict[str, Tensor] = {}
    for name in names:
        parts = [theirs[their_name] for their_name in _their_names(name) if their_name in theirs]
        if len(parts) == len(_their_names(name)):
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            ours[name] = whole.T if name in _TRANSPOSED else whole
    return ours


def _their_names(name: str) -> list[str]:
    """Return Hugging Face's names for one of our parameters: three for a packed projection, else one."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [_renamed(name, _OUTER)]
    tower, layer, part = match.groups()
    prefix = f"{_TOWERS[tower]}.encoder.layers.{layer}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return [f"{prefix}self_attn.{projection}_proj.{kind}" for projection in "qkv"]
    return [prefix + _renamed(part, _INNER)]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"
