"""Models by name, with their preprocessing and tokenizer: OpenCLIP's entry points."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_checkpoint
from .file_tokenizer import FILE_NAME as TOKENIZER_NAME
from .file_tokenizer import FileTokenizer, tokenizer_of
from .images import image_transform
from .models import CLIP, SigLIPConfig, build, get_model_config, list_models
from .sources import ModelSource, model_source, read_open_clip_folder, read_own_source
from .tokenizer import Tokenizer

LOCAL_DIR_PREFIX = "local-dir:"
# The dtype of the weights for each precision. With "amp", weights are float32, and the caller uses autocast.
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
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | None = None,
    backend: str = "auto",
    output_dict: bool = False,
) -> CLIP:
    """Build a model with random weights or the weights of a checkpoint.

    Args:
        model_name: a name from :func:`clipfast.list_models`; ``local-dir:FOLDER`` for a folder with
            ``open_clip_config.json`` and its weights; or the path of a clipfast checkpoint, which holds its own
            configuration.
        pretrained: path of a checkpoint (``.pt``, ``.bin`` or ``.safetensors``).
        precision: "fp32", "amp" or "amp_bf16" (float32 weights), "pure_bf16", "pure_fp16".
        device: where to build the model; on "meta" it takes no memory.
        force_quick_gelu: use QuickGELU even if the name of a CLIP model does not say so.
        force_patch_dropout: share of each image's patches that a vision transformer drops in training, in place of
            the share in the configuration.
        force_image_size: side of the images in pixels, in place of the configuration's; the positions in a checkpoint
            are resized to it.
        backend: "auto", "triton" or "torch" for every op of the model.
        output_dict: make ``forward`` return a dict.

    Returns:
        The model, in training mode; call ``.eval()`` to compute features for anything but training. A SigLIP model is
        a :class:`~clipfast.models.SigLIP`, which returns ``logit_bias`` too.

    Raises:
        ValueError: if name or precision are unknown, or the checkpoint does not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    source = _resolve(model_name)
    config = source.config
    if force_quick_gelu:
        config = dataclasses.replace(config, quick_gelu=True)  # which a SigLIP model refuses
    config = config.with_vision(patch_dropout=force_patch_dropout, image_size=force_image_size)
    with torch.device(device):
        model = build(config, output_dict=output_dict)
    model.set_backend(backend)
    visual = model.visual
    visual.image_mean, visual.image_std, visual.resize_mode = source.mean, source.std, source.resize_mode
    weights = pretrained if pretrained is not None else source.weights
    if weights is not None:
        load_checkpoint(model, weights)
    return model.to(PRECISIONS[precision])


def create_model_and_transforms(
    model_name: str, pretrained: str | Path | None = None, *, uint8: bool = False, **kwargs: Any
) -> tuple[CLIP, Callable[..., Tensor], Callable[..., Tensor]]:
    """Build a model, and its preprocessing for training and for evaluation.

    Args:
        model_name, pretrained, **kwargs: as :func:`create_model`.
        uint8: make the preprocessing return bytes, which the model normalises itself. They take a quarter of the memory
            of floats, and of the time to copy them to the GPU.

    Returns:
        ``(model, preprocess_train, preprocess_val)``; the preprocessing turns a PIL image into a tensor [3, H, W]. The
        model is in training mode: for inference, take :func:`create_model_from_pretrained`.
    """
    model = create_model(model_name, pretrained, **kwargs)
    visual = model.visual
    train, evaluation = (
        image_transform(
            visual.image_size,
            train=train,
            uint8=uint8,
            mean=visual.image_mean,
            std=visual.image_std,
            resize_mode=visual.resize_mode,
        )
        for train in (True, False)
    )
    return model, train, evaluation


def create_model_from_pretrained(
    model_name: str, pretrained: str | Path | None = None, **kwargs: Any
) -> tuple[CLIP, Callable[..., Tensor]]:
    """Build a model for inference, in evaluation mode, and its preprocessing.

    In training mode, BatchNorm mixes the images of a batch and patches may be dropped, so that an image's features
    depend on more than the image.

    Args:
        model_name, pretrained, **kwargs: as :func:`create_model_and_transforms`.

    Returns:
        ``(model, preprocess)``; the preprocessing turns a PIL image into a tensor [3, H, W].

    Raises:
        ValueError: there are no weights to load; and as :func:`create_model`.
    """
    if pretrained is None and _resolve(model_name).weights is None:
        raise ValueError(f"{model_name} has no weights of its own: pass the path of a checkpoint as pretrained")
    model, _, preprocess = create_model_and_transforms(model_name, pretrained, **kwargs)
    return model.eval(), preprocess


def get_tokenizer(
    model_name: str = "ViT-B-32", context_length: int | None = None, *, tokenizer_file: str | Path | None = None
) -> Tokenizer | FileTokenizer:
    """Return the tokenizer of a model, which turns texts into ids [B, context_length].

    Args:
        model_name: as for :func:`create_model`.
        context_length: tokens per text; default: those of the model.
        tokenizer_file: for SigLIP, whose tokenizers clipfast does not ship: ``tokenizer.json`` of the tokenizers
            package, or the folder that holds it. Default: the file in the model's folder, if it is a ``local-dir:``.

    Raises:
        ValueError: the model is unknown; a SigLIP model has no such file; another model is given one.
        ImportError: the tokenizers package is missing, for SigLIP.
    """
    source = _resolve(model_name)
    if isinstance(source.config, SigLIPConfig):
        folder = source.folder if source.folder and (source.folder / TOKENIZER_NAME).is_file() else None
        return tokenizer_of(source.config, model_name, tokenizer_file or folder, context_length)
    if tokenizer_file is not None:
        raise ValueError(f"{model_name} has CLIP's tokenizer, which needs no file: leave {tokenizer_file} out")
    return Tokenizer(source.config.text.context_length if context_length is None else context_length)


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu" for "auto", by whether there is a GPU, and another name as it is.

    Raises:
        ValueError: the name is not that of a device which this machine has and clipfast runs on.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"clipfast runs on cpu and cuda, not on {name!r}")
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"no GPU for {name!r}: PyTorch finds none that CUDA or ROCm can use; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no GPU for {name!r}: there are {torch.cuda.device_count()}")
    return name


def _resolve(model_name: str) -> ModelSource:
    if model_name.startswith(LOCAL_DIR_PREFIX):
        return read_open_clip_folder(model_name.removeprefix(LOCAL_DIR_PREFIX))
    if model_name.endswith(".pt"):
        return read_own_source(model_name)
    name = model_name.replace("/", "-")  # OpenAI's spelling, as in ViT-B/32
    if name not in list_models() and Path(model_name).is_dir():
        raise ValueError(f"{model_name} is a folder: write local-dir:{model_name}")
    return model_source(get_model_config(name if name in list_models() else model_name))
