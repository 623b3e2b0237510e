"""The names and shapes of the parameters of transformers' ``CLIPModel``.

Only vision transformers have a counterpart there. Parameters have other names, and the packed projection of attention
is three parameters.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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
INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = re.compile(r"((?:visual\.)?transformer)\.resblocks\.(\d+)\.(.+)")


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one of our models by the names of transformers; they may share memory with ``state``."""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.T.contiguous() if name in _TRANSPOSED else value
        names = _their_names(name)
        theirs |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))
    return theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights or gradients in ``theirs`` by our ``names``; what is missing there is left out."""
    ours: dict[str, Tensor] = {}
    for name in names:
        parts = [theirs[their_name] for their_name in _their_names(name) if their_name in theirs]
        if len(parts) == len(_their_names(name)):
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            ours[name] = whole.T if name in _TRANSPOSED else whole
    return ours


def _their_names(name: str) -> list[str]:
    """Return transformers' names for one of our parameters: three for a packed projection, else one."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return [renamed(name, _OUTER)]
    tower, layer, part = match.groups()
    prefix = f"{_TOWERS[tower]}.encoder.layers.{layer}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return [f"{prefix}self_attn.{projection}_proj.{kind}" for projection in "qkv"]
    return [prefix + renamed(part, INNER)]


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the name that ``names`` gives to a parameter, or to the module whose weight or bias it is."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"
