"""Replacements of attention, blocks and MLPs of transformers' CLIP, SigLIP and SigLIP 2, which call our kernels.

transformers has a registry of attention functions. It is not used here, since a model's configuration would have to
name our function: ``revert_model`` and every copy would need the name that it had before, and a process that unpickles
a model would have to fill the registry first. Methods of instances are replaced, as for the other libraries, and
configurations stay unchanged.

The model makes one mask for all blocks. Without padding there is no mask (and an argument says whether attention is
causal). A mask that hides only padding at the end is equivalent to the number of visible tokens of each sequence. The
encoder recognises such a mask once, and passes the numbers to its blocks.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_qkv
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..kernels.packing import Packing
from ..models.layers import attend_row, has_hooks, is_plain, single_query_attention, take_rows
from ..models.packed_text import PackedText
from . import packable
from .last_row import last_row, why_not_row
from .parts import ADDS, add_norm, drops, linear_gelu, propose_gelu, propose_heads
from .places import Proposal, class_name, computes, is_left, is_untouched, runs_ours

_PREFIXES = {
    "CLIP": "transformers.models.clip.modeling_clip.CLIP",
    "Siglip": "transformers.models.siglip.modeling_siglip.Siglip",
    "Siglip2": "transformers.models.siglip2.modeling_siglip2.Siglip2",
}
# The argument by which an encoder passes to its blocks the number of visible tokens of each sequence, or the packing of
# texts whose tokens are one sequence, [1, T, E].
SEQLENS = "clipfast_seqlens"
# The attention implementations, as configurations name them, that clipfast can replace: they return no weights.
_IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Arguments of transformers' attention functions that clipfast's attention does not support.
_OTHER_ARGUMENTS = ("output_attentions", "position_bias", "softcap")
_PARTS = ("Encoder", "EncoderLayer", "Attention", "MLP")
_ROW_BY_ROW = (
    *(f"torch.nn.modules.{name}" for name in ("normalization.LayerNorm", "linear.Linear", "container.ModuleList")),
    "transformers.activations.QuickGELUActivation", "transformers.activations.GELUActivation",
    "transformers.activations.GELUTanh",
)  # fmt: skip


def part_of(module: nn.Module) -> tuple[str, str]:
    """Return the family of a module of transformers and the rest of its class name, such as ("CLIP", "Attention").

    Both are empty for a module of another library or another family.
    """
    return split_name(class_name(module))


def split_name(name: str) -> tuple[str, str]:
    """Return the family and the rest of the name of a class of transformers, as :func:`part_of` does."""
    for family, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return family, name.removeprefix(prefix)
    return "", ""


def asks_nothing(values: Iterable[object]) -> bool:
    """Return True if all arguments of a call of a patched module are unset: None or False, by identity."""
    return all(value is None or value is False for value in values)


def propose(module: Any) -> Iterator[Proposal]:
    """Propose replacements for attention, an encoder, a block or an MLP of transformers."""
    part = part_of(module)[1]
    if part == "Encoder":
        yield Proposal("attention", "checks whether a mask is padding at the end", encoder)
    elif part == "EncoderLayer":
        yield Proposal("norms", ADDS, encoder_layer)
    elif part == "MLP":
        yield propose_gelu(module.fc1, module.activation_fn, mlp)
    elif part == "Attention":
        yield _propose_attention(module)
    elif part == "MultiheadAttentionPoolingHead":
        yield _propose_head(module)


def _propose_attention(module: Any) -> Proposal:
    """Propose a replacement for attention of transformers, or say why its configuration prevents it."""
    if module.config._attn_implementation not in _IMPLEMENTATIONS:
        text = f"its configuration asks for {module.config._attn_implementation!r} attention"
        return Proposal("attention", text)
    where = ", in evaluation, since it drops weights in training" if module.dropout > 0 else ""
    return propose_heads(module.head_dim, f"attention_qkv{where}", block_attention)


def _propose_head(module: Any) -> Proposal:
    """Propose a replacement for the attention pooling head of a SigLIP image tower."""
    attn = module.attention
    if attn.num_heads > MAX_HEADS or not is_plain(attn, nn.MultiheadAttention):
        text = f"it pools with {attn.num_heads} heads, or with attention that has a hook or an adapter"
        return Proposal("attention", text)
    return Proposal("attention", "clipfast.attention_pool", attention_pooling_head)


def is_attention(module: nn.Module) -> bool:
    """Return True if ``module`` is one of transformers' attention classes."""
    return part_of(module)[1] in ("Attention", "MultiheadAttentionPoolingHead")


