"""transformers' CLIPModel, SiglipModel and Siglip2Model in training: the loss of the whole batch, over all ranks.

Their ``forward`` returns all that it has: the logits of all pairs of the rank, every row of both towers and, with
``return_loss=True``, a loss whose negatives are those of the rank alone
(https://github.com/huggingface/transformers/issues/22252). In training only the loss is wanted, so that neither the
logits nor the other rows are computed. In evaluation mode the loss and all outputs are computed as theirs are. No rank
waits for another then, so one of them can evaluate alone.
"""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .hf_loss import NO_LOGITS, loss_of_all_ranks
from .hf_parts import OTHER_VERSION, asks_nothing, has_known_arguments, hf_base_part, hf_part
from .hf_towers import pooled_image, pooled_text, why_not_pooled
from .places import Proposal, computes, on_cpus, reaches_ours

ROW = "pooled_last_block"
_WHEN = "in training with return_loss=True"


def propose_hf_model(module: Any) -> Iterator[Proposal]:
    """Yield what to do with the loss of a whole model and with the last blocks of its towers, or of a tower alone."""
    family, part = hf_part(module)
    if hf_base_part(module)[1] == "Model" and part != "Model":
        yield from (Proposal(kind, f"{type(module).__name__} is a class of its own") for kind in ("loss", ROW))
    elif part == "Model" and not has_known_arguments(module):
        yield from (Proposal(kind, OTHER_VERSION) for kind in ("loss", ROW))
    elif part == "Model":
        function = siglip2_model if family == "Siglip2" else pair_model
        loss = "contrastive_loss" if family == "CLIP" else "sigmoid_loss"
        yield Proposal("loss", f"clipfast.{loss} over all ranks, without logits, {_WHEN}", function)
        yield _propose_rows(module, function)
    elif part.startswith(("VisionModel", "TextModel")):
        yield Proposal(ROW, "every row of its last block is returned")


def _propose_rows(model: Any, function: Any) -> Proposal:
    if not reaches_ours(model):
        return Proposal(ROW, "every row is returned if the loss is theirs")
    refusals = {name: why_not_pooled(getattr(model, name)) for name in ("vision_model", "text_model")}
    towers = " and ".join(name for name, refusal in refusals.items() if not refusal)
    others = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items() if refusal)
    if not towers:
        return Proposal(ROW, others)
    text = f"one row of {towers}, by clipfast.attention_pool, {_WHEN}"
    return Proposal(ROW, "; ".join(filter(None, (text, others))), function, option="pools")


@on_cpus
def pair_model(
    model: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_loss: bool | None = None,
    interpolate_pos_encoding: bool = False,
    **kwargs: Any,
) -> Any:
    """Compute ``CLIPModel`` or ``SiglipModel``; see :func:`_forward`."""
    images = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
    texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return _forward(model, images, texts, return_loss, **kwargs)


@on_cpus
def siglip2_model(
    model: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    return_loss: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Compute ``Siglip2Model``; see :func:`_forward`."""
    images = {
        "pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes,
    }  # fmt: skip
    texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return _forward(model, images, texts, return_loss, **kwargs)


def _forward(
    model: Any,
    images: dict[str, Any],
    texts: dict[str, Any],
    return_loss: bool | None,
    *,
    return_logits: bool = False,
    pools: bool = False,
    **kwargs: Any,
) -> Any:
    """Compute what the class of ``model`` does, and in training with ``return_loss`` the loss of the whole batch.

    Args:
        model: the model.
        images, texts: the arguments of its towers.
        return_loss: return a loss.
        return_logits: return the logits beside the loss in training too. transformers' own ``forward`` ignores it.
        pools: in training with ``return_loss``, the last block of a tower may compute one row only.
        kwargs: further arguments of transformers. One that asks for something switches ``pools`` off, since it may be
            about the rows.
    """
    is_whole = isinstance(texts["input_ids"], Tensor) and isinstance(images["pixel_values"], Tensor)
    if not (return_loss and model.training and is_whole and computes(images["pixel_values"])):
        return type(model).forward(model, **images, **texts, return_loss=return_loss, **kwargs)
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = model.config.return_dict
    pools = pools and return_dict and asks_nothing(kwargs.values())
    vision = _tower_output(model, "vision", images, pools, kwargs)
    text = _tower_output(model, "text", texts, pools, kwargs)
    image_embeds, text_embeds = (x / x.norm(dim=-1, keepdim=True) for x in (vision.pooler_output, text.pooler_output))
    device = text_embeds.device
    scale, bias = model.logit_scale.exp().to(device), getattr(model, "logit_bias", None)
    bias = None if bias is None else bias.to(device)
    logits: Any = NO_LOGITS
    if return_logits or not return_dict:
        logits = text_embeds @ image_embeds.t().to(device) * scale + (0 if bias is None else bias)
    output = _output_class(model)(
        loss=loss_of_all_ranks(image_embeds.to(device), text_embeds, scale, bias),
        logits_per_image=logits if logits is NO_LOGITS else logits.t(),
        logits_per_text=logits,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text,
        vision_model_output=vision,
    )
    return output if return_dict else output.to_tuple()


def _tower_output(model: Any, side: str, inputs: dict[str, Any], pools: bool, kwargs: dict[str, Any]) -> Any:
    """Return the output of a tower, with the features in place of what it pooled; without its rows if it pools one."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tower = getattr(model, f"{side}_model")
    pooled = None
    if pools and side == "text":
        pooled = pooled_text(tower, **inputs)
    elif pools and hf_part(tower)[0] == "CLIP":
        pooled = pooled_image(tower, **inputs)
    if pooled is None:
        output = tower(**inputs, return_dict=True, **kwargs)
    else:
        output = BaseModelOutputWithPooling(pooler_output=pooled)
    projection = getattr(model, "text_projection" if side == "text" else "visual_projection", None)
    if projection is not None:
        output.pooler_output = projection(output.pooler_output)
    return output


def _output_class(model: Any) -> Any:
    """Return the class of the model's output: that of CLIPModel is CLIPOutput."""
    family = hf_part(model)[0]
    return getattr(sys.modules[f"transformers.models.{family.lower()}.modeling_{family.lower()}"], f"{family}Output")
