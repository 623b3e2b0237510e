"""The names and shapes of the parameters of transformers' models, and of ``CLIPModel`` in particular.

Only vision transformers have a counterpart there. Parameters have other names, and the packed projection of attention
is three parameters.
"""

import dataclasses
import functools
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
_TOWERS = {"transformer.resblocks": "text_model", "visual.transformer.resblocks": "vision_model"}
_TRANSPOSED = ("text_projection", "visual.proj")
_PACKED = re.compile(r"attn\.(?:qkv\.|in_proj_)(weight|bias)")


@dataclasses.dataclass(frozen=True)
class ParameterNames:
    """Transformers' names of the parameters of one of our kinds of model.

    Attributes:
        outer: their names of parameters outside of blocks, or of the modules whose weight or bias these are.
        inner: the same within a block.
        towers: their names of the towers, by our names of the lists of blocks.
    """

    outer: Mapping[str, str]
    inner: Mapping[str, str]
    towers: Mapping[str, str]

    def theirs(self, name: str) -> list[str]:
        """Return transformers' names for one of our parameters: three for a packed projection, else one."""
        match = self._block.fullmatch(name)
        if match is None:
            return [_renamed(name, self.outer)]
        tower, layer, part = match.groups()
        prefix = f"{self.towers[tower]}.encoder.layers.{layer}."
        packed = _PACKED.fullmatch(part)
        if packed:
            return [f"{prefix}self_attn.{projection}_proj.{packed[1]}" for projection in "qkv"]
        return [prefix + _renamed(part, self.inner)]

    def split(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Return one of our parameters by transformers' names; the tensors may share memory with ``value``."""
        names = self.theirs(name)
        return dict(zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True))

    def join(self, name: str, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Return one of our parameters from weights by transformers' names; None if a part of it is missing."""
        names = self.theirs(name)
        if not all(each in weights for each in names):
            return None
        return torch.cat([weights[each] for each in names]) if len(names) > 1 else weights[names[0]]

    @functools.cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(rf"({'|'.join(map(re.escape, self.towers))})\.(\d+)\.(.+)")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the name that ``names`` gives to a parameter, or to the module whose weight or bias it is."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"


_NAMES = ParameterNames(_OUTER, INNER, _TOWERS)


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one of our models by the names of transformers; they may share memory with ``state``."""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        theirs |= _NAMES.split(name, value.T.contiguous() if name in _TRANSPOSED else value)
    return theirs


def to_ours(names: Iterable[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights or gradients in ``theirs`` by our ``names``; what is missing there is left out."""
    ours: dict[str, Tensor] = {}
    for name in names:
        value = _NAMES.join(name, theirs)
        if value is not None:
            ours[name] = value.T if name in _TRANSPOSED else value
    return ours
