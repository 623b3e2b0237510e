"""Models of OpenCLIP and timm, shrunk in depth and width but not in kind, and their comparison with a patched copy."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

VOCABULARY = 300
Input = Tensor | dict[str, Tensor]
# Configurations of the transformers models that OpenCLIP's configurations name. They stand here so that none has to be
# downloaded from the Hugging Face hub.
_BY_HEADS = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}
_TEXT_MODELS: dict[str, dict[str, Any]] = {
    "xlm-roberta": {"model_type": "xlm-roberta", **_BY_HEADS},
    "roberta": {"model_type": "roberta", **_BY_HEADS},
    "modernbert": {"model_type": "modernbert", **_BY_HEADS, "eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1},
    "mt5": {"model_type": "mt5", "d_model": 48, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_heads": 2},
    "nllb": {
        "model_type": "m2m_100", "d_model": 48,
        "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96,
        "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 96,
    },
}  # fmt: skip
_HTSAT = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
_SECONDS_OF_AUDIO = 2
# timm's transformers of different kinds and a convolutional network, with the arguments that make each model small.
_SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5, "drop_path_rate": 0.1}
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit_base_patch32_224": {},
    "vit_base_patch16_clip_224": {"img_size": 64},  # a norm before the blocks
    "vit_base_patch16_siglip_224": {"img_size": 64},  # attention pooling
    "vit_small_patch14_dinov2": {"img_size": 56},  # layer scale
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},  # registers
    "deit3_small_patch16_224": {"img_size": 64},  # positions without the class token
    "deit_small_distilled_patch16_224": {"img_size": 64},  # two tokens in front
    "vit_small_patch16_36x1_224": {"img_size": 64, "qk_norm": True},
    "vit_small_patch16_18x2_224": {"img_size": 64},  # parallel branches
    "vit_medium_patch16_gap_240": {"img_size": 64},  # no class token
    "vit_base_patch16_rope_224": {"img_size": 64},  # rotary positions
    "vit_base_patch16_xp_224": {"img_size": 64},  # attention and MLP in parallel, with fused projections
    "eva02_tiny_patch14_224": {"img_size": 56},  # SwiGLU and rotary positions
    "beit_base_patch16_224": {"img_size": 64},  # relative positions
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5},
}


def timm_model(name: str) -> nn.Module:
    """Return a small model of ``TIMM_MODELS`` to adopt, with random weights in every parameter, and with dropout."""
    import timm

    small = {} if "convnext" in name else _SMALL
    return randomised(timm.create_model(name, **small | TIMM_MODELS[name]))


def timm_sizes(name: str) -> dict[str, Any]:
    """Return arguments that make timm's model of this name small, to adopt it."""
    if "fastvit" in name:
        stages = 5 if name.endswith(("3", "4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 32, 64, 64, 64)[:stages]}
    if "convnext" in name:
        return {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    if "swin" in name:
        return {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32}
    if "vitamin" in name or "vit_base_mci" in name:
        return {"depth": 2, "img_size": timm_image_size(name)}  # the width of these models follows from their stem
    return {"depth": 3, "embed_dim": 64, "num_heads": 2, "img_size": timm_image_size(name)}


def timm_image_size(name: str) -> int | None:
    """Return a small image size for an adopted vision transformer of timm; None for a model of fixed image size."""
    if not name.startswith(("vit", "eva")):
        return None
    patch = re.search(r"patch(\d+)", name)
    return 4 * int(patch[1] if patch else 16)


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenCLIP configuration of the same kind of model, but small, to adopt it."""
    config = copy.deepcopy(config)
    config["embed_dim"] = 48
    _shrink_vision(config.get("vision_cfg", {}))
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    elif any(key in config for key in ("genlip_cfg", "genlap_cfg")):
        text.update(vocab_size=VOCABULARY, pad_id=0, bos_id=1, eos_id=2)
        for key in {"genlip_cfg", "genlap_cfg"} & set(config):
            heads = {"width": 32, "num_heads": 2, "mrope_section": [2, 3, 3], "text_embed_dim": 24}
            config[key].update(depth=2, intermediate_size=64, **heads)
    else:
        text.update(layers=2, width=48, heads=2, vocab_size=VOCABULARY)
        if text.get("text_arch") == "modern":
            text.update(pad_id=0, eos_id=VOCABULARY - 1)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=2, width=48, heads=2)
    if "audio_cfg" in config:
        config["audio_cfg"].update(pretrained=False, clip_samples=_SECONDS_OF_AUDIO * 48_000)
        if config["audio_cfg"]["model_type"] == "naflexvit":
            config["audio_cfg"]["naflexvit_cfg"].update(depth=2, embed_dim=48, num_heads=2)
    return config


def _shrink_vision(vision: dict[str, Any]) -> None:
    """Shrink the vision tower in the configuration of an OpenCLIP model to adopt, in place."""
    if isinstance(vision.get("layers"), list):
        vision.update(layers=[1, 1, 1, 1], width=16, image_size=64)
    elif image_size := timm_image_size(vision.get("timm_model_name") or ""):
        vision["image_size"] = image_size
    elif "layers" in vision:
        vision.update(layers=3, width=48, head_width=24, image_size=3 * vision["patch_size"])
        vision.update({key: 2 for key in ("attn_pooler_heads",) if key in vision})


def open_clip_model(name: str) -> nn.Module:
    """Return a small model to adopt, of OpenCLIP's configuration of this name, with random weights."""
    import open_clip

    config = shrink(open_clip.get_model_config(name))
    kind = _kind(config)
    unknown = ("custom_text", "tokenizer", "preprocess_cfg")
    config = {key: value for key, value in config.items() if key not in unknown}
    with contextlib.ExitStack() as stack:
        for patch in _patches(config):
            stack.enter_context(patch)
        model = randomised(kind(**config))
    encoder: Any = getattr(getattr(model, "audio", None), "encoder", None)
    if hasattr(encoder, "bn0"):  # its input is a spectrogram, which is float32 in a model of any dtype
        encoder.bn0.register_forward_pre_hook(_as_weight)
    return model


def _kind(config: dict[str, Any]) -> Any:
    """Return the model class for an OpenCLIP configuration to adopt, as OpenCLIP's factory chooses it."""
    import open_clip

    if "genlip_cfg" in config:
        return open_clip.factory.NaFlexGenLip
    if "genlap_cfg" in config:
        return open_clip.factory.NaFlexGenLap
    if "audio_cfg" in config:
        return open_clip.factory.CLAP
    if "multimodal_cfg" in config:
        return open_clip.CoCa
    text = config["text_cfg"]
    custom = config.get("custom_text") or text.get("hf_model_name") or text.get("text_arch") == "modern"
    return open_clip.CustomTextCLIP if custom else open_clip.CLIP


def _patches(config: dict[str, Any]) -> Iterator[Any]:
    """Yield mocks that shrink the parts of an adopted OpenCLIP model which its configuration only names."""
    import timm

    if timm_name := config.get("vision_cfg", {}).get("timm_model_name"):
        create = timm.create_model
        yield mock.patch.object(timm, "create_model", functools.partial(create, **timm_sizes(timm_name)))
    if name := config["text_cfg"].get("hf_model_name"):
        import transformers

        sizes = next(sizes for part, sizes in _TEXT_MODELS.items() if part in name)
        text_model = transformers.AutoConfig.for_model(**sizes, vocab_size=VOCABULARY, pad_token_id=0)
        yield mock.patch.object(transformers.AutoConfig, "from_pretrained", return_value=text_model)
    audio = config.get("audio_cfg", {}).get("model_type")
    if audio == "HTSAT":
        from open_clip.audio import tower

        yield mock.patch.dict(tower._HTSAT_CONFIGS, dict.fromkeys(tower._HTSAT_CONFIGS, _HTSAT))
    if audio == "whisper":
        from open_clip.audio import whisper

        frames = whisper.get_T_after_cnn(_SECONDS_OF_AUDIO * 100)
        sizes = {"n_mels": whisper.N_MELS, "n_ctx": frames, "n_state": 48, "n_head": 2, "n_layer": 2}
        create = functools.partial(_whisper, whisper.WhisperEncoder, sizes)
        yield mock.patch.object(whisper, "create_whisper_model", create)


def _whisper(kind: Any, sizes: dict[str, int], _: object, output_dim: int) -> Any:
    """Build a small Whisper encoder for OpenCLIP's sound models, to adopt them."""
    return kind(**sizes, output_dim=output_dim)


def _as_weight(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert the inputs of a layer to the dtype of its weight, as a hook of an adopted sound encoder."""
    return tuple(x.to(module.weight.dtype) for x in args)


def randomised(model: nn.Module) -> nn.Module:
    """Draw new values for an adopted model's parameters that are zero, tiny or uninitialised, and return the model.

    Errors would not show after a layer of zeros or tiny values. OpenCLIP does not initialise the last projection of
    CoCa's decoder.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" in name:
                continue
            noise = torch.randn_like(parameter)
            if not parameter.abs().max() < 100:
                parameter.copy_(0.1 * noise)
            elif parameter.ndim <= 1 or parameter.std() < 1e-3:
                parameter.add_(0.1 * noise)
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert an adopted model to a dtype in place, except spectrograms, which OpenCLIP computes in float32."""
    model.to(dtype)
    encoder = getattr(getattr(model, "audio", None), "encoder", None)
    for name in ("spectrogram_extractor", "logmel_extractor"):
        if hasattr(encoder, name):
            getattr(encoder, name).float()
    return model


def inputs(model: Any, batch: int = 3) -> tuple[Input, ...]:
    """Return images or sound, and texts where it has a text tower, for a small model that is adopted."""
    dtype = next(model.parameters()).dtype
    if hasattr(model, "audio") or hasattr(model, "audio_embed"):
        return _sound(model, batch, dtype), _texts(model, batch)
    if not hasattr(model, "visual"):
        size = model.default_cfg["input_size"][1:] if not hasattr(model, "patch_embed") else model.patch_embed.img_size
        return (torch.randn(batch, 3, *size, dtype=dtype),)
    if hasattr(model, "patch_embed"):  # of OpenCLIP's models with images, only GenLIP has this attribute
        return _patches_of(model.patch_embed.proj.in_features, batch, dtype), _texts(model, batch)
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *size, dtype=dtype), _texts(model, batch)


def _texts(model: Any, batch: int) -> Tensor:
    """Draw token ids for a small OpenCLIP model that is adopted."""
    length: int = min(getattr(model, "context_length", 0) or 77, 77)
    length -= hasattr(model, "text_decoder")  # CoCa's decoder has one position less than its texts
    texts = torch.randint(3, VOCABULARY - 1, (batch, length))
    texts[:, length // 2] = VOCABULARY - 1
    texts[:, length // 2 + 1 :] = 0
    return texts


def _sound(model: Any, batch: int, dtype: torch.dtype) -> Input:
    """Draw the sound input of a small OpenCLIP model that is adopted."""
    if hasattr(model, "audio_embed"):  # of OpenCLIP's models with sound, only GenLAP has this attribute
        return _patches_of(model.audio_embed.proj.in_features, batch, dtype)
    config = model.audio.cfg
    if config.model_type == "naflexvit":
        return _patches_of(config.patch_freq * config.patch_time * config.in_chans, batch, dtype)
    waves = torch.randn(batch, _SECONDS_OF_AUDIO * config.sample_rate)
    if not config.enable_fusion:
        return {"waveform": waves}
    mel = torch.randn(batch, 4, 1001, config.mel_bins, dtype=dtype)
    return {"waveform": waves, "mel_fusion": mel, "longer": torch.arange(batch)[:, None] % 2 == 0}


def _patches_of(width: int, batch: int, dtype: torch.dtype) -> Input:
    """Return patches for an adopted NaFlex tower, in a grid of two rows; the last item ends with padding patches."""
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(6)).expand(batch, -1, -1)
    valid = torch.ones(batch, 12, dtype=torch.bool)
    valid[-1, 9:] = False
    return {"patches": torch.randn(batch, 12, width, dtype=dtype), "patch_coord": coordinates, "patch_valid": valid}


def outputs(model: nn.Module, *args: Input) -> list[Tensor]:
    """Return those tensors among the results of an adopted model that require gradients."""
    out = model(*args)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def results(model: nn.Module, *args: Input) -> dict[str, Tensor]:
    """Return an adopted model's outputs, and the gradients of its parameters and its images or sounds, by name."""
    seen = args[0] if isinstance(args[0], dict) else {"images": args[0]}
    seen = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in seen.items()}
    model.zero_grad()
    torch.manual_seed(1)  # so that dropout drops the same elements of both models
    out = outputs(model, seen if isinstance(args[0], dict) else seen["images"], *args[1:])
    return gradients(model, {str(i): x for i, x in enumerate(out)}, seen)


def gradients(
    model: nn.Module, outs: Mapping[str, Tensor], given: Mapping[str, Tensor], loss: Tensor | None = None
) -> dict[str, Tensor]:
    """Return an adopted model's outputs, and the gradients of its parameters and of the ``given`` tensors, by name.

    They are the gradients of the loss, by default of a sum of all outputs with random weights.
    """
    if loss is None:
        generator = torch.Generator().manual_seed(2)
        terms = [(x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outs.values()]
        loss = functools.reduce(torch.add, terms)
    loss.backward()
    leaves = {**dict(model.named_parameters()), **given}
    found = {f"output {name}": x.detach() for name, x in outs.items()}
    return found | {name: x.grad.clone() for name, x in leaves.items() if x.grad is not None}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return an adopted model's largest error relative to the largest value of its tensor, and the name of that tensor.

    Some gradients of biases cancel to rounding error in both models. Therefore an error of a gradient is divided by at
    least a thousandth of the largest gradient of all.
    """
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(x.abs().max()) for name, x in expected.items() if not name.startswith("output"))
    errors = [(0.0, "")]
    for name, x in expected.items():
        scale = max(float(x.abs().max()), 1e-30 if name.startswith("output") else floor)
        errors.append((float((got[name] - x).abs().max()) / scale, name))
    assert all(torch.isfinite(x).all() for x in expected.values())
    return max(errors)
