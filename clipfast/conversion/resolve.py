"""Deciding which model a checkpoint holds, and resizing its positions where that was asked for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import ACTIVATIONS, POSITIONS_NAME, CheckpointError, check_weights
from ..kernels.dtypes import accumulate_dtype
from ..models import CLIPConfig, get_model_config, list_models
from ..models.config import QUICK_GELU_SUFFIX, read_model_config
from ..models.vision import interpolate_positions
from .contents import Contents
from .shapes import TEXT_POSITIONS_NAME, config_of_weights, models_of_shapes, stored_sizes
from .skeleton import empty_state

ACTIVATION_NAMES = {"gelu": False, "quick_gelu": True}


@dataclasses.dataclass(frozen=True)
class Wishes:
    """The user's wishes for the model, where the checkpoint says nothing or something else; None leaves it open.

    Attributes:
        model: the name of a model, or the path of OpenCLIP's JSON file of one.
        activation: "gelu" or "quick_gelu".
        image_size: side of the images in pixels, to which positions are resized.
        context_length: tokens of a text, to which positions are resized.
    """

    model: str | None = None
    activation: str | None = None
    image_size: int | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        """Refuse an activation that is not known, and sizes that are not positive.

        Raises:
            ValueError: as above.
        """
        if self.activation not in (None, *ACTIVATION_NAMES):
            raise ValueError(f"--activation must be {' or '.join(ACTIVATION_NAMES)}, got {self.activation!r}")
        for flag, least in (("image_size", 1), ("context_length", 2)):
            value = getattr(self, flag)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"--{flag.replace('_', '-')} must be a whole number from {least} on, got {value!r}")


def resolve(contents: Contents, wishes: Wishes) -> Contents:
    """Return ``contents`` with the configuration of its model, and with weights that fit it.

    Raises:
        CheckpointError: the checkpoint leaves something open, contradicts the wishes, or does not fit the model; the
            message names the flag that decides.
        ValueError: there is no model of the name that is wished for.
    """
    base = _base(contents, wishes)
    base = dataclasses.replace(base, quick_gelu=_quick_gelu(contents, wishes))
    stored_image, stored_context = stored_sizes(contents.state, base)
    stored = _sized(base, stored_image, stored_context)
    own = empty_state(stored, contents.state, contents.source)
    label = f"{contents.source} (taken for {wishes.model})" if wishes.model else contents.source
    check_weights(contents.state, own, label)
    _check_heads(contents, base, label)
    state = {name: contents.state[name].reshape(value.shape) for name, value in own.items()}

    image_size = _wanted("image size", "--image-size", stored_image, base.vision.image_size, wishes.image_size, label)
    context = _wanted(
        "context length", "--context-length", stored_context, base.text.context_length, wishes.context_length, label
    )
    state = _resized(state, stored, image_size, context, contents.source)
    config = _sized(base, image_size, context)
    empty_state(config, state, contents.source)  # refuses an image size that patches do not divide
    tokenizer = contents.tokenizer if context == stored_context else ()  # whose files name the length
    return dataclasses.replace(contents, config=config, state=state, tokenizer=tokenizer)


def _base(contents: Contents, wishes: Wishes) -> CLIPConfig:
    """Return the configuration that was asked for, or the checkpoint's own, or the one that its shapes show."""
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
    return get_model_config(names[0])


def _check_heads(contents: Contents, base: CLIPConfig, label: str | Path) -> None:
    """Refuse a model that differs only in what no shape shows.

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
    if not model.endswith(".json"):
        return get_model_config(model.replace("/", "-"))
    try:
        return read_model_config(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model} cannot be read: {error}") from error


def _quick_gelu(contents: Contents, wishes: Wishes) -> bool:
    """Decide on the activation, which no shape shows."""
    if wishes.activation is not None:
        return ACTIVATION_NAMES[wishes.activation]
    says = None if contents.config is None else contents.config.quick_gelu
    asked = None if wishes.model is None else _asked_config(wishes.model).quick_gelu
    if says is None and asked is None:
        names = models_of_shapes(config_of_weights(contents.state, contents.source))
        raise CheckpointError(
            f"{contents.source} does not say whether the model has GELU or QuickGELU, and weights do not show it: add "
            f"--activation gelu or --activation quick_gelu, or name the model with --model ({' or '.join(names)})"
        )
    if says is not None and asked is not None and says != asked:
        model = str(wishes.model)
        other = model.removesuffix(QUICK_GELU_SUFFIX) if asked else model + QUICK_GELU_SUFFIX
        instead = f"take --model {other}" if other in list_models() else f"name a model with {ACTIVATIONS[says]}"
        flag = next(name for name, quick in ACTIVATION_NAMES.items() if quick == asked)
        raise CheckpointError(
            f"{contents.source} was trained with {ACTIVATIONS[says]}, but --model {model} uses {ACTIVATIONS[asked]}: "
            f"{instead}, or add --activation {flag} if the checkpoint is wrong"
        )
    return bool(asked if says is None else says)


def _sized(config: CLIPConfig, image_size: int, context_length: int) -> CLIPConfig:
    text = dataclasses.replace(config.text, context_length=context_length)
    return dataclasses.replace(config.with_vision(image_size=image_size), text=text)


def _wanted(what: str, flag: str, stored: int, configured: int, wished: int | None, label: str | Path) -> int:
    """Return the size that the result is to have; one that differs from the weights' own must be wished for."""
    if wished is None and stored != configured:
        raise CheckpointError(
            f"{label} has positions for {what} {stored}, but the model's {what} is {configured}: add {flag} "
            f"{configured} to resize them, or {flag} {stored} to keep them"
        )
    return configured if wished is None else wished


def _resized(
    state: Mapping[str, Tensor], stored: CLIPConfig, image_size: int, context_length: int, source: Path
) -> dict[str, Tensor]:
    """Return ``state`` with its positions resized as OpenCLIP resizes them."""
    result = dict(state)
    old, patch = stored.vision.image_size, stored.vision.patch_size
    if image_size != old:
        if not isinstance(stored.vision.layers, int) or patch is None:
            raise CheckpointError(f"{source} holds a ResNet, whose positions cannot be resized: leave --image-size out")
        if image_size % patch:
            raise CheckpointError(f"--image-size must be a multiple of the patch size {patch}, got {image_size}")
        grids = ((old // patch,) * 2, (image_size // patch,) * 2)
        result[POSITIONS_NAME] = interpolate_positions(state[POSITIONS_NAME], *grids)
    if context_length != stored.text.context_length:
        result[TEXT_POSITIONS_NAME] = resize_context(state[TEXT_POSITIONS_NAME], context_length)
    return result


def resize_context(positions: Tensor, context_length: int) -> Tensor:
    """Resize the positions of texts [L, width] to [context_length, width], linearly, as OpenCLIP does on loading."""
    columns = positions.to(accumulate_dtype(positions.dtype)).T[None]
    resized = F.interpolate(columns, context_length, mode="linear", align_corners=False)
    return resized[0].T.contiguous().to(positions.dtype)
