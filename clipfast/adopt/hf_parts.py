"""The classes of transformers' CLIP, SigLIP and SigLIP 2, by their names and by the arguments of their ``forward``."""

import inspect
from collections.abc import Iterable

from torch import nn

_PREFIXES = {
    "CLIP": "transformers.models.clip.modeling_clip.CLIP",
    "Siglip": "transformers.models.siglip.modeling_siglip.Siglip",
    "Siglip2": "transformers.models.siglip2.modeling_siglip2.Siglip2",
}
_BLOCK = ["hidden_states", "attention_mask", "kwargs"]
_IMAGES = ["pixel_values", "interpolate_pos_encoding"]
_TEXTS = ["input_ids", "attention_mask", "position_ids"]
_PAIRS = [
    "input_ids", "pixel_values", "attention_mask", "position_ids", "return_loss", "interpolate_pos_encoding", "kwargs",
]  # fmt: skip
# The arguments of transformers 5.24; earlier versions had others.
_ARGUMENTS = {
    **{f"{family}{part}": _BLOCK for family in _PREFIXES for part in ("Attention", "EncoderLayer")},
    **{f"{family}MLP": ["hidden_states"] for family in _PREFIXES},
    **{f"{family}Encoder": ["inputs_embeds", "attention_mask", "kwargs"] for family in _PREFIXES},
    **{f"{family}TextEmbeddings": ["input_ids", "position_ids", "inputs_embeds"] for family in _PREFIXES},
    **{f"{family}TextModel": [*_TEXTS, "kwargs"] for family in _PREFIXES},
    "CLIPVisionEmbeddings": _IMAGES,
    "CLIPVisionModel": [*_IMAGES, "kwargs"],
    "SiglipMultiheadAttentionPoolingHead": ["hidden_state"],
    "Siglip2MultiheadAttentionPoolingHead": ["hidden_state", "attention_mask"],
    "CLIPModel": _PAIRS,
    "SiglipModel": _PAIRS,
    "Siglip2Model": [
        "input_ids", "pixel_values", "pixel_attention_mask", "spatial_shapes", "attention_mask", "position_ids",
        "return_loss", "kwargs",
    ],
}  # fmt: skip
OTHER_VERSION = "in this version of transformers its arguments are others"


def hf_part(module: nn.Module) -> tuple[str, str]:
    """Return the family of a module of transformers and the rest of its class name, such as ("CLIP", "Attention").

    Both are empty for a module of another library or another family.
    """
    kind, *bases = type(module), *type(module).__bases__
    # FSDP2 changes the class of a module to one that it makes, of FSDPModule and the class that it was.
    return _part_of(bases[-1] if kind.__name__ == f"FSDP{bases[-1].__name__}" else kind)


def hf_base_part(module: nn.Module) -> tuple[str, str]:
    """Return :func:`hf_part` of the first base class that has one."""
    return next(filter(any, map(_part_of, type(module).__mro__[1:])), ("", ""))


def _part_of(kind: type) -> tuple[str, str]:
    name = f"{kind.__module__}.{kind.__qualname__}"
    for family, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return family, name.removeprefix(prefix)
    return "", ""


def has_known_arguments(module: nn.Module) -> bool:
    """Return True if ``forward`` of the class of ``module`` has the arguments that our function has."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names == _ARGUMENTS.get("".join(hf_part(module)))


def asks_nothing(values: Iterable[object]) -> bool:
    """Return True if every value is None or False. Values are compared by identity, since some are tensors."""
    return all(value is None or value is False for value in values)
