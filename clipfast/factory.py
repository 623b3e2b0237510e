"""OpenCLIP's entry points: ``create_model`` and its variants, which build models with preprocessing and tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .checkpoints.preprocessing import PREPROCESSING_KEYS, check_preprocessing, complete_preprocessing, preprocessing_of
from .checkpoints.sources import ModelSource, load_source, resolve_source
from .models import CLIP, CLIPConfig, NaFlexConfig, SigLIPConfig, build
from .models.aug_cfg import training_options
from .models.file_tokenizer import FILE_NAME as TOKENIZER_NAME
from .models.file_tokenizer import FileTokenizer, tokenizer_of
from .models.images import make_transform
from .models.layers import lower_weights
from .models.naflex import NaFlexVision
from .models.naflex_config import MOST_PATCHES
from .models.sequence_size import ToSequence
from .models.tokenizer import Tokenizer

# This maps the precisions that give all weights one dtype to that dtype. With "amp...", the caller runs the model under
# autocast.
PRECISIONS = {
    "fp32": torch.float32,
    "amp": torch.float32,
    "amp_bf16": torch.float32,
    "amp_bfloat16": torch.float32,
    "pure_bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
}
# This maps the precisions that give only the weights of matrix products a lower dtype to that dtype. Norms, embeddings
# and logit_scale stay in float32.
MIXED_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NO_TOWER_WEIGHTS = "clipfast loads no weights of one tower: build the model, then load them into its tower"
_NO_SOUND = "clipfast builds no models of sound"
# Further arguments of OpenCLIP's entry points: for each, the values that change nothing in clipfast, and the reason why
# all other values are refused.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "pretrained_image": ((False,), _NO_TOWER_WEIGHTS),
    "pretrained_image_path": ((None,), _NO_TOWER_WEIGHTS),
    # pretrained_text and pretrained_hf concern text towers from transformers, which clipfast does not build.
    "pretrained_text": ((False, True), _NO_TOWER_WEIGHTS),
    "pretrained_text_path": ((None,), _NO_TOWER_WEIGHTS),
    "pretrained_hf": ((False, True), _NO_TOWER_WEIGHTS),
    "pretrained_audio_path": ((None,), _NO_SOUND),
    "audio_aug_cfg": ((None,), _NO_SOUND),
    "force_naflex_vision": (
        (False,),
        "clipfast turns no other image tower into a NaFlex tower: take a model with naflex in its name",
    ),
    "force_custom_text": ((False,), "clipfast's models hold their text tower at the top level"),
    "weights_only": ((True,), "clipfast never unpickles more than weights"),
    "load_weights_only": ((True,), "clipfast never unpickles more than weights"),
    "jit": ((False,), "clipfast's models are not TorchScript"),
}


def create_model(
    model_name: str | ModelSource,
    pretrained: str | Path | None = None,
    *,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, ...] | None = None,
    force_image_seq_len: int | None = None,
    force_context_length: int | None = None,
    force_preprocess_cfg: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    require_pretrained: bool = False,
    backend: str = "auto",
    output_dict: bool | None = False,
    **others: Any,
) -> CLIP:
    """Build a model with random weights, or with weights of a tag, a file, or a repository on the Hugging Face hub.

    Args:
        model_name: a name from :func:`clipfast.list_models`; the path of a clipfast checkpoint, which holds its own
            configuration; ``hf-hub:ORG/REPO`` or ``ORG/REPO`` for a repository, or ``local-dir:FOLDER`` or ``FOLDER``
            for a folder, with ``open_clip_config.json`` and weights, or with a CLIPModel of transformers; the folder of
            a training run, whose newest checkpoint is used if the run is not finished; or the result of
            ``resolve_source``.
        pretrained: for a model with a name, one of its tags (:func:`clipfast.list_pretrained`); or the path of a
            checkpoint (``.pt``, ``.bin`` or ``.safetensors``). The weights of a tag that were trained with QuickGELU
            make the model one with QuickGELU, with a warning if its name does not say so.
        load_weights: False leaves the weights random, and downloads none.
        precision: "fp32", "amp", "amp_bf16" or "amp_bfloat16" (float32 weights); "bf16" or "fp16" (weights of
            products in that dtype, norms and embeddings in float32, as in OpenCLIP); "pure_bf16" or "pure_fp16" (all
            weights).
        device: where to build the model; on "meta" it takes no memory.
        force_quick_gelu: use QuickGELU even if the name does not say so.
        force_patch_dropout: share of each image's patches that a vision transformer drops in training, in place of
            the share in the configuration.
        force_image_size: side of the images in pixels, in place of the configuration's; the positions in a checkpoint
            are resized to it.
        force_image_seq_len: largest number of patches of an image in evaluation, in place of the configuration's, for
            NaFlex models.
        force_context_length: tokens of a text, in place of the configuration's; the positions of texts in a checkpoint
            are resized to it.
        force_preprocess_cfg: any of mean, std, interpolation and resize_mode, in place of those of the weights.
        cache_dir: the folder of the hub's cache; default: huggingface_hub's own.
        require_pretrained: refuse a model without weights to load.
        backend: "auto", "triton" or "torch" for every op of the model.
        output_dict: make ``forward`` return a dict.
        **others: further arguments of OpenCLIP's, each accepted only with the value that changes nothing here, such as
            ``pretrained_image=False``.

    Returns:
        The model, in training mode; call ``.eval()`` to compute features for anything but training. A SigLIP model is
        a :class:`~clipfast.models.SigLIP`, which returns ``logit_bias`` too.

    Raises:
        ValueError: if a name, a precision or another value is unknown, or the checkpoint is missing or does not fit.
        TypeError: an argument is unknown.
    """
    _check_arguments(precision, others)
    source = resolve_source(
        model_name, pretrained, cache_dir=cache_dir, fetch_weights=load_weights, force_quick_gelu=force_quick_gelu
    )
    if require_pretrained and source.weights is None:
        raise ValueError(
            f"{model_name} has no weights of its own: pass the path of a checkpoint as pretrained, or a tag of "
            "clipfast.list_pretrained() (on the command line --pretrained)"
        )
    changes = {"patch_dropout": force_patch_dropout, "image_size": force_image_size}
    if force_image_seq_len is not None:
        if not isinstance(source.config.vision, NaFlexConfig):
            raise ValueError(
                f"force_image_seq_len (on the command line --image-seq-len) is for NaFlex models, and {model_name} "
                "takes images of one size"
            )
        changes["image_seq_len"] = force_image_seq_len
    config = _changed(source.config, force_quick_gelu, force_context_length, changes)
    preprocessing = _forced_preprocessing(source.preprocessing, force_preprocess_cfg)
    with torch.device(device):
        model = build(config, output_dict=bool(output_dict))
    model.set_backend(backend)
    set_preprocessing(model, preprocessing)
    if source.weights is not None and load_weights:
        load_source(model, source)
    set_precision(model, precision)
    return model


def set_precision(model: CLIP, precision: str) -> None:
    """Convert the weights of ``model`` in place to a ``precision`` of :func:`create_model`."""
    if precision in PRECISIONS:
        model.to(PRECISIONS[precision])
    else:
        lower_weights(model, MIXED_PRECISIONS[precision])


def _check_arguments(precision: str, others: Mapping[str, Any]) -> None:
    """Refuse an unknown precision in a call of ``create_model``, and arguments of OpenCLIP that are not supported.

    Raises:
        ValueError: the precision is unknown, or an argument has a value that is not supported.
        TypeError: an argument is unknown.
    """
    if precision not in PRECISIONS | MIXED_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS | MIXED_PRECISIONS)}")
    for name, value in others.items():
        if name not in _ONLY:
            raise TypeError(f"create_model: unknown argument {name!r}")
        neutral, reason = _ONLY[name]
        if value not in (*neutral, None):
            only = " or ".join(map(repr, neutral))
            raise ValueError(f"create_model: {name}={value!r} is not supported, only {only}: {reason}")


def _changed(config: CLIPConfig, quick_gelu: bool, context_length: int | None, vision: Mapping[str, Any]) -> CLIPConfig:
    """Return the configuration of a model to create, changed by the ``force_...`` arguments."""
    size = vision["image_size"]
    if isinstance(size, tuple | list) and len(set(size)) == 1:
        vision = {**vision, "image_size": size[0]}
    if context_length is not None:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, context_length=context_length))
    if quick_gelu:
        config = dataclasses.replace(config, quick_gelu=True)  # a SigLIP configuration raises a ValueError here
    return config.with_vision(**vision)


def _forced_preprocessing(preprocessing: Mapping[str, Any], forced: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a model's preprocessing settings, changed by the argument ``force_preprocess_cfg``.

    Raises:
        ValueError: a setting is unknown, or has an invalid value.
    """
    unknown = set(forced or {}) - set(PREPROCESSING_KEYS)
    if unknown:
        raise ValueError(
            f"force_preprocess_cfg has unknown settings {sorted(unknown)}; known: {', '.join(PREPROCESSING_KEYS)}"
        )
    given = {key: value for key, value in (forced or {}).items() if value is not None}
    for key in ("mean", "std"):
        if isinstance(given.get(key), int | float):  # one number stands for all three channels
            given[key] = (given[key],) * 3
    complete = complete_preprocessing({**preprocessing, **given})
    check_preprocessing(complete, "create_model")
    return complete


