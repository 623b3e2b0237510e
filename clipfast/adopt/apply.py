"""Goes through a model of OpenCLIP, transformers or timm, and replaces each module's methods where our ops fit."""

from collections.abc import Iterator, Mapping

from torch import nn

from . import fp8_linears, hf, hf_model, hf_towers, naflex_vit, open_clip, open_clip_towers, parts, timm
from .places import RECORD, Proposal, carry_out, check_module, class_name, revert_model


def apply_to_open_clip(
    model: nn.Module,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    patch_embed: bool = True,
    text_embed: bool = True,
    pooled_last_block: bool = True,
    pack_text: bool = True,
    pack_image: bool = True,
    fp8: str | None = None,
    fp8_skip: tuple[int, int] = (0, 1),
) -> nn.Module:
    """Let a model of OpenCLIP run on the kernels of this package, in place.

    Parameters, state dict, module tree, classes and hooks stay as they are, and results are the same up to rounding.
    Modules that the kernels cannot compute run as before; ``clipfast.report_kernels(model)`` lists them with reasons. A
    second call starts from the original model. Apply it before ``DistributedDataParallel``, FSDP or ``torch.compile``.
    (``DataParallel`` copies replaced methods without their module, and does not work.)

    Args:
        model: a model of ``open_clip.create_model``, or any module with towers of OpenCLIP, including towers of timm.
        attention: self-attention of images and texts, with the causal mask of texts, and the attention pooling of
            ResNets.
        norms: layer norms, each in one pass with the addition before it where there is one.
        activations: GELU and QuickGELU in one pass with the bias before them, on GPUs.
        patch_embed: patches to tokens in one pass, in OpenCLIP's own vision transformers. Images may then also be uint8
            as decoded, if the model knows its mean and standard deviation as those of OpenCLIP's factory do. Patches
            that patch dropout drops are not read.
        text_embed: tokens plus positions in one pass.
        pooled_last_block: the last block of a tower computes only the row that the tower uses; this needs
            ``attention``.
        pack_text: CLIP's standard text tower, which is causal and reads the end-of-text token, does not compute the
            tokens after it, if they are at least a tenth of a batch, and if no hook or wrapper would see the packed
            tokens; this needs ``attention``. On a GPU a batch must have 8,192 tokens, and the host waits for the
            lengths of its texts unless they are packed before (:func:`clipfast.pack_texts`).
        pack_image: timm's NaFlexVit does not compute the padded patches in batches of timm's NaFlex loader, and embeds
            patches in one pass on GPUs; this needs ``attention``.
        fp8: the linear layers of transformer blocks multiply in 8 bits, by the recipe "switchback" or "full" (see
            :func:`clipfast.fp8_linear`), which a CPU emulates; None for 16 bits. In OpenCLIP's models, the projections
            of ``nn.MultiheadAttention`` do so if ``attention`` replaces it.
        fp8_skip: how many of the first and how many of the last blocks of each tower stay in 16 bits.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: ``model`` contains no module of OpenCLIP, or ``fp8`` cannot be used.
    """
    flags = {
        "attention": attention, "norms": norms, "activations": activations, "patch_embed": patch_embed,
        "text_embed": text_embed, "pooled_last_block": pooled_last_block, "pack_text": pack_text,
        "pack_image": pack_image,
    }  # fmt: skip
    return _apply("apply_to_open_clip", model, "open_clip", flags, fp8, fp8_skip)


def apply_to_timm(
    model: nn.Module,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    pack_image: bool = True,
    fp8: str | None = None,
    fp8_skip: tuple[int, int] = (0, 1),
) -> nn.Module:
    """Let a model of timm run on the kernels of this package, in place, as :func:`apply_to_open_clip` does.

    Args:
        model: a model of ``timm.create_model``, or any module that contains one. A vision transformer gains the most.
        attention: ``timm.layers.Attention``, with norms of queries and keys and gates.
        norms: layer norms, each in one pass with the addition before it where there is one.
        activations: GELU and QuickGELU in one pass with the bias before them, on GPUs.
        pack_image, fp8, fp8_skip: as for :func:`apply_to_open_clip`; the blocks are those of timm's
            ``VisionTransformer``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: ``model`` contains no module of timm, or ``fp8`` cannot be used.
    """
    flags = {"attention": attention, "norms": norms, "activations": activations, "pack_image": pack_image}
    return _apply("apply_to_timm", model, "timm", flags, fp8, fp8_skip)


