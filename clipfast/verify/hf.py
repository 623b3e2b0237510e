"""Hugging Face's ``CLIPModel`` with the weights of one of our models. Nothing is downloaded."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..conversion.hugging_face_config import NoCounterpartError, to_hugging_face
from ..conversion.hugging_face_names import from_ours, to_ours
from ..models import CLIP, CLIPConfig

__all__ = ["NoCounterpartError", "build", "caller", "to_ours"]


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
    other.load_state_dict(from_ours(model.state_dict()), strict=True)
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
    settings = to_hugging_face(config)
    from transformers import CLIPConfig as Theirs

    theirs = Theirs(**settings)
    # the other implementation computes the softmax in float32 for every dtype, so it cannot be the truth
    theirs._attn_implementation = "sdpa"
    return theirs
