"""Small models of transformers with random weights, their inputs, and their comparison with a patched copy."""

from typing import Any

import torch
from torch import Tensor, nn

from . import shrunk

# The token that ends a text does not have the greatest id: tokenizers to which words were added have greater ones.
VOCABULARY, END = 100, 98
# Towers have two layers, since the last block computes only one row, and a block that computes all rows is needed too.
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 13, "bos_token_id": 97, "eos_token_id": END,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
_Settings = dict[str, Any]
CLIP: dict[str, tuple[_Settings, _Settings]] = {
    "clip": ({}, {}),
    "clip with gelu": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "clip of early configurations": ({"eos_token_id": 2}, {}),
    "clip of odd sizes": (
        {"hidden_size": 33, "num_attention_heads": 3, "max_position_embeddings": 7},
        {"hidden_size": 35, "num_attention_heads": 5, "image_size": 23, "patch_size": 5, "num_channels": 1},
    ),
    "clip with dropout": ({"attention_dropout": 0.1}, {"attention_dropout": 0.1}),
}
SIGLIP: dict[str, tuple[_Settings, _Settings]] = {
    "siglip": ({}, {}),
    "siglip with gelu": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "siglip of odd sizes": (
        {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 7, "projection_size": 35},
        {"hidden_size": 35, "num_attention_heads": 5, "image_size": 25, "patch_size": 5},
    ),
}
PAIRS = [*CLIP, *SIGLIP, "siglip2"]
TOWERS = [
    "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPTextModel", "CLIPTextModelWithProjection",
    "CLIPForImageClassification", "SiglipVisionModel", "SiglipTextModel", "SiglipForImageClassification",
    "Siglip2VisionModel", "Siglip2TextModel",
]  # fmt: skip


def make(name: str, implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Return the small model of transformers to adopt with this name in ``PAIRS`` or ``TOWERS``, in training mode."""
    import transformers

    torch.manual_seed(0)
    options = {"attn_implementation": implementation, **options}
    if name in TOWERS:
        family = name.split("Vision")[0].split("Text")[0].split("For")[0]
        part = getattr(transformers, f"{family}{'Text' if 'Text' in name else 'Vision'}Config")
        settings: _Settings = TEXT if "Text" in name else VISION
        if "Classification" in name:
            part, settings = getattr(transformers, f"{family}Config"), {"vision_config": VISION, "text_config": TEXT}
        return _built(getattr(transformers, name), part(**settings, **options))
    family = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[name.split()[0]]
    text, vision = {**CLIP, **SIGLIP}.get(name, ({}, {}))
    text, vision = {**TEXT, **text}, {**VISION, **vision}
    if family == "CLIP":
        options["projection_dim"] = 31
    else:  # SigLIP models have no projection of images
        text.setdefault("projection_size", vision["hidden_size"])
    if family == "Siglip2":
        vision["num_patches"] = 16  # positions are resized from a square grid of 4 x 4
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **options)
    return _built(getattr(transformers, f"{family}Model"), config)


def _built(kind: type[nn.Module], config: object) -> nn.Module:
    """Return a small model of transformers with random weights to adopt, in training mode."""
    return shrunk.randomised(kind(config)).train()


def inputs(model: nn.Module, padding: str | None = None, batch: int = 3) -> dict[str, Tensor]:
    """Return inputs for a small model of transformers that is adopted: pairs, images or texts.

    Args:
        model: a model that :func:`make` returned.
        padding: where the mask hides tokens: at the "end", "early" (the end of the text too), "start", "middle" or
            "nowhere" (a mask of ones); None for no mask.
        batch: number of pairs.
    """
    generator = torch.Generator().manual_seed(5)
    config: Any = model.config
    dtype, name = next(model.parameters()).dtype, type(model).__name__
    found: dict[str, Tensor] = {}
    if "Text" not in name:
        vision = getattr(config, "vision_config", config)
        if "Siglip2" in name:
            found = naflex(vision, batch, dtype, generator, padding)
        else:
            shape = batch, vision.num_channels, vision.image_size, vision.image_size
            found["pixel_values"] = torch.randn(shape, generator=generator, dtype=dtype)
    if "Vision" not in name and "Classification" not in name:
        text = getattr(config, "text_config", config)
        length = text.max_position_embeddings
        ids = torch.randint(1, END, (batch, length), generator=generator)
        ends = torch.arange(batch) % (length - 3) + 2
        ids[torch.arange(batch), ends] = END
        ids[ids == 2] = 3
        if padding is not None:
            found["attention_mask"] = text_mask(ids, ends, padding)
        found["input_ids"] = ids
    return found


def text_mask(ids: Tensor, ends: Tensor, padding: str) -> Tensor:
    """Return a mask [B, L] that hides tokens of some of the texts of an adopted model."""
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])
    if padding == "end":
        mask[positions > ends[:, None]] = 0
    elif padding == "early":
        mask[positions >= ends[:, None]] = 0
    elif padding == "start":
        mask[0, :2] = 0
    elif padding == "middle":
        mask[:, 1] = 0
    return mask


def naflex(
    config: Any, batch: int, dtype: torch.dtype, generator: torch.Generator, padding: str | None
) -> dict[str, Tensor]:
    """Return patches for a SigLIP 2 model that is adopted: of different sizes with padding, or of one size."""
    sizes = [(2, 5), (3, 4), (4, 3), (1, 7)] if padding == "end" else [(3, 4)]
    shapes = torch.tensor([sizes[i % len(sizes)] for i in range(batch)])
    length = 12
    patches = torch.randn(batch, length, 3 * config.patch_size**2, generator=generator, dtype=dtype)
    mask = (torch.arange(length) < shapes.prod(-1, keepdim=True)).long()
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def flat(output: object, name: str = "") -> dict[str, Tensor]:
    """Return all tensors of an adopted model's output by name, including those of its towers."""
    if isinstance(output, Tensor):
        return {name: output}
    items: Any = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    return {key: x for child, value in items for key, x in flat(value, f"{name}.{child}").items()}


def packed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put an adopted model's gradients of the biases of queries, keys and values into one tensor.

    The gradient of the keys' bias alone is only rounding error, and cannot be compared.
    """
    for name in [name for name in gradients if name.endswith("k_proj.bias")]:
        names = [name.replace("k_proj", f"{each}_proj") for each in "qkv"]
        gradients[name.replace("k_proj", "qkv")] = torch.cat(
            [gradients.pop(each) for each in names if each in gradients]
        )
    return gradients


def results(model: nn.Module, given: dict[str, Tensor], loss_only: bool = False, **options: Any) -> dict[str, Tensor]:
    """Return an adopted model's outputs and the gradients of its parameters and images, by name.

    With ``loss_only``, the gradients are those of the loss that the model itself computes.
    """
    images = {key: given[key].clone().requires_grad_() for key in given.keys() & {"pixel_values"}}
    model.zero_grad()
    torch.manual_seed(1)  # so that dropout drops the same elements of both models
    output = model(**given | images, **options)
    if loss_only:
        outs = {key: getattr(output, key) for key in ("loss", "text_embeds", "image_embeds")}
    else:
        outs = {key: x for key, x in flat(output).items() if x.requires_grad}
    return packed(shrunk.gradients(model, outs, images, output.loss if loss_only else None))
