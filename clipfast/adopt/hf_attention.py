"""The attention of transformers' CLIP, SigLIP and SigLIP 2 on our attention.

transformers has a registry of attention functions. It is not used here, since the configuration of a model would have
to name ours: ``revert`` and every copy would have to know what it named before, and a process that reads a pickled
model would have to fill the registry first. Methods of instances are replaced, as for the other libraries, and
configurations stay as they are.

The model makes one mask for all blocks. Without padding there is none (and an argument says whether attention is
causal). If a mask hides only padding at the end, the number of tokens that are seen says all of it. Such a mask is
recognised once, by the encoder, which tells its blocks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import attention_qkv
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from .attention_parts import KIND, drops, too_wide
from .hf_parts import OTHER_VERSION, asks_nothing, has_known_arguments, hf_part
from .places import Proposal, computes, has_hooks, is_left, is_plain, is_untouched, runs_ours

# The argument by which an encoder hands on how many tokens of each sequence are seen.
SEQLENS = "clipfast_seqlens"
# The implementations, by their names in a configuration, that compute what ours does and return no weights.
_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Arguments of attention functions of transformers that ours does not have.
_OTHER_ARGUMENTS = ("output_attentions", "position_bias", "softcap")


def propose_hf_attention(module: Any) -> Proposal:
    """Say what to do with the attention of a block."""
    if not has_known_arguments(module):
        return Proposal(KIND, OTHER_VERSION)
    if module.config._attn_implementation not in _IMPLEMENTATIONS:
        return Proposal(KIND, f"its configuration asks for {module.config._attn_implementation!r} attention")
    function = clip_attention if hf_part(module)[0] == "CLIP" else siglip_attention
    where = ", in evaluation, since it drops weights in training" if module.dropout > 0 else ""
    return too_wide(module.head_dim) or Proposal(KIND, f"clipfast.attention_qkv{where}", function)


def propose_hf_head(module: Any) -> Proposal:
    """Say what to do with the attention pooling of a SigLIP image tower."""
    if not has_known_arguments(module):
        return Proposal(KIND, OTHER_VERSION)
    attn = module.attention
    if attn.num_heads > MAX_HEADS or not is_plain(attn, nn.MultiheadAttention):
        return Proposal(KIND, f"it pools with {attn.num_heads} heads, or with attention that has a hook or an adapter")
    return Proposal(KIND, "clipfast.attention_pool", attention_pooling_head)


def propose_hf_encoder(module: nn.Module) -> Proposal | None:
    """Say what to do with a stack of blocks; None if ``module`` is none."""
    if hf_part(module)[1] != "Encoder":
        return None
    if not has_known_arguments(module):
        return Proposal(KIND, OTHER_VERSION)
    return Proposal(KIND, "checks whether a mask is padding at the end", encoder)


def find_hf_inside(model: nn.Module) -> set[int]:
    """Return the identities of modules of which the module around them speaks: attention in heads, towers in models."""
    parts = {"MultiheadAttentionPoolingHead": ("attention",), "Model": ("vision_model", "text_model")}
    return {
        id(getattr(module, child))
        for module in model.modules()
        for child in parts.get(hf_part(module)[1], ())
        if hasattr(module, child)
    }


def takes(attn: Any) -> bool:
    """Return True if ``attn`` is ours, and what it is asked for now is what our attention computes."""
    is_ours = runs_ours(attn) and attn.config._attn_implementation in _IMPLEMENTATIONS
    return is_ours and not drops(attn, attn.dropout)


def clip_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute ``CLIPAttention``: [B, N, E] -> [B, N, E], and None for the weights."""
    seqlens = kwargs.pop(SEQLENS, None)
    is_other = not asks_nothing(kwargs.get(name) for name in _OTHER_ARGUMENTS)
    if is_other or not _computes(module, hidden_states, attention_mask, seqlens):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    return _attend(module, hidden_states, is_causal(module, kwargs), seqlens)


def siglip_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute ``SiglipAttention`` or ``Siglip2Attention``: [B, N, E] -> [B, N, E], and None for the weights."""
    seqlens = kwargs.pop(SEQLENS, None)
    if not _computes(module, hidden_states, attention_mask, seqlens):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    return _attend(module, hidden_states, module.is_causal, seqlens)


def is_causal(attn: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if ``attn`` is causal where it is given ``kwargs`` and no mask. (SigLIP's looks at no argument.)"""
    given = kwargs.get("is_causal") if hf_part(attn)[0] == "CLIP" else None
    return bool(attn.is_causal if given is None else given)


def _computes(module: Any, x: Tensor, attention_mask: Tensor | None, seqlens: Tensor | None) -> bool:
    is_known = attention_mask is None or seqlens is not None
    return is_known and x.ndim == 3 and computes(x) and takes(module)


def _attend(module: Any, x: Tensor, causal: bool, seqlens: Tensor | None) -> tuple[Tensor, None]:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (layer(x).unflatten(-1, (-1, module.head_dim)) for layer in projections)
    out = attention_qkv(q, k, v, causal=causal, scale=float(module.scale), seqlens=seqlens)
    return module.out_proj(out.flatten(2)), None