def set_preprocessing(model: CLIP, preprocessing: Mapping[str, Any]) -> None:
    """Store the preprocessing settings as attributes of the model's image tower, as OpenCLIP does."""
    visual: Any = model.visual
    visual.image_mean, visual.image_std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    visual.resize_mode = preprocessing["resize_mode"]
    known = {key: preprocessing[key] for key in ("interpolation", "resize_mode")}
    visual.preprocess_cfg = {
        "size": visual.image_size, "mode": "RGB", "mean": visual.image_mean, "std": visual.image_std, **known,
        "fill_color": 0,
    }  # fmt: skip


def create_model_and_transforms(
    model_name: str,
    pretrained: str | Path | None = None,
    *,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: Mapping[str, Any] | object | None = None,
    uint8: bool = False,
    **kwargs: Any,
) -> tuple[CLIP, Callable[..., Tensor], Callable[..., Tensor]]:
    """Build a model, and its preprocessing for training and for evaluation.

    Args:
        model_name, pretrained, **kwargs: as :func:`create_model`.
        image_mean, image_std: normalise images with these, in place of the model's own.
        image_interpolation: "bicubic" or "bilinear", in place of the model's own; crops in training are bicubic.
        image_resize_mode: "shortest", "longest" or "squash", in place of the model's own; in evaluation only.
        aug_cfg: augmentations in training (:func:`clipfast.models.aug_cfg.training_options`).
        uint8: make the preprocessing return bytes, which the model normalises itself. They take a quarter of the memory
            of floats, and of the time to copy them to the GPU.

    Returns:
        ``(model, preprocess_train, preprocess_val)``; the preprocessing turns a PIL image into a tensor [3, H, W]. For
        a NaFlex model, ``preprocess_val`` keeps the aspect ratio of an image, and ``encode_image`` takes a list of
        images; ``preprocess_train`` gives squares. The model is in training mode: for inference, take
        :func:`create_model_from_pretrained`.
    """
    training = training_options(aug_cfg)
    forced = {"mean": image_mean, "std": image_std, "interpolation": image_interpolation}
    forced |= {"resize_mode": image_resize_mode}
    model = create_model(model_name, pretrained, force_preprocess_cfg=forced, **kwargs)
    train = transform_of(model, uint8=uint8, train=True, **training)
    return model, train, transform_of(model, uint8=uint8)


