"""Models of OpenCLIP and timm, shrunk in depth and width but not in kind, and their comparison with a patched copy."""

import copy
import functools
import re
from unittest import mock

import torch
import torch.nn.functional as F

VOCABULARY = 300


def timm_sizes(name: str) -> dict[str, object]:
    """Arguments that make timm's model of this name small."""
    if "fastvit" in name:
        stages = 5 if name.endswith(("3", "4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 32, 64, 64, 64)[:stages]}
    if "convnext" in name:
        return {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    if "swin" in name:
        return {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32}
    if "vitamin" in name or "vit_base_mci" in name:
        return {"depth": 2, "img_size": timm_image_size(name)}  # the width is that of its stem
    return {"depth": 3, "embed_dim": 64, "num_heads": 2, "img_size": timm_image_size(name)}


def timm_image_size(name: str) -> int | None:
    """A few patches of a vision transformer of timm; None for a model whose images stay as large as they are."""
    if not name.startswith(("vit", "eva")):
        return None
    patch = re.search(r"patch(\d+)", name)
    return 4 * int(patch[1] if patch else 16)


def shrink(config: dict) -> dict:
    """The configuration of a small model of the same kind."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 48
    if isinstance(vision.get("layers"), list):
        vision.update(layers=[1, 1, 1, 1], width=16, image_size=64)
    elif image_size := timm_image_size(vision.get("timm_model_name") or ""):
        vision["image_size"] = image_size
    elif "layers" in vision:
        heads = vision.get("width", 768) // vision.get("head_width", 64)
        head_width = 24 if heads * vision.get("head_width", 64) else 32
        vision.update(layers=3, width=2 * head_width, head_width=head_width, image_size=3 * vision["patch_size"])
        vision.update({key: 2 for key in ("attn_pooler_heads",) if key in vision})
    text.update(layers=2, width=48, heads=2, vocab_size=VOCABULARY)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=2, width=48, heads=2)
    return config


def open_clip_model(name: str) -> torch.nn.Module:
    """A small model of OpenCLIP's configuration of this name, with random weights in every parameter."""
    import open_clip
    import timm

    config = shrink(open_clip.get_model_config(name))
    create, size = timm.create_model, {}
    if timm_name := config["vision_cfg"].get("timm_model_name"):
        size = timm_sizes(timm_name)
    with mock.patch.object(timm, "create_model", functools.partial(create, **size)):
        custom = config.pop("custom_text", False)
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
        config = {key: value for key, value in config.items() if key not in ("tokenizer", "preprocess_cfg")}
        return randomised(kind(**config))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Fill in parameters that begin as zeros or tiny values, which would hide errors behind them, or as nothing.

    (OpenCLIP does not initialise the last projection of CoCa's decoder.)
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


def inputs(model: torch.nn.Module, batch: int = 3) -> tuple[torch.Tensor, ...]:
    """Images, and texts where the model has a text tower, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    if not hasattr(model, "visual"):
        size = model.default_cfg["input_size"][1:] if not hasattr(model, "patch_embed") else model.patch_embed.img_size
        return (torch.randn(batch, 3, *size, dtype=dtype),)
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else size
    length = getattr(model, "context_length", 77)
    length -= hasattr(model, "text_decoder")  # CoCa's decoder has a position less than its texts
    texts = torch.randint(1, VOCABULARY - 1, (batch, length))
    texts[:, length // 2] = VOCABULARY - 1
    texts[:, length // 2 + 1 :] = 0
    return torch.randn(batch, 3, *size, dtype=dtype), texts


def outputs(model: torch.nn.Module, *args: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns that is a floating tensor, in a list."""
    out = model(*args)
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def results(model: torch.nn.Module, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of all parameters and of the images, by name."""
    images = args[0].clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)  # for whatever is dropped
    out = outputs(model, images, *args[1:])
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in out)
    loss.backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(out)}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"images": images.grad}


def largest_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error relative to the largest value of its tensor, and the name of that tensor.

    The gradient of a bias that cancels is rounding error in both. Gradients are measured against a thousandth of the
    largest of all at least.
    """
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(float(x.abs().max()) for name, x in expected.items() if not name.startswith("output"))
    errors = [(0.0, "")]
    for name, x in expected.items():
        scale = max(float(x.abs().max()), 1e-30 if name.startswith("output") else floor)
        errors.append((float((got[name] - x).abs().max()) / scale, name))
    assert all(torch.isfinite(x).all() for x in expected.values())
    return max(errors)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Unit rows."""
    return F.normalize(x, dim=-1)
