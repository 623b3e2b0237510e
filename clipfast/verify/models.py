"""Verify whole models, forward and all gradients, against the reference backend, OpenCLIP or Hugging Face.

Both models get the same weights and inputs. The results of the other model in float64 are the truth, and the errors of
the other model in the dtype of the check set the allowed errors.
"""

import copy
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..checkpoints.hugging_face_layout import NoCounterpartError, from_ours, to_ours, to_settings
from ..factory import create_model
from ..kernels import contrastive_loss, reference, sigmoid_loss
from ..kernels.reference import normalize_uint8
from ..kernels.spec import ACCURACY, CUDA
from ..models import CLIP, CLIPConfig, SigLIPConfig
from .context import exact_float32, poisoned
from .ops import MANY_DRAWS, TORCH_DTYPES
from .options import HF, MODEL, OPENCLIP
from .report import SKIP, CheckResult, results_of
from .rule import Draw, judge_fairly

# A float64 model and its gradients take 16 bytes for each parameter. For a model with more parameters than this, the
# truth is computed in float32, which is exact enough to judge half precision only.
FLOAT64_PARAMETERS = 1e9
SMALL_PARAMETERS = 2e7  # models with at most this many parameters are fast, and are checked with several draws
BATCH, DRAWS = 4, 2


def verify_model(peer: str, name: str, leg: str, dtype: str, *, quick: bool = False) -> list[CheckResult]:
    """Compare model ``name`` with ``peer``: features, loss and the gradient of every parameter."""
    device = "cuda" if leg == CUDA else "cpu"
    torch.manual_seed(0)
    model = create_model(name, device=device).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_float32 = parameters > FLOAT64_PARAMETERS
    truth_dtype, why = "float32" if in_float32 else "float64", f"all parts together, {_WHY[peer]}"
    template = CheckResult(peer, leg, ACCURACY, name, dtype, truth=truth_dtype, why=why)
    if in_float32 and dtype == "float32":
        reason = f"{parameters:.1e} parameters: a float64 truth does not fit; a float32 one cannot judge float32"
        return [dataclasses.replace(template, verdict=SKIP, reason=reason)]
    # Weights are rounded to the dtype of the check before they are copied, so that all models have equal ones.
    model.to(TORCH_DTYPES[dtype])
    try:
        same = _OTHERS[peer](model)
    except NoCounterpartError as error:
        return [dataclasses.replace(template, verdict=SKIP, reason=str(error))]
    truth = _OTHERS[peer](model)
    truth.module.to(torch.float32 if in_float32 else torch.float64)
    is_siglip = isinstance(model.config, SigLIPConfig)
    ours = Model(model, sigmoid_loss if is_siglip else contrastive_loss)
    if is_siglip:
        same.loss = truth.loss = reference.sigmoid_loss

    def draw(number: int) -> Draw:
        """Draw a batch; return the results of our model, of the peer in the same dtype, and of the peer in float64."""
        batch = draw_batch(model.config, BATCH, torch.Generator().manual_seed(1000 + number))
        images, texts = (x.to(device) for x in batch)
        if peer != MODEL:  # models of other packages do not take uint8 images
            images = normalize_uint8(images, model.visual.image_mean, model.visual.image_std, TORCH_DTYPES[dtype])
        with poisoned():
            result = ours.results(images, texts)
        with exact_float32():
            return result, same.results(images, texts), truth.results(images, texts)

    few, many = (DRAWS, MANY_DRAWS) if parameters <= SMALL_PARAMETERS and not quick else (1, 2 * DRAWS)
    return results_of(template, judge_fairly(draw, few, many)[0])


@dataclasses.dataclass
class Model:
    """A model of this package or of a peer, in the form in which ``clipfast verify`` compares models."""

    module: nn.Module
    loss: Callable[..., Tensor] = reference.contrastive_loss
    # Calls the module with the arguments of clipfast's models, if the module takes other arguments.
    call: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None
    # Takes gradients by the module's parameter names, and returns them by clipfast's names.
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict

    def results(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Run forward and backward on images [B, 3, H, W] and texts [B, L]; return features, loss and gradients.

        The gradient of a parameter has the name ``d_<parameter>``.
        """
        like = next(self.module.parameters())
        if images.is_floating_point():
            images = images.to(like.dtype)
        self.module.zero_grad()
        image, text, *logit_parameters = (self.call or self.module)(images, texts)
        loss = self.loss(image, text, *logit_parameters)
        loss.backward()
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        values = {"image_features": image, "text_features": text, "loss": loss}
        return {name: value.detach() for name, value in values.items()} | {
            f"d_{name}": grad for name, grad in self.rename(gradients).items()
        }


def _reference(model: CLIP) -> Model:
    """Return a copy of the verified model that runs PyTorch's ops in place of the kernels."""
    other = copy.deepcopy(model)
    other.set_backend("torch")
    return Model(other)


def _open_clip(model: CLIP) -> Model:
    """Return OpenCLIP's model with the configuration and weights of the verified model."""
    import open_clip

    raw = model.config.to_dict()
    kind = open_clip.CustomTextCLIP if raw.pop("custom_text", False) else open_clip.CLIP
    other = kind(**raw).to(next(model.parameters())).eval()
    other.load_state_dict(model.state_dict())
    return Model(other)


def _hugging_face(model: CLIP) -> Model:
    """Return transformers' model with the configuration and weights of the verified model."""
    other = build_hugging_face(model)
    return Model(other, call=_caller(other), rename=functools.partial(to_ours, list(model.state_dict())))


_OTHERS: dict[str, Callable[[CLIP], Model]] = {MODEL: _reference, OPENCLIP: _open_clip, HF: _hugging_face}
_WHY = {MODEL: "from bytes, against the reference backend", OPENCLIP: "from floats, against OpenCLIP"}
_WHY |= {HF: "from floats, against Hugging Face"}


def draw_batch(config: CLIPConfig, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw random inputs of a model: uint8 images [batch, 3, H, W], and texts [batch, context_length] for ``verify``.

    The texts have random lengths: a text's features are read at its end, so texts of one length would have similar
    features.
    """
    side, length, vocabulary = config.vision.image_size, config.text.context_length, config.text.vocab_size
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, vocabulary - 2, (batch, length), generator=generator)
    ends = torch.randint(1, length, (batch, 1), generator=generator)
    ends[0] = length - 1
    positions = torch.arange(length)
    return images, texts.where(positions < ends, 0).where(positions != ends, vocabulary - 1)


def build_hugging_face(model: CLIP) -> nn.Module:
    """Build transformers' ``CLIPModel`` or ``SiglipModel`` with the weights, dtype and device of a clipfast ``model``.

    Raises:
        NoCounterpartError: the model has a ResNet, or a text tower without a projection.
    """
    _hide_own_kernels()
    from transformers import CLIPModel, SiglipModel

    like = next(model.parameters())
    kind = SiglipModel if isinstance(model.config, SigLIPConfig) else CLIPModel
    other: nn.Module = kind(_their_config(model.config))
    other.to(like.device, like.dtype).eval()
    other.load_state_dict(from_ours(model.state_dict()), strict=True)
    return other


def _hide_own_kernels() -> None:
    """Keep transformers from importing clipfast's folder ``kernels`` if the working directory is a checkout.

    transformers would take the folder for the package ``kernels`` of Hugging Face, and importing it a second time would
    register clipfast's ops over those that are verified.
    """
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and Path(spec.origin).samefile(str(kernels.__file__)):
        sys.modules["kernels"] = None  # type: ignore[assignment]


def _caller(other: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return a function that calls transformers' model and returns the same results as the verified clipfast model.

    These are the normalised image and text features, exp(logit_scale), and the bias if there is one.
    """

    def call(images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        """Return image features, text features, exp(logit_scale) and bias of transformers' model, to verify ours."""
        output = other(input_ids=texts, pixel_values=images)
        bias = (other.logit_bias,) if hasattr(other, "logit_bias") else ()
        return output.image_embeds, output.text_embeds, other.logit_scale.exp(), *bias

    return call


def _their_config(config: CLIPConfig) -> Any:
    """Return transformers' configuration for that of the verified model."""
    from transformers import CLIPConfig as TheirCLIP
    from transformers import SiglipConfig as TheirSigLIP

    kind: Any = TheirSigLIP if isinstance(config, SigLIPConfig) else TheirCLIP
    theirs = kind(**to_settings(config))
    # The "eager" attention computes its softmax in float32 even in a float64 model, which would not be exact.
    theirs._attn_implementation = "sdpa"
    return theirs
