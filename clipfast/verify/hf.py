"""Hugging Face's ``CLIPModel`` or ``SiglipModel`` with the weights of one of our models. Nothing is downloaded."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..conversion.hugging_face_layout import NoCounterpartError, from_ours, to_ours, to_settings
from ..models import CLIP, CLIPConfig, SigLIPConfig

__all__ = ["NoCounterpartError", "build", "caller", "to_ours"]


def build(model: CLIP) -> nn.Module:
    """Build a ``CLIPModel`` or a ``SiglipModel`` with the weights, dtype and device of ``model``, in evaluation mode.

    Raises:
        NoCounterpartError: the model has a ResNet, or a text tower without a projection.
    """
    _hide_own_kernels()
    from transformers import CLIPModel, SiglipModel

    like = next(model.parameters())
    kind = SiglipModel if isinstance(model.config, SigLIPConfig) else CLIPModel
    other: nn.Module = kind(_config(model.config))
    other.to(like.device, like.dtype).eval()
    other.load_state_dict(from_ours(model.state_dict()), strict=True)
    return other


def _hide_own_kernels() -> None:
    """Keep transformers from importing the folder ``kernels`` of a checkout that is the working directory.

    It would take it for the package of that name, and so register its ops over those that are verified.
    """
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and Path(spec.origin).samefile(str(kernels.__file__)):
        sys.modules["kernels"] = None  # type: ignore[assignment]


def caller(other: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return a function like our models: it gives normalised image and text features, exp(logit_scale), and a bias."""

    def call(images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        output = other(input_ids=texts, pixel_values=images)
        bias = (other.logit_bias,) if hasattr(other, "logit_bias") else ()
        return output.image_embeds, output.text_embeds, other.logit_scale.exp(), *bias

    return call


def _config(config: CLIPConfig) -> Any:
    from transformers import CLIPConfig as TheirCLIP
    from transformers import SiglipConfig as TheirSigLIP

    kind: Any = TheirSigLIP if isinstance(config, SigLIPConfig) else TheirCLIP
    theirs = kind(**to_settings(config))
    # the other implementation computes the softmax in float32 for every dtype, so it cannot be the truth
    theirs._attn_implementation = "sdpa"
    return theirs
