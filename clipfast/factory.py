"""Models by name, with their preprocessing and tokenizer: OpenCLIP's entry points."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import WEIGHTS_NAME, load_checkpoint, read_open_clip_config
from .images import image_transform
from .models import CLIP, CLIPConfig, get_model_config
from .tokenizer import Tokenizer

LOCAL_DIR_PREFIX = "local-dir:"
# Weights' dtype by precision name; "amp" names keep float32 weights and leave the rest to autocast.
PRECISIONS = {
    "fp32": torch.float32,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "pure_bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
}


def create_model(
    model_name: str,
    pretrained: str | Path | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    force_quick_gelu: bool = False,
    force_image_size: int | None = None,
    backend: str = "auto",
    output_dict: bool = False,
) -> CLIP:
    """Build a model, with random weights or those of a checkpoint.

    Args:
        model_name: a name from :func:`clipfast.list_models`, or ``local-dir:FOLDER`` for a folder with
            ``open_clip_config.json`` and its weights.
        pretrained: path of a checkpoint (``.pt``, ``.bin`` or ``.safetensors``).
        precision: "fp32", "amp" or "amp_bf16" (float32 weights), "pure_bf16", "pure_fp16".
        device: where to build it; on "meta" no memory is taken.
        force_quick_gelu: use QuickGELU whatever the name says.
        force_image_size: side of the images in pixels, other than the configuration's.
        backend: "auto", "triton" or "torch" for every op of the model.
        output_dict: let ``forward`` return a dict.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: unknown name or precision, or a checkpoint that does not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    config = _model_config(model_name)
    if force_quick_gelu:
        config = dataclasses.replace(config, quick_gelu=True)
    if force_image_size is not None:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=force_image_size))
    if pretrained is None and model_name.startswith(LOCAL_DIR_PREFIX):
        pretrained = Path(model_name.removeprefix(LOCAL_DIR_PREFIX)) / WEIGHTS_NAME
    with torch.device(device):
        model = CLIP(config, output_dict=output_dict)
    model.set_backend(backend)
    if pretrained is not None:
        load_checkpoint(model, pretrained)
    return model.to(PRECISIONS[precision])


def create_model_and_transforms(
    model_name: str, pretrained: str | Path | None = None, *args: Any, uint8: bool = False, **kwargs: Any
) -> tuple[CLIP, Callable[..., Tensor], Callable[..., Tensor]]:
    """A model with its preprocessing for training and for evaluation.

    Args:
        model_name, pretrained, *args, **kwargs: as :func:`create_model`.
        uint8: let the preprocessing return bytes, which the model normalises itself: a quarter of the memory and of
            the traffic to the GPU.

    Returns:
        ``(model, preprocess_train, preprocess_val)``; the preprocessing turns a PIL image into a tensor [3, H, W].
    """
    model = create_model(model_name, pretrained, *args, **kwargs)
    size = model.visual.image_size
    return model, image_transform(size, train=True, uint8=uint8), image_transform(size, uint8=uint8)


def get_tokenizer(model_name: str = "ViT-B-32", context_length: int | None = None) -> Tokenizer:
    """The tokenizer that goes with a model: text to ids [B, context_length]."""
    return Tokenizer(context_length or _model_config(model_name).text.context_length)


def _model_config(model_name: str) -> CLIPConfig:
    if model_name.startswith(LOCAL_DIR_PREFIX):
        return read_open_clip_config(model_name.removeprefix(LOCAL_DIR_PREFIX))
    return get_model_config(model_name)
