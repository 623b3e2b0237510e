"""Replaces ``forward`` of transformers' CLIPModel, SiglipModel and Siglip2Model: the loss of the batch of all ranks.

transformers' ``forward`` returns the logits of all pairs of the rank, every row of both towers and, with
``return_loss=True``, a loss whose negatives come from the rank alone
(https://github.com/huggingface/transformers/issues/22252). In training only the loss is needed, and neither the logits
nor the rows that the loss does not read are computed. In evaluation mode the loss and all outputs are those of
transformers, so that no rank waits for another, and one rank can evaluate alone.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import contrastive_loss, distributed_contrastive_loss, sigmoid_loss
from ..kernels.contrastive.exchange import gather_equal
from ..losses.clip_loss import mean_over_ranks
from ..losses.siglip_loss import SigLipLoss
from . import packable
from .hf import asks_nothing, part_of, split_name
from .hf_towers import pooled_image, pooled_text, why_not_packed, why_not_pooled
from .last_row import KIND as ROW
from .places import Proposal, computes, on_cpus, options_of, propose_unless, reaches_ours

_WHEN = "in training with return_loss=True"


def propose_model(module: Any) -> Iterator[Proposal]:
    """Propose replacements for the loss of a transformers model and the last blocks of its towers, or of one tower."""
    family, part = part_of(module)
    bases = [split_name(f"{base.__module__}.{base.__qualname__}")[1] for base in type(module).__mro__[1:]]
    if part != "Model" and "Model" in bases:
        kinds = ("loss", ROW, packable.KIND)
        yield from (Proposal(kind, f"{type(module).__name__} is a class of its own") for kind in kinds)
    elif part == "Model":
        function = siglip2_model if family == "Siglip2" else pair_model
        loss = "contrastive_loss" if family == "CLIP" else "sigmoid_loss"
        yield Proposal("loss", f"clipfast.{loss} over all ranks, without logits, {_WHEN}", function)
        yield _propose_rows(module, function)
        yield _propose_packed(module, function)
    elif part.startswith(("VisionModel", "TextModel")):
        yield Proposal(ROW, "every row of its last block is returned")
        if part.startswith("TextModel"):
            yield Proposal(packable.KIND, "every row is returned")


def _propose_rows(model: Any, function: Any) -> Proposal:
    """Propose that the towers of a transformers model compute single rows, or say why not."""
    if not reaches_ours(model):
        return Proposal(ROW, "every row is returned if the loss is theirs")
    refusals = {name: why_not_pooled(getattr(model, name)) for name in ("vision_model", "text_model")}
    towers = " and ".join(name for name, refusal in refusals.items() if not refusal)
    others = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items() if refusal)
    if not towers:
        return Proposal(ROW, others)
    text = f"one row of {towers}, by clipfast.attention_pool, {_WHEN}"
    return Proposal(ROW, "; ".join(filter(None, (text, others))), function, option="pools")


def _propose_packed(model: Any, function: Any) -> Proposal:
    """Propose that the text tower of a transformers model computes packed texts, or say why not."""
    if part_of(model)[0] != "CLIP":
        return Proposal(packable.KIND, "every token sees the padding")
    refusal = why_not_packed(model.text_model)
    if not refusal and not options_of(model).get("pools"):
        refusal = "every row is returned if the loss is theirs, or without pooled_last_block"
    return propose_unless(refusal, packable.KIND, f"{packable.PACKS}, {_WHEN}", function, option="packs")


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
    """Compute ``forward`` of transformers' ``CLIPModel`` or ``SiglipModel``; see :func:`_forward`."""
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
    """Compute ``forward`` of transformers' ``Siglip2Model``; see :func:`_forward`."""
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
    packs: bool = False,
    **kwargs: Any,
) -> Any:
    """Compute a transformers model's ``forward``; in training with ``return_loss`` the loss is that of all ranks.

    Args:
        model: the model.
        images, texts: the arguments of its towers.
        return_loss: return a loss.
        return_logits: return the logits beside the loss in training too. transformers' own ``forward`` ignores it.
        pools: in training with ``return_loss``, the last block of a tower may compute one row only.
        packs: where ``pools`` is in effect, the text tower may compute packed texts.
        kwargs: further arguments of transformers. Any that is set switches ``pools`` off, since it may need all rows.
    """
    is_whole = isinstance(texts["input_ids"], Tensor) and isinstance(images["pixel_values"], Tensor)
    if not (return_loss and model.training and is_whole and computes(images["pixel_values"])):
        return type(model).forward(model, **images, **texts, return_loss=return_loss, **kwargs)
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = model.config.return_dict
    pools = pools and return_dict and asks_nothing(kwargs.values())
    vision = _tower_output(model, "vision", images, pools, False, kwargs)
    text = _tower_output(model, "text", texts, pools, packs, kwargs)
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


