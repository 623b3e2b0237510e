"""The blocks of transformers' CLIP, SigLIP and SigLIP 2, and a last block that computes only the row that is read."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from ..models.transformer import take_rows
from .hf_attention import run_layers, takes
from .hf_parts import OTHER_VERSION, has_known_arguments, hf_part
from .norms import ADDS, add_norm
from .places import Proposal, class_name, is_untouched

_PLAIN = (
    "torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.linear.Linear",
    "transformers.activations.QuickGELUActivation", "transformers.activations.GELUActivation",
    "transformers.activations.GELUTanh",
)  # fmt: skip


def propose_hf_layer(module: nn.Module) -> Proposal | None:
    """Say what to do with a block; None if ``module`` is none."""
    if hf_part(module)[1] != "EncoderLayer":
        return None
    if not has_known_arguments(module):
        return Proposal("norms", OTHER_VERSION)
    return Proposal("norms", ADDS, encoder_layer)


def encoder_layer(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Compute ``CLIPEncoderLayer``, ``SiglipEncoderLayer`` or ``Siglip2EncoderLayer``: [B, N, E] -> [B, N, E]."""
    return _checkpointed(
        layer, functools.partial(_layer, layer, attention_mask=attention_mask, **kwargs), hidden_states
    )


def _layer(layer: Any, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
    branch = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=attention_mask, **kwargs)[0]
    x, normed = add_norm(x, branch, layer.layer_norm2)
    return x + layer.mlp(normed)


def _checkpointed(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, computed once more in the backward pass where transformers would do so with ``layer``."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(function, x)
    return function(x)


def why_not_row(encoder: Any, num_tokens: int) -> str:
    """Return why the last block of ``encoder`` cannot compute one row alone, or "" if it can."""
    if hf_part(encoder)[1] != "Encoder" or not is_untouched(encoder) or not len(encoder.layers):
        return "its stack of blocks is not transformers' own, has a hook, or has no blocks"
    last = encoder.layers[-1]
    parts = [part for part in last.modules() if hf_part(part)[1] not in ("EncoderLayer", "Attention", "MLP")]
    if hf_part(last)[1] != "EncoderLayer" or not all(class_name(part) in _PLAIN for part in parts):
        return "its last block has parts that CLIP's has not, such as an adapter"
    if not all(is_untouched(part) for part in last.modules()):
        return "its last block has a hook, or something else has replaced a part of it"
    if not all(hasattr(layer, "self_attn") and takes(layer.self_attn) for layer in encoder.layers):
        return "its attention is not ours, or drops weights"
    if num_tokens > MAX_TOKENS or last.self_attn.num_heads > MAX_HEADS:
        return f"more than {MAX_TOKENS} tokens or {MAX_HEADS} heads"
    return ""


def read_row(encoder: Any, x: Tensor, rows: Tensor | None, causal: bool, seqlens: Tensor | None) -> Tensor:
    """Compute one row of each sequence after all blocks: [B, N, E] -> [B, E].

    Args:
        encoder: of which :func:`why_not_row` says nothing.
        x: the tokens that enter the blocks.
        rows: [B], the rows that are read; None for the first of each sequence.
        causal: a token sees those before it only.
        seqlens: [B], how many tokens of each sequence are seen; None for all.
    """
    *layers, last = encoder.layers
    x = run_layers(layers, x, None, seqlens, {"is_causal": True} if causal else {})
    return _checkpointed(last, functools.partial(_last_row, last, rows=rows, causal=causal, seqlens=seqlens), x)


def _last_row(layer: Any, x: Tensor, rows: Tensor | None, causal: bool, seqlens: Tensor | None) -> Tensor:
    if causal:
        seen = torch.ones(len(x), dtype=torch.int64, device=x.device) if rows is None else rows + 1
        seqlens = seen if seqlens is None else torch.minimum(seen, seqlens)
    branch = _attend_row(layer.self_attn, layer.layer_norm1(x), rows, seqlens)
    x, normed = add_norm(take_rows(x, rows), branch, layer.layer_norm2)
    return x + layer.mlp(normed)


def _attend_row(attn: Any, x: Tensor, rows: Tensor | None, seqlens: Tensor | None) -> Tensor:
    """Compute one row of what ``attn`` returns for each sequence: [B, N, E] -> [B, E]."""
    heads = (-1, attn.head_dim)
    q = F.linear(take_rows(x, rows), attn.q_proj.weight, attn.q_proj.bias).unflatten(-1, heads)
    weight_k, weight_v = (layer.weight.unflatten(0, heads) for layer in (attn.k_proj, attn.v_proj))
    biases = (attn.k_proj.bias, attn.v_proj.bias)
    return attn.out_proj(single_query_attention(q, x, weight_k, weight_v, seqlens, "auto", *biases))
