"""Determines the model of a checkpoint, and resizes its positions if the user wants another size."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models import CLIPConfig, SigLIPConfig, get_model_config, list_models
from ..models.positions import positions_name, resize_context, resize_positions, text_positions_name
from ..models.registry import QUICK_GELU_SUFFIX, read_model_config
from ..models.siglip_config import EXACT, TANH
from .checkpoint import CheckpointError, check_weights
from .contents import Contents, check_size, empty_state
from .tensor_shapes import RESNET_STRIDE, config_of_weights, models_of_shapes, stored_sizes

# These map the values of ``--activation`` for CLIP and for SigLIP (images, texts) to the settings that they change.
_CLIP: dict[str, dict[str, Any]] = {"gelu": {"quick_gelu": False}, "quick_gelu": {"quick_gelu": True}}
_GELUS = {"gelu": EXACT, "gelu_tanh": TANH}
_SIGLIP: dict[str, dict[str, Any]] = {
    image if image == text else f"{image},{text}": {"image_gelu": _GELUS[image], "text_gelu": _GELUS[text]}
    for image in _GELUS
    for text in _GELUS
}


@dataclasses.dataclass(frozen=True)
class Wishes:
    """The user's settings of the model, for a checkpoint that does not tell them or tells others; None if not given.

    Attributes:
        model: the name of a model, or the path of OpenCLIP's JSON file of one.
        activation: "gelu" or "quick_gelu"; for SigLIP "gelu" or "gelu_tanh", or two of these for images and texts.
        image_size: the side of images in pixels to which positions are resized.
        context_length: the number of tokens of a text to which positions are resized.
    """

    model: str | None = None
    activation: str | None = None
    image_size: int | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown activation, and sizes that no model has.

        Raises:
            ValueError: as above.
        """
        for flag, value, least in (("image-size", self.image_size, 1), ("context-length", self.context_length, 2)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"--{flag} must be a whole number of at least {least}, got {value!r}")
        if self.activation is not None and self.activation not in {*_CLIP, *_SIGLIP}:
            raise ValueError(
                f"--activation must be {' or '.join(_CLIP)}, or for SigLIP {' or '.join(_SIGLIP)}; got "
                f"{self.activation!r}"
            )


def resolve(contents: Contents, wishes: Wishes) -> Contents:
    """Determine the model of a checkpoint; return the contents with its configuration and with weights that fit it.

    Raises:
        CheckpointError: the checkpoint does not tell a setting, contradicts the user, or does not fit the model; the
            message names the flag that decides.
        ValueError: the model that the user names does not exist.
    """
    base = _with_activation(_base(contents, wishes), contents, wishes)
    if wishes.model is None:
        check_size(base, contents.files, contents.source)
    stored_image, stored_context = stored_sizes(contents.state, base)
    stored = _sized(base, stored_image, stored_context)
    own = empty_state(stored, contents.source)
    label = f"{contents.source} (taken for {wishes.model})" if wishes.model else contents.source
    try:
        check_weights(contents.state, own, label)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_other_model(contents, wishes)}") from error
    _check_heads(contents, base, label)
    state = {name: contents.state[name].reshape(value.shape) for name, value in own.items()}

    image_size = _wanted("image size", "--image-size", stored_image, base.vision.image_size, wishes.image_size, label)
    context = _wanted(
        "context length", "--context-length", stored_context, base.text.context_length, wishes.context_length, label
    )
    state = _resized(state, stored, image_size, context)
    config = _sized(base, image_size, context)
    empty_state(config, contents.source)  # this refuses an image size that is not a multiple of the patch size
    # The files of CLIP's tokenizer state the context length; they are written anew for another length.
    is_kept = context == stored_context or isinstance(config, SigLIPConfig)
    tokenizer = contents.tokenizer if is_kept else ()
    return dataclasses.replace(contents, config=config, state=state, tokenizer=tokenizer)


def _base(contents: Contents, wishes: Wishes) -> CLIPConfig:
    """Return the configuration of the model that the user names, else the checkpoint's own, else one by shapes."""
    if wishes.model is not None:
        return _asked_config(wishes.model)
    if contents.config is not None:
        return contents.config
    shown = config_of_weights(contents.state, contents.source)
    names = models_of_shapes(shown)
    if not names:
        raise CheckpointError(
            f"{contents.source} does not say which model it holds, and no model that clipfast knows has its shapes: "
            "name its configuration with --model, as a name (with --image-size or --context-length, if those differ) "
            "or as a JSON file of OpenCLIP's"
        )
    if isinstance(shown, SigLIPConfig) and len(names) > 1:
        raise CheckpointError(f"{contents.source} can be {' or '.join(names)}, which have the same shapes: add --model")
    return get_model_config(names[0])


def _other_model(contents: Contents, wishes: Wishes) -> str:
    """Return advice for the end of an error about a ``--model`` that does not fit the weights."""
    if wishes.model is None:
        return ""
    if contents.config is not None:
        return "; the checkpoint says which model it holds: leave --model out"
    with contextlib.suppress(CheckpointError):
        names = models_of_shapes(config_of_weights(contents.state, contents.source))
        if names and wishes.model not in names:
            return f"; it has the shapes of {' or '.join(names)}"
    return ""


def _check_heads(contents: Contents, base: CLIPConfig, label: str | Path) -> None:
    """Refuse a model that differs only in its number of heads, which no shape shows.

    Raises:
        CheckpointError: the checkpoint says another number of attention heads.
    """
    known = contents.config or base
    for tower, says, model in (
        ("images", known.vision.heads, base.vision.heads),
        ("texts", known.text.heads, base.text.heads),
    ):
        if says != model:
            raise CheckpointError(
                f"{label} has {says} attention heads for {tower}, but the model has {model}: leave --model out"
            )


def _asked_config(model: str) -> CLIPConfig:
    """Return the configuration of the model that the user names for a checkpoint."""
    if not model.endswith(".json"):
        return get_model_config(model.replace("/", "-"))
    try:
        return read_model_config(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model} cannot be read: {error}") from error


def _with_activation(config: CLIPConfig, contents: Contents, wishes: Wishes) -> CLIPConfig:
    """Return a checkpoint's configuration with its activation, which no shape shows."""
    if wishes.activation is not None:
        return _activated(config, wishes.activation)
    asked = None if wishes.model is None else config.activation
    says = None if contents.config is None else contents.config.activation
    if says is None and asked is None and not isinstance(config, SigLIPConfig):
        names = models_of_shapes(config_of_weights(contents.state, contents.source))
        raise CheckpointError(
            f"{contents.source} does not say whether the model has GELU or QuickGELU, and weights do not show it: add "
            f"--activation gelu or --activation quick_gelu, or name the model with --model ({' or '.join(names)})"
        )
    if says is not None and asked is not None and says != asked:
        model = str(wishes.model)
        other = model.removesuffix(QUICK_GELU_SUFFIX) if config.quick_gelu else model + QUICK_GELU_SUFFIX
        instead = f"take --model {other}" if other in list_models() else f"name a model with {says}"
        raise CheckpointError(
            f"{contents.source} was trained with {says}, but --model {model} uses {asked}: "
            f"{instead}, or add --activation {activation_flag(config)} if the checkpoint is wrong"
        )
    return config


def _activated(config: CLIPConfig, wish: str) -> CLIPConfig:
    """Return a checkpoint's ``config`` with the activation that ``--activation`` names.

    Raises:
        ValueError: a model of this kind does not have the activation.
    """
    known = _SIGLIP if isinstance(config, SigLIPConfig) else _CLIP
    if wish not in known:
        kind = "SigLIP" if known is _SIGLIP else "CLIP"
        raise ValueError(f"a {kind} model has {' or '.join(known)}, but --activation is {wish}")
    return dataclasses.replace(config, **known[wish])


def activation_flag(config: CLIPConfig) -> str:
    """Return the value of ``--activation`` that stands for the activation of a checkpoint's configuration."""
    known = _SIGLIP if isinstance(config, SigLIPConfig) else _CLIP
    return next(word for word in known if _activated(config, word) == config)


def _sized(config: CLIPConfig, image_size: int, context_length: int) -> CLIPConfig:
    """Return a checkpoint's ``config`` with another image size and another context length."""
    text = dataclasses.replace(config.text, context_length=context_length)
    return dataclasses.replace(config.with_vision(image_size=image_size), text=text)


def _wanted(what: str, flag: str, stored: int, configured: int, wished: int | None, label: str | Path) -> int:
    """Return the size of the converted model; only the user can choose a size that differs from the weights' own."""
    if wished is None and stored != configured:
        raise CheckpointError(
            f"{label} has positions for {what} {stored}, but the model's {what} is {configured}: add {flag} "
            f"{configured} to resize them, or {flag} {stored} to keep them"
        )
    return configured if wished is None else wished


def _resized(
    state: Mapping[str, Tensor], stored: CLIPConfig, image_size: int, context_length: int
) -> dict[str, Tensor]:
    """Return a checkpoint's ``state`` with its positions resized as OpenCLIP resizes them."""
    result = dict(state)
    name, vision = positions_name(state), stored.vision
    if image_size != vision.image_size and name is not None:
        is_vit = isinstance(vision.layers, int)
        unit = (vision.patch_size if is_vit else None) or RESNET_STRIDE
        if image_size % unit and not isinstance(stored, SigLIPConfig):
            what = "the patch size" if is_vit else "the stride of a ResNet,"
            raise CheckpointError(f"--image-size must be a multiple of {what} {unit}, got {image_size}")
        if image_size < unit:
            raise CheckpointError(f"--image-size must be at least one patch, {unit}, got {image_size}")
        result[name] = resize_positions(name, state[name], image_size // unit)
    if context_length != stored.text.context_length:
        text = text_positions_name(state)
        result[text] = resize_context(state[text], context_length)
    return result