def _tower_output(
    model: Any, side: str, inputs: dict[str, Any], pools: bool, packs: bool, kwargs: dict[str, Any]
) -> Any:
    """Run a tower of a transformers model, whose features are in ``pooler_output``; other rows may be missing."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tower = getattr(model, f"{side}_model")
    pooled = None
    if pools and side == "text":
        pooled = pooled_text(tower, **inputs, packs=packs)
    elif pools and part_of(tower)[0] == "CLIP":
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
    """Return the output class of a transformers model, such as CLIPOutput for CLIPModel."""
    family = part_of(model)[0]
    return getattr(sys.modules[f"transformers.models.{family.lower()}.modeling_{family.lower()}"], f"{family}Output")


def loss_of_all_ranks(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """Compute the loss of a patched transformers model on the pairs of all ranks, the same value on every rank.

    After the mean over ranks that DistributedDataParallel takes, every parameter has the gradient of this loss.

    Args:
        image, text: normalised features [b, D] of this rank.
        logit_scale: the factor on the cosine similarities, one element.
        logit_bias: the bias of SigLIP's loss; None computes CLIP's contrastive loss.

    Raises:
        ValueError: the loss is SigLIP's and the ranks hold different numbers of pairs.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if logit_bias is None:
        if world_size == 1:
            return contrastive_loss(image, text, logit_scale)
        return mean_over_ranks(distributed_contrastive_loss(image, text, logit_scale))
    if world_size == 1:
        return sigmoid_loss(image, text, logit_scale, logit_bias)
    sizes = gather_equal(torch.tensor([len(image)], device=image.device), None).flatten().tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"the sigmoid loss takes equally many pairs from every rank, got {sizes}: drop the last batch")
    loss = SigLipLoss(rank=dist.get_rank(), world_size=world_size)(image, text, logit_scale, logit_bias)
    return mean_over_ranks(loss)


class NoLogits:
    """A placeholder for the logits of all pairs, which were not computed; using it raises an error that says so.

    Code that only passes outputs on (DistributedDataParallel, accelerate, transformers' Trainer) treats it as an
    object.
    """

    message = (
        "in training the loss is computed without the logits of all pairs: call the model with return_logits=True to "
        "have them, or in evaluation mode"
    )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {self.message}")

    def __repr__(self) -> str:
        return f"NoLogits: {self.message}"

    def __reduce__(self) -> str:
        return "NO_LOGITS"  # a copied or unpickled output gets the global object NO_LOGITS

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        """Refuse the logits of a patched transformers model, whose loss never forms them."""
        raise TypeError(NoLogits.message)

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(cls.message)

    __array__ = __bool__ = __contains__ = __float__ = __getitem__ = __iter__ = __len__ = __setitem__ = _refuse
    __add__ = __matmul__ = __mul__ = __neg__ = __pow__ = __sub__ = __truediv__ = _refuse
    __radd__ = __rmatmul__ = __rmul__ = __rsub__ = __rtruediv__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


NO_LOGITS = NoLogits()


def hf_collator(rows: Sequence[Any]) -> dict[str, Any]:
    """Collate rows of equal shapes into a batch as transformers' Trainer does, with ``return_loss=True``.

    It is the ``data_collator`` of a Trainer for CLIPModel, SiglipModel or Siglip2Model, whose losses are only computed
    with ``return_loss=True``.
    """
    from transformers import default_data_collator

    return {**default_data_collator(list(rows)), "return_loss": True}