def encoder(module: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Compute ``CLIPEncoder``, ``SiglipEncoder`` or ``Siglip2Encoder``: a ``BaseModelOutput`` with [B, N, E]."""
    from transformers.modeling_outputs import BaseModelOutput

    seqlens = None
    has_ours = len(module.layers) > 0 and _is_ours(module.layers[0])
    # A mask of one sequence may stand for all of them. It says nothing about each.
    if has_ours and attention_mask is not None and attention_mask.shape[0] == len(inputs_embeds):
        seqlens = seen_by_mask(attention_mask, is_causal(module.layers[0].self_attn, kwargs))
    x = run_layers(module.layers, inputs_embeds, attention_mask, seqlens, kwargs)
    return BaseModelOutput(last_hidden_state=x)


def run_layers(
    layers: Iterable[Any], x: Tensor, attention_mask: Tensor | None, seqlens: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Return what blocks make of tokens [B, N, E], telling those that are ours how many tokens [B] are seen."""
    if seqlens is not None and attention_mask is None and is_left(x):
        attention_mask, seqlens = _mask_of(seqlens, x.shape[1], bool(kwargs.get("is_causal"))), None
    for layer in layers:
        told = {SEQLENS: seqlens} if seqlens is not None and _is_ours(layer) else {}
        x = layer(x, attention_mask, **kwargs, **told)
    return x


def _is_ours(layer: Any) -> bool:
    return hf_part(layer)[1] == "EncoderLayer" and takes(layer.self_attn)


def seen_by_mask(mask: Tensor, causal: bool) -> Tensor | None:
    """Return how many tokens of each sequence are seen, if a mask hides padding at the end (and what is to come).

    The host reads values, as transformers does when it makes the mask. Compiled code does not, and gets None.

    Args:
        mask: [B, 1, N, N], True where a key is seen. Others give None.
        causal: what is to come is hidden too.

    Returns:
        [B], at least 1; None if the mask is another one.
    """
    is_known = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
    if not is_known or torch.compiler.is_compiling():
        return None
    seqlens = mask[:, 0, -1].sum(-1)
    expected = _leading(seqlens, mask.shape[-1])[:, None, None]
    if causal:
        expected = expected & torch.ones_like(mask[0, 0]).tril()
    return seqlens if bool((mask == expected).all() & (seqlens > 0).all()) else None


def seen_by_padding(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Return whether a mask hides nothing but padding at the end, and how many tokens of each sequence are seen then.

    Args:
        mask: [B, N], not zero where a token is seen; None if all are.

    Returns:
        False and None if the mask is another one, or would have to be read by compiled code; otherwise True and [B], at
        least 1, or None if all tokens are seen.
    """
    if mask is None or torch.compiler.is_compiling():
        return mask is None, None
    seen = mask != 0
    seqlens = seen.sum(-1)
    is_padding = (seen == _leading(seqlens, mask.shape[-1])).all() & (seqlens > 0).all()
    is_known, sees_all = torch.stack((is_padding, seen.all())).tolist()
    return is_known, seqlens if is_known and not sees_all else None


def _mask_of(seqlens: Tensor, length: int, causal: bool) -> Tensor:
    """Return the mask [B, 1, N, N] that transformers makes of padding, True where a key is seen."""
    mask = _leading(seqlens, length)[:, None, None].expand(-1, -1, length, -1)
    return mask.tril() if causal else mask


def _leading(seqlens: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=seqlens.device) < seqlens[:, None]


def attention_pooling_head(module: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the attention pooling of a SigLIP image tower: [B, N, E] -> [B, E].

    The projections of keys and values act on the probe and on what it pools, and no token is projected.

    Args:
        module: the head.
        hidden_state: the tokens.
        attention_mask: SigLIP 2's, [B, N], not zero where a token is seen.
    """
    attn = module.attention
    is_known, seqlens = seen_by_padding(attention_mask)
    is_pooled = hidden_state.shape[1] <= MAX_TOKENS and computes(hidden_state) and _is_projection(attn)
    if not is_known or not is_pooled:
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        return type(module).forward(module, hidden_state, **options)
    heads = (attn.num_heads, -1)
    weight_q, weight_k, weight_v = attn.in_proj_weight.unflatten(0, (3, *heads)).unbind()
    bias_q, bias_k, bias_v = attn.in_proj_bias.unflatten(0, (3, -1)).unbind()
    probe = module.probe[:, 0].expand(len(hidden_state), -1)
    q = nn.functional.linear(probe, weight_q.flatten(0, 1), bias_q).unflatten(-1, heads)
    out = single_query_attention(q, hidden_state, weight_k, weight_v, seqlens, "auto", bias_k, bias_v)
    out = attn.out_proj(out)[:, None]
    return (out + module.mlp(module.layernorm(out)))[:, 0]


def _is_projection(attn: Any) -> bool:
    """Return True if ``attn`` is PyTorch's and no layer of it has a hook or an adapter, which it would not call."""
    is_theirs = type(attn) is nn.MultiheadAttention and is_untouched(attn) and not has_hooks(attn.out_proj)
    is_linear = type(attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    is_plain_projection = attn.in_proj_bias is not None and attn.bias_k is None and not drops(attn, attn.dropout)
    return is_theirs and is_linear and is_plain_projection


PROPOSALS_OF_HF = {
    **{
        f"transformers.models.{library}.modeling_{library}.{family}Attention": propose_hf_attention
        for library, family in (("clip", "CLIP"), ("siglip", "Siglip"), ("siglip2", "Siglip2"))
    },
    **{
        f"transformers.models.{library}.modeling_{library}.{family}MultiheadAttentionPoolingHead": propose_hf_head
        for library, family in (("siglip", "Siglip"), ("siglip2", "Siglip2"))
    },
}