def spoken_for(module: Any) -> list[nn.Module]:
    """Return the children that the proposals for ``module`` cover: attention in a pooling head, towers in a model."""
    part = part_of(module)[1]
    if part == "Model":
        return [module.vision_model, module.text_model]
    return [module.attention] if part == "MultiheadAttentionPoolingHead" else []


# Attention of transformers' models


def takes(attn: Any) -> bool:
    """Return True if attention of transformers runs on our kernel, given its replacement, configuration and mode."""
    is_ours = runs_ours(attn) and attn.config._attn_implementation in _IMPLEMENTATIONS
    return is_ours and not drops(attn, attn.dropout)


def block_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a patched block of any family of transformers: [B, N, E] -> [B, N, E], and None.

    Packed texts are one sequence, [1, T, E].
    """
    seqlens = kwargs.pop(SEQLENS, None)
    is_known = asks_nothing(kwargs.get(name) for name in _OTHER_ARGUMENTS)
    is_known = is_known and (attention_mask is None or seqlens is not None) and hidden_states.ndim == 3
    if not is_known or not computes(hidden_states) or not takes(module):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (layer(hidden_states).unflatten(-1, (-1, module.head_dim)) for layer in projections)
    options: Any = {"causal": is_causal(module, kwargs), "scale": float(module.scale)}
    if isinstance(seqlens, Packing):
        out = attention_qkv(q[0], k[0], v[0], cu_seqlens=seqlens, **options)[None]
    else:
        out = attention_qkv(q, k, v, seqlens=seqlens, **options)
    return module.out_proj(out.flatten(2)), None


def is_causal(attn: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if transformers' attention is causal in a call without a mask; only CLIP's reads ``kwargs``."""
    given = kwargs.get("is_causal") if part_of(attn)[0] == "CLIP" else None
    return bool(attn.is_causal if given is None else given)


