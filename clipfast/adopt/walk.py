"""The walk through a model of OpenCLIP, transformers or timm that puts our ops to each place where they fit."""

from collections.abc import Iterator, Mapping

from torch import nn

from .attention import propose_attention
from .blocks import find_masks, propose_block
from .embeddings import propose_patch_embed
from .hf_attention import find_hf_inside, propose_hf_encoder
from .hf_blocks import propose_hf_layer
from .hf_embeddings import propose_hf_embeddings
from .hf_model import propose_hf_model
from .mlps import find_inside, propose_activation, propose_mlp
from .norms import propose_norm
from .places import RECORD, Proposal, carry_out, check_module, class_name, revert
from .rows import propose_image_tower, propose_text_tower


def apply_to_open_clip(
    model: nn.Module,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    patch_embed: bool = True,
    text_embed: bool = True,
    pooled_last_block: bool = True,
) -> nn.Module:
    """Let a model of OpenCLIP run on the kernels of this package, in place.

    Parameters, state dict, module tree, classes and hooks stay as they are, and results are the same up to rounding.
    What the kernels cannot compute runs as before; ``clipfast.report(model)`` says what, and why. A second call starts
    from the original again. Apply it before ``DistributedDataParallel``, FSDP or ``torch.compile``. (``DataParallel``
    copies replaced methods without their module, and does not work.)

    Args:
        model: of ``open_clip.create_model``, or any module that contains towers of OpenCLIP; timm's towers included.
        attention: self-attention of images and texts, the causal mask of texts recognised as one, and the attention
            pooling of ResNets.
        norms: layer norms, each in one pass with the addition before it where there is one.
        activations: GELU and QuickGELU in one pass with the bias before them, on GPUs.
        patch_embed: patches to tokens in one pass, in OpenCLIP's own vision transformers. Images may then also be uint8
            as decoded, if the model knows its mean and standard deviation as those of OpenCLIP's factory do. Patch
            dropout does not read what it drops.
        text_embed: tokens plus positions in one pass.
        pooled_last_block: the last block of a tower computes only the row that the tower reads; this needs
            ``attention``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: nothing in ``model`` is of OpenCLIP.
    """
    flags = {
        "attention": attention, "norms": norms, "activations": activations, "patch_embed": patch_embed,
        "text_embed": text_embed, "pooled_last_block": pooled_last_block,
    }  # fmt: skip
    return _apply("apply_to_open_clip", model, "open_clip", flags)


def apply_to_timm(model: nn.Module, attention: bool = True, norms: bool = True, activations: bool = True) -> nn.Module:
    """Let a model of timm run on the kernels of this package, in place, as :func:`apply_to_open_clip` does.

    Args:
        model: of ``timm.create_model``, or any module that contains one. A vision transformer gains the most.
        attention: ``timm.layers.Attention``, with norms of queries and keys and gates.
        norms: layer norms, each in one pass with the addition before it where there is one.
        activations: GELU and QuickGELU in one pass with the bias before them, on GPUs.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: nothing in ``model`` is of timm.
    """
    flags = {"attention": attention, "norms": norms, "activations": activations}
    return _apply("apply_to_timm", model, "timm", flags)


def apply_to_hf(
    model: nn.Module,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    patch_embed: bool = True,
    text_embed: bool = True,
    pooled_last_block: bool = True,
    loss: bool = True,
) -> nn.Module:
    """Let a model of transformers run on the kernels of this package, in place, as :func:`apply_to_open_clip` does.

    Configurations stay as they are. With several GPUs, start transformers' ``Trainer`` by ``torchrun``: in one process
    it would take ``DataParallel``.

    Args:
        model: ``CLIPModel``, ``SiglipModel``, ``Siglip2Model``, a tower of one, or any module that contains one. In
            other models of transformers only layer norms and ``nn.MultiheadAttention`` run on our kernels.
        attention: self-attention without a mask and with the causal mask of CLIP's texts, where the configuration asks
            for "sdpa" (the default) or "flash_attention_2" or 3; with padding at the end where it asks for "sdpa"; and
            SigLIP's attention pooling of images. A call that asks for weights, another mask and dropout run as before.
        norms: layer norms, each in one pass with the addition before it where there is one.
        activations: GELU and QuickGELU in one pass with the bias before them, on GPUs; not GELU by tanh.
        patch_embed: patches to tokens in one pass, in CLIP's towers.
        text_embed: tokens plus positions in one pass.
        pooled_last_block: in training with ``return_loss=True``, the last block of a tower computes only the
            row that the tower reads. The output of that tower then has no ``last_hidden_state``, unless the call or the
            configuration asks for hidden states or for attention weights, or for tuples. The first such request leaves
            transformers' hooks in the model, and all rows are computed from then on. This needs ``attention`` and
            ``loss``.
        loss: in training, ``return_loss=True`` gives the loss of the pairs of all ranks of ``torch.distributed``, where
            transformers' has the negatives of its own rank only. It is the same value on all ranks, and the mean over
            ranks that ``DistributedDataParallel`` takes is its gradient. There are no logits then, unless the call says
            ``return_logits=True`` or asks for tuples. In evaluation mode all results are those of before.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: nothing in ``model`` is of transformers.
    """
    flags = {
        "attention": attention, "norms": norms, "activations": activations, "patch_embed": patch_embed,
        "text_embed": text_embed, "loss": loss, "pooled_last_block": pooled_last_block,
    }  # fmt: skip
    return _apply("apply_to_hf", model, "transformers", flags)


def _apply(function: str, model: nn.Module, library: str, flags: Mapping[str, bool]) -> nn.Module:
    check_module(function, model)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")
    if not any(class_name(module).startswith(f"{library}.") for module in model.modules()):
        raise ValueError(f"{function}: nothing in this {type(model).__name__} is a module of {library}")
    revert(model)
    model.__dict__[RECORD] = [
        carry_out(module, name, proposal, flags[proposal.kind])
        for name, module, proposal in proposals(model, flags)
        if proposal.kind in flags
    ]
    return model


def proposals(model: nn.Module, flags: Mapping[str, bool]) -> Iterator[tuple[str, nn.Module, Proposal]]:
    """Yield what can be done with each part of ``model``, and then with each tower: name, module, proposal.

    What can be done with a tower depends on what has been done with its parts.
    """
    masks, inside = find_masks(model), find_inside(model) | find_hf_inside(model)
    for name, module in model.named_modules():
        found = (
            None if id(module) in inside else propose_attention(module, masks.get(id(module))),
            propose_block(module, masks.get(id(module)), flags["attention"], flags["norms"]),
            propose_hf_encoder(module),
            propose_hf_layer(module),
            propose_norm(module),
            propose_mlp(module),
            propose_activation(module, inside),
        )
        for proposal in filter(None, found):
            yield name, module, proposal
    for name, module in model.named_modules():
        for proposal in _propose_tower(module) if id(module) not in inside else ():
            yield name, module, proposal


def _propose_tower(module: nn.Module) -> Iterator[Proposal]:
    """Yield what can be done with the way of images and texts through a tower."""
    yield from filter(None, (propose_patch_embed(module), propose_image_tower(module), propose_hf_embeddings(module)))
    yield from propose_text_tower(module)
    yield from propose_hf_model(module)
