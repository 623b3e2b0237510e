"""Small models of transformers with random weights, their inputs, and their comparison with a patched copy."""

import copy

import torch

import clipfast

from . import shrunk

VOCABULARY, END = 100, 98  # an id above the end belongs to the vocabulary, as in tokenizers with added words
# Layers of a tower; a last block of which one row is read needs another one before it.
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 13, "bos_token_id": 97, "eos_token_id": END,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
CLIP = {
    "clip": ({}, {}),
    "clip with gelu": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "clip of early configurations": ({"eos_token_id": 2}, {}),
    "clip of odd sizes": (
        {"hidden_size": 33, "num_attention_heads": 3, "max_position_embeddings": 7},
        {"hidden_size": 35, "num_attention_heads": 5, "image_size": 23, "patch_size": 5, "num_channels": 1},
    ),
    "clip with dropout": ({"attention_dropout": 0.1}, {"attention_dropout": 0.1}),
}
SIGLIP = {
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


def make(name: str, implementation: str = "sdpa", **options: object) -> torch.nn.Module:
    """A model by one of the names above, in training mode."""
    import transformers

    torch.manual_seed(0)
    options = {"attn_implementation": implementation, **options}
    if name in TOWERS:
        family = name.split("Vision")[0].split("Text")[0].split("For")[0]
        part = getattr(transformers, f"{family}{'Text' if 'Text' in name else 'Vision'}Config")
        settings = TEXT if "Text" in name else VISION
        if "Classification" in name:
            part, settings = getattr(transformers, f"{family}Config"), {"vision_config": VISION, "text_config": TEXT}
        return _built(getattr(transformers, name), part(**settings, **options))
    family = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[name.split()[0]]
    text, vision = {**CLIP, **SIGLIP}.get(name, ({}, {}))
    text, vision = {**TEXT, **text}, {**VISION, **vision}
    if family == "CLIP":
        options["projection_dim"] = 31
    else:  # there is no projection of images
        text.setdefault("projection_size", vision["hidden_size"])
    if family == "Siglip2":
        vision["num_patches"] = 16  # the square grid that positions are resized from
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **options)
    return _built(getattr(transformers, f"{family}Model"), config)


def _built(kind: type, config: object) -> torch.nn.Module:
    return shrunk.randomised(kind(config)).train()


def patched_pair(
    name: str, dtype: torch.dtype = torch.float64, **flags: bool
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model, and a patched copy."""
    model = make(name).to(dtype)
    return model, clipfast.apply_to_hf(copy.deepcopy(model), **flags)


def inputs(model: torch.nn.Module, padding: str | None = None, batch: int = 3) -> dict[str, torch.Tensor]:
    """What the model takes: pairs, images or texts.

    Args:
        model: of :func:`make`.
        padding: where the mask hides tokens: at the "end", "early" (the end of the text too), "start", "middle" or
            "nowhere" (a mask of ones); None for no mask.
        batch: number of pairs.
    """
    generator = torch.Generator().manual_seed(5)
    dtype, config, name = next(model.parameters()).dtype, model.config, type(model).__name__
    found = {}
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


def text_mask(ids: torch.Tensor, ends: torch.Tensor, padding: str) -> torch.Tensor:
    """A mask [B, L] that hides tokens of some of the texts."""
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


def naflex(config: object, batch: int, dtype: torch.dtype, generator: torch.Generator, padding: str | None) -> dict:
    """Images of SigLIP 2 in patches: of different sizes with padding, or all of the same size."""
    sizes = [(2, 5), (3, 4), (4, 3), (1, 7)] if padding == "end" else [(3, 4)]
    shapes = torch.tensor([sizes[i % len(sizes)] for i in range(batch)])
    length = 12
    patches = torch.randn(batch, length, 3 * config.patch_size**2, generator=generator, dtype=dtype)
    mask = (torch.arange(length) < shapes.prod(-1, keepdim=True)).long()
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def flat(output: object, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of an output, of its towers too, by name."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    items = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    return {key: x for child, value in items for key, x in flat(value, f"{name}.{child}").items()}


def packed(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The biases of queries, keys and values in one tensor: the gradient of that of keys is rounding error."""
    for name in [name for name in gradients if name.endswith("k_proj.bias")]:
        names = [name.replace("k_proj", f"{each}_proj") for each in "qkv"]
        gradients[name.replace("k_proj", "qkv")] = torch.cat(
            [gradients.pop(each) for each in names if each in gradients]
        )
    return gradients


def results(model: torch.nn.Module, given: dict, loss_only: bool = False, **options: object) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of all parameters and of the images, by name; or the loss and its gradients."""
    given = dict(given)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)  # for whatever is dropped
    output = model(**given, **options)
    if loss_only:
        output.loss.backward()
        found = {f"output {key}": getattr(output, key).detach() for key in ("loss", "text_embeds", "image_embeds")}
    else:
        found = {f"output {key}": x for key, x in flat(output).items() if x.requires_grad}
        generator = torch.Generator().manual_seed(2)
        sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in found.values()).backward()
    found = {key: x.detach() for key, x in found.items()}
    found |= packed({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    if "pixel_values" in given:
        found["images"] = given["pixel_values"].grad
    return found


def assert_equal(
    model: torch.nn.Module, patched: torch.nn.Module, given: dict, limit: float = 1e-10, **options: object
) -> None:
    """Both compute the same, forward and backward."""
    error, where = shrunk.largest_error(results(patched, given, **options), results(model, given, **options))
    assert error <= limit, where