def attention_pooling_head(module: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the attention pooling of a SigLIP image tower: [B, N, E] -> [B, E].

    The projections of keys and values act on the probe and on the pooled token, so that no other token is projected.

    Args:
        module: the head.
        hidden_state: the tokens.
        attention_mask: SigLIP 2's mask, [B, N], not zero for visible tokens.
    """
    attn = module.attention
    is_known, seqlens = seen_by_padding(attention_mask)
    is_pooled = hidden_state.shape[1] <= MAX_TOKENS and computes(hidden_state) and _is_projection(attn)
    if not is_known or not is_pooled:
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        return type(module).forward(module, hidden_state, **options)
    heads = (attn.num_heads, -1)
    weight_q, weight_k, weight_v = attn.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = attn.in_proj_bias.chunk(3)
    q = F.linear(module.probe[:, 0].expand(len(hidden_state), -1), weight_q, bias_q).unflatten(-1, heads)
    weight_k, weight_v = (weight.unflatten(0, heads) for weight in (weight_k, weight_v))
    out = single_query_attention(q, hidden_state, weight_k, weight_v, seqlens, "auto", bias_k, bias_v)
    out = attn.out_proj(out)[:, None]
    return (out + module.mlp(module.layernorm(out)))[:, 0]


def _is_projection(attn: Any) -> bool:
    """Return True if ``attn`` is PyTorch attention in a model of transformers, without hooks or adapters."""
    is_theirs = type(attn) is nn.MultiheadAttention and is_untouched(attn) and not has_hooks(attn.out_proj)
    is_linear = type(attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    is_plain_projection = attn.in_proj_bias is not None and attn.bias_k is None and not drops(attn, attn.dropout)
    return is_theirs and is_linear and is_plain_projection


# Masks of transformers' attention


def seen_by_mask(mask: Tensor, causal: bool) -> Tensor | None:
    """Return the number of visible tokens of each sequence, if transformers' 4D mask hides only padding at the end.

    The host reads values, as transformers does when it makes the mask. Compiled code does not, and gets None.

    Args:
        mask: [B, 1, N, N], True for visible keys; for a mask of another form, the result is None.
        causal: whether the mask must also hide later tokens.

    Returns:
        [B], at least 1; None if the mask hides anything else.
    """
    is_known = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
    if not is_known or torch.compiler.is_compiling():
        return None
    seqlens = mask[:, 0, -1].sum(-1)
    is_same = (mask == _mask_of(seqlens, mask.shape[-1], causal)).all()
    return seqlens if bool(is_same & (seqlens > 0).all()) else None


def seen_by_padding(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Return whether transformers' 2D mask hides only padding at the end, and the visible tokens of each sequence.

    Args:
        mask: [B, N], not zero for visible tokens; None if all are visible.

    Returns:
        False and None if the mask hides anything else, or in compiled code, which cannot read it; otherwise True and
        [B], at least 1, or None if all tokens are visible.
    """
    if mask is None or torch.compiler.is_compiling():
        return mask is None, None
    seen = mask != 0
    seqlens = seen.sum(-1)
    is_padding = (seen == _leading(seqlens, mask.shape[-1])).all() & (seqlens > 0).all()
    is_known, sees_all = torch.stack((is_padding, seen.all())).tolist()
    return is_known, seqlens if is_known and not sees_all else None


def _mask_of(seqlens: Tensor, length: int, causal: bool) -> Tensor:
    """Return the mask [B, 1, N, N] that transformers makes from a padding mask, True for visible keys."""
    mask = _leading(seqlens, length)[:, None, None].expand(-1, -1, length, -1)
    return mask.tril() if causal else mask


def _leading(seqlens: Tensor, length: int) -> Tensor:
    """Return transformers' mask [B, length] that is True for the first ``seqlens[b]`` tokens of each sequence b."""
    return torch.arange(length, device=seqlens.device) < seqlens[:, None]


# Blocks of transformers' models


def encoder(module: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Compute ``CLIPEncoder``, ``SiglipEncoder`` or ``Siglip2Encoder``: a ``BaseModelOutput`` with [B, N, E]."""
    from transformers.modeling_outputs import BaseModelOutput

    seqlens = None
    has_ours = len(module.layers) > 0 and _is_ours(module.layers[0])
    # A mask of batch size 1 is broadcast over all sequences, and does not give a number for each: it stays a mask.
    if has_ours and attention_mask is not None and attention_mask.shape[0] == len(inputs_embeds):
        seqlens = seen_by_mask(attention_mask, is_causal(module.layers[0].self_attn, kwargs))
    x = _run_layers(module.layers, inputs_embeds, attention_mask, seqlens, kwargs)
    return BaseModelOutput(last_hidden_state=x)


def _run_layers(
    layers: Iterable[Any], x: Tensor, attention_mask: Tensor | None, seqlens: Tensor | Packing | None,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Run the blocks of transformers' encoder on tokens [B, N, E]; our blocks get the number of visible tokens [B].

    With a packing in the place of these numbers, the tokens are those of packed texts, [1, T, E].
    """
    if isinstance(seqlens, Tensor) and attention_mask is None and is_left(x):
        attention_mask, seqlens = _mask_of(seqlens, x.shape[1], bool(kwargs.get("is_causal"))), None
    for layer in layers:
        told = {SEQLENS: seqlens} if seqlens is not None and _is_ours(layer) else {}
        x = layer(x, attention_mask, **kwargs, **told)
    return x


def _is_ours(layer: Any) -> bool:
    """Return True if transformers' ``layer`` is a block whose attention runs on our kernel."""
    return part_of(layer)[1] == "EncoderLayer" and takes(layer.self_attn)


def encoder_layer(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Compute ``CLIPEncoderLayer``, ``SiglipEncoderLayer`` or ``Siglip2EncoderLayer``: [B, N, E] -> [B, N, E]."""
    compute = functools.partial(_layer, layer, attention_mask=attention_mask, **kwargs)
    return _checkpointed(layer, compute, hidden_states)


def _layer(layer: Any, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Compute a patched block of transformers: [B, N, E] -> [B, N, E]."""
    branch = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=attention_mask, **kwargs)[0]
    x, normed = add_norm(x, branch, layer.layer_norm2)
    return x + layer.mlp(normed)


def mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the ``MLP`` of a patched block of transformers: [..., E] -> [..., E]."""
    return module.fc2(linear_gelu(module.fc1, module.activation_fn, hidden_states))


def _checkpointed(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, under activation checkpointing if transformers would checkpoint ``layer``."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(function, x)
    return function(x)


def why_not_short(encoder: Any, num_tokens: int | None) -> str:
    """Return why transformers' encoder cannot compute one row in its last block, or packed texts; "" if it can.

    Args:
        encoder: the encoder.
        num_tokens: the number of tokens of a sequence of which one row is read; None for packed texts.
    """
    if part_of(encoder)[1] != "Encoder" or not is_untouched(encoder) or not len(encoder.layers):
        return "its stack of blocks is not transformers' own, has a hook, or has no blocks"
    if num_tokens is None:
        refusal = packable.why_not_packed(encoder, _is_row_by_row)
    else:
        last = encoder.layers[-1]
        heads = getattr(getattr(last, "self_attn", None), "num_heads", 0)
        refusal = why_not_row(last, num_tokens, heads, _is_row_by_row)
    if not refusal and not all(hasattr(layer, "self_attn") and takes(layer.self_attn) for layer in encoder.layers):
        return "its attention is not ours, or drops weights"
    return refusal


def _is_row_by_row(part: nn.Module) -> bool:
    """Return True if a module of transformers computes each row of its result from the same row of its input."""
    return part_of(part)[1] in _PARTS or class_name(part) in _ROW_BY_ROW


def read_packed(encoder: Any, x: Tensor, text: PackedText) -> Tensor:
    """Run the blocks of transformers' encoder on packed texts, and return the last row of each: [1, T, E] -> [B, E]."""
    if why_not_short(encoder, text.max_seqlen):
        row = take_rows(_run_layers(encoder.layers, x, None, text.packing, {"is_causal": True}), text)
    else:
        row = read_row(encoder, x, text, True, None)
    return row[text.order]


def read_row(encoder: Any, x: Tensor, rows: Tensor | PackedText | None, causal: bool, seqlens: Tensor | None) -> Tensor:
    """Run the blocks of transformers' encoder, the last one for a single row of each sequence: [B, N, E] -> [B, E].

    Args:
        encoder: an encoder for which :func:`why_not_short` returns "".
        x: the tokens that enter the blocks.
        rows: [B], the row of each sequence to compute; None for the first; packed texts for the last of each, in their
            packed order.
        causal: each token attends only to itself and the tokens before it.
        seqlens: [B], the number of visible tokens of each sequence; None for all.
    """
    *layers, last = encoder.layers
    seen = rows.packing if isinstance(rows, PackedText) else seqlens
    x = _run_layers(layers, x, None, seen, {"is_causal": True} if causal else {})
    return _checkpointed(last, functools.partial(_last_row, last, rows=rows, causal=causal, seqlens=seqlens), x)


def _last_row(layer: Any, x: Tensor, rows: Tensor | PackedText | None, causal: bool, seqlens: Tensor | None) -> Tensor:
    """Compute one row of the output of a patched block of transformers for each sequence: [B, N, E] -> [B, E]."""
    attn = layer.self_attn
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    weights, biases = [layer.weight for layer in projections], [layer.bias for layer in projections]
    out = attend_row(layer.layer_norm1(x), rows, attn.num_heads, weights, biases, causal=causal, seqlens=seqlens)
    return last_row(x, rows, attn.out_proj(out), layer.layer_norm2, layer.mlp)
