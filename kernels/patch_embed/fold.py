"""The normalisation of bytes, folded into a projection of patches; ``op`` has the equations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def fold(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Fold the normalisation of bytes into a projection [E, C, ...]: return W' and b' in the accumulation dtype."""
    work = weight.to(accumulate_dtype(weight.dtype))
    return _scale_channels(work, _gains(std)), _scale_channels(work, _shifts(mean, std)).flatten(1).sum(1)


def operands(
    images: Tensor, weight: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the weight that multiplies patches in ``dtype``, and the bias; for bytes, both have the normalisation."""
    if images.dtype == torch.uint8:
        weight, bias = fold(weight, mean, std)
    else:
        bias = weight.new_zeros(len(weight), dtype=accumulate_dtype(weight.dtype))
    return weight.to(dtype), bias


def unfold_grad(grad_folded: Tensor, grad_bias: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the gradient of a projection W from those of W' and b', into which the normalisation is folded."""
    shift = _scale_channels(grad_bias[:, None, None, None].expand_as(grad_folded), _shifts(mean, std))
    return _scale_channels(grad_folded, _gains(std)) + shift


def factors_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return for each channel the factors that fold the normalisation of bytes into a projection.

    They are the gain that the channel's weights are multiplied by, and the shift with which their sum enters the bias.
    """
    if images.dtype == torch.uint8:
        return _gains(std), _shifts(mean, std)
    return [1.0] * images.shape[1], [0.0] * images.shape[1]


def _gains(std: Sequence[float]) -> list[float]:
    """Return the gain of each channel, 128 / (255 std), for the folded normalisation."""
    return [128 / (255 * s) for s in std]


def _shifts(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """Return the shift of each channel, (128 / 255 - mean) / std, for the folded normalisation."""
    return [(128 / 255 - m) / s for m, s in zip(mean, std, strict=True)]


def _scale_channels(weight: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply the projection's weights of each channel by its factor."""
    # The factors stay numbers: a tensor of them would be copied to the device, which a CUDA graph cannot capture.
    return torch.stack([weight[:, c] * factor for c, factor in enumerate(factors)], dim=1)


def channel_values(
    op: str, mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    """Return mean and std of each channel as numbers; refuse values that do not fit the channels."""
    return _channel_values(op, "mean", mean, channels), _channel_values(op, "std", std, channels)


def _channel_values(op: str, name: str, values: Sequence[float], channels: int) -> list[float]:
    """Return the mean or std of each channel as numbers; refuse values that do not fit the channels."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: {name} must be a sequence of numbers, got {values!r}") from error
    usable = all((0 if name == "std" else -math.inf) < number < math.inf for number in numbers)
    if len(numbers) != channels or not usable:
        kind = "positive" if name == "std" else "finite"
        raise ValueError(f"{op}: {name} must be {channels} {kind} numbers, one per channel, got {values!r}")
    return numbers