def apply_to_hf(
    model: nn.Module,
    attention: bool = True,
    norms: bool = True,
    activations: bool = True,
    patch_embed: bool = True,
    text_embed: bool = True,
    pooled_last_block: bool = True,
    loss: bool = True,
    pack_text: bool = True,
    fp8: str | None = None,
    fp8_skip: tuple[int, int] = (0, 1),
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
        loss: in training, ``return_loss=True`` gives the loss of the pairs of all ranks of ``torch.distributed``;
            transformers' loss has the negatives of its own rank only. The loss is the same value on all ranks, and the
            mean over ranks that ``DistributedDataParallel`` takes is its gradient. There are no logits then, unless the
            call says ``return_logits=True`` or asks for tuples. In evaluation mode all results are transformers' own.
        pack_text: where ``pooled_last_block`` is in effect, CLIP's text tower computes no token after the end-of-text
            token, as in :func:`apply_to_open_clip`.
        fp8, fp8_skip: as for :func:`apply_to_open_clip`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a switch is not a bool.
        ValueError: ``model`` contains no module of transformers, or ``fp8`` cannot be used.
    """
    flags = {
        "attention": attention, "norms": norms, "activations": activations, "patch_embed": patch_embed,
        "text_embed": text_embed, "loss": loss, "pooled_last_block": pooled_last_block, "pack_text": pack_text,
    }  # fmt: skip
    return _apply("apply_to_hf", model, "transformers", flags, fp8, fp8_skip)


def _apply(
    function: str, model: nn.Module, library: str, flags: Mapping[str, bool], recipe: str | None, skip: tuple[int, int]
) -> nn.Module:
    """Replace modules of ``library`` in ``model`` by the ops that ``flags`` turn on; errors name ``function``."""
    check_module(function, model)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")
    if not any(class_name(module).startswith(f"{library}.") for module in model.modules()):
        raise ValueError(f"{function}: nothing in this {type(model).__name__} is a module of {library}")
    fp8_linears.check_arguments(function, model, recipe, skip)
    revert_model(model)
    model.__dict__[RECORD] = [
        carry_out(module, name, proposal, flags[proposal.kind])
        for name, module, proposal in proposals(model, flags)
        if proposal.kind in flags
    ]
    if recipe is not None:
        found = list(fp8_linears.propose(model, recipe, skip))
        model.__dict__[RECORD] += [carry_out(module, name, proposal, True) for name, module, proposal in found]
        fp8_linears.keep_on_cpus(model, skip)
    return model


def proposals(model: nn.Module, flags: Mapping[str, bool]) -> Iterator[tuple[str, nn.Module, Proposal]]:
    """Propose replacements for each module of ``model``, and then for each tower; yield name, module and proposal.

    The proposals for a tower depend on the replacements in its modules, which the caller makes first.
    """
    masks = open_clip.find_masks(model)
    inside: set[int] = set()  # modules that the proposal for an enclosing module already covers
    for name, module in model.named_modules():
        inside |= {id(child) for child in hf.spoken_for(module)}
        for proposal in _propose_part(module, masks.get(id(module)), flags):
            if proposal.kind == "activations":
                inside |= {id(child) for child in module.children()}
            if proposal.kind == "norms" or id(module) not in inside:
                yield name, module, proposal
    for name, module in model.named_modules():
        for proposal in _propose_tower(module) if id(module) not in inside else ():
            yield name, module, proposal


def _propose_part(module: nn.Module, mask: parts.Mask | None, flags: Mapping[str, bool]) -> Iterator[Proposal]:
    """Propose replacements for attention, a block, a norm or an MLP, by the functions for the library of its class."""
    name = class_name(module)
    library = name.partition(".")[0]
    found: list[Proposal] = []
    if name in parts.NORMS:
        found = [parts.propose_norm(module)]
    elif name in _ATTENTIONS:
        found = [open_clip.under_mask(_ATTENTIONS[name](module), mask)]
    elif library == "torch":
        found = list(parts.propose_mlp(module))
    elif library == "open_clip":
        found = list(open_clip.propose_block(module, mask, flags["attention"], flags["norms"]))
    elif library == "timm":
        found = list(timm.propose(module, flags["norms"]))
    elif library == "transformers":
        found = list(hf.propose(module))
    yield from found or _propose_unknown(module)


_ATTENTIONS = {parts.MULTIHEAD: parts.propose_multihead} | open_clip.ATTENTIONS | timm.ATTENTIONS
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")


def _propose_unknown(module: nn.Module) -> Iterator[Proposal]:
    """Yield the reason why an activation, attention or norm of an unknown class is not replaced."""
    name, kind = class_name(module), type(module).__name__
    if name.rpartition(".")[0] in _ACTIVATIONS or name in parts.GELUS:
        yield Proposal("activations", f"{kind} is not in one of the perceptrons that are known")
    elif ("Attention" in kind or kind.endswith("Attn")) and not kind.endswith("Block"):
        if not any(class_name(inner) in _ATTENTIONS or hf.is_attention(inner) for inner in module.modules()):
            yield Proposal("attention", f"{kind} is not one of the attention classes that are known")
    elif "norm" in kind.lower() and next(module.children(), None) is None:
        yield Proposal("norms", f"{kind} is not one of the layer norms that are known")


def _propose_tower(module: nn.Module) -> Iterator[Proposal]:
    """Propose replacements for the embedding and the last block of a tower."""
    name = class_name(module)
    if name.startswith("open_clip."):
        yield from open_clip_towers.propose_tower(module)
    elif name == naflex_vit.TOWER:
        yield from naflex_vit.propose_tower(module)
    elif name.startswith("timm.layers.patch_embed."):
        yield Proposal("patch_embed", "timm's patch embedding adds neither positions nor a class token")
    else:  # the user's own class may be derived from a model of transformers
        yield from hf_towers.propose_embeddings(module)
        yield from hf_model.propose_model(module)