def transform_of(model: CLIP, **options: Any) -> Callable[..., Tensor]:
    """Return the image preprocessing of a model: for training if ``options`` has ``train=True``, else for evaluation.

    Args:
        model: the model, which has its preprocessing settings. An image for a NaFlex model keeps its aspect ratio in
            evaluation, and has at most ``image_seq_len`` patches.
        **options: more arguments of :func:`clipfast.models.images.make_transform`.
    """
    preprocessing = preprocessing_of(model)
    given = {key: preprocessing[key] for key in PREPROCESSING_KEYS}
    visual: Any = model.visual
    if isinstance(visual, NaFlexVision) and not options.get("train"):
        normalize = None if options.get("uint8") else (tuple(given["mean"]), tuple(given["std"]))
        longest = visual.image_seq_len or MOST_PATCHES
        return ToSequence(visual.patch_size, longest, given["interpolation"], normalize)
    return make_transform(model.visual.image_size, **given, **options)


@overload
def create_model_from_pretrained(
    model_name: str, pretrained: str | Path | None = None, *, return_transform: Literal[True] = True, **kwargs: Any
) -> tuple[CLIP, Callable[..., Tensor]]: ...


@overload
def create_model_from_pretrained(
    model_name: str, pretrained: str | Path | None = None, *, return_transform: Literal[False], **kwargs: Any
) -> CLIP: ...


def create_model_from_pretrained(
    model_name: str, pretrained: str | Path | None = None, *, return_transform: bool = True, **kwargs: Any
) -> CLIP | tuple[CLIP, Callable[..., Tensor]]:
    """Build a model for inference, in evaluation mode, and its preprocessing.

    In training mode, BatchNorm mixes the images of a batch and patches may be dropped, so that an image's features
    depend on more than the image.

    Args:
        model_name, pretrained, **kwargs: as :func:`create_model_and_transforms`.
        return_transform: False returns the model alone.

    Returns:
        ``(model, preprocess)``; the preprocessing turns a PIL image into a tensor [3, H, W].

    Raises:
        ValueError: there are no weights to load; and as :func:`create_model`.
    """
    model, _, preprocess = create_model_and_transforms(model_name, pretrained, **{**kwargs, "require_pretrained": True})
    return (model.eval(), preprocess) if return_transform else model.eval()


def get_tokenizer(
    model_name: str | ModelSource = "ViT-B-32",
    context_length: int | None = None,
    cache_dir: str | Path | None = None,
    *,
    tokenizer_file: str | Path | None = None,
) -> Tokenizer | FileTokenizer:
    """Return the tokenizer of a model, which turns texts into ids [B, context_length].

    Args:
        model_name, cache_dir: as for :func:`create_model`.
        context_length: tokens per text; default: those of the model.
        tokenizer_file: for SigLIP, whose tokenizers clipfast does not ship: ``tokenizer.json`` of the tokenizers
            package, or the folder that holds it. Default: the file in the model's folder or repository.

    Raises:
        ValueError: the model is unknown; a SigLIP model has no tokenizer file; another model is given such a file, or
            has another vocabulary than CLIP's tokenizer.
        ImportError: a SigLIP model needs the tokenizers package, which is missing.
    """
    source = resolve_source(model_name, cache_dir=cache_dir, fetch_weights=False)
    folder = source.folder if source.folder and (source.folder / TOKENIZER_NAME).is_file() else None
    return tokenizer_for(source.config, str(model_name), tokenizer_file, folder, context_length)


def tokenizer_for(
    config: CLIPConfig,
    name: str,
    file: str | Path | None = None,
    beside: Path | None = None,
    context_length: int | None = None,
) -> Tokenizer | FileTokenizer:
    """Return the tokenizer that fits a model's configuration.

    Args:
        config: the configuration of the model.
        name: the name of the model, for error messages.
        file: for SigLIP, as ``tokenizer_file`` of :func:`get_tokenizer`.
        beside: for SigLIP, the folder of the model, which may have the tokenizer's file.
        context_length: tokens per text; default: those of the model.

    Raises:
        ValueError, ImportError: as :func:`get_tokenizer`.
    """
    if isinstance(config, SigLIPConfig):
        return tokenizer_of(config, name, file or beside, context_length)
    if file is not None:
        raise ValueError(f"{name} has CLIP's tokenizer, which needs no file: leave {file} out")
    text = config.text
    tokenizer = Tokenizer(text.context_length if context_length is None else context_length)
    if text.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {text.vocab_size} tokens, and CLIP's tokenizer has {tokenizer.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer
