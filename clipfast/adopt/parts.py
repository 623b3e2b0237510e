"""Replacements that all libraries share: attention, layer norms, activations and embeddings, also those of PyTorch.

Each function computes the ``forward`` of its class, and has the same arguments. A call that asks for attention weights,
padding, dropout, or a mask that is not causal runs the class's own ``forward``.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention, attention_qkv, bias_gelu, bias_quick_gelu, layer_norm
from ..kernels.attention.op import MAX_HEAD_DIM
from ..kernels.layer_norm.op import MAX_WIDTH
from ..kernels.packing import Packing
from ..models.layers import has_hooks, is_plain, project, project_qkv, residual_norm
from .places import Proposal, class_name, computes, is_left, is_untouched, options_of, runs_ours

ADDS = "clipfast.layer_norm, which also adds attention's output"
_LAYERS = ["c_fc", "gelu", "c_proj"]
MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
GELUS = {
    "torch.nn.modules.activation.GELU": bias_gelu,
    "timm.layers.activations.GELU": bias_gelu,
    "timm.layers.activations.QuickGELU": bias_quick_gelu,
    "open_clip.transformer.QuickGELU": bias_quick_gelu,
    "open_clip.layers.QuickGELU": bias_quick_gelu,
    "transformers.activations.GELUActivation": bias_gelu,
    "transformers.activations.QuickGELUActivation": bias_quick_gelu,
}


@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask or the context of an attention module, as far as it is known when the model is patched.

    Attributes:
        owner: the module that holds its causal mask as ``attn_mask``.
        refusal: the reason why its mask is not causal.
        is_cross: True for cross-attention.
        is_padding: True if there is a mask where images have patches that are padding, and none elsewhere.
    """

    owner: nn.Module | None = None
    refusal: str = ""
    is_cross: bool = False
    is_padding: bool = False


# Attention of several libraries' models


def propose_heads(head_dim: int, op: str, function: Any) -> Proposal:
    """Propose to replace attention by ``function``, which calls our op ``op``, unless the heads are too wide."""
    if head_dim > MAX_HEAD_DIM:
        return Proposal("attention", f"heads have {head_dim} dimensions, and at most {MAX_HEAD_DIM} can be computed")
    return Proposal("attention", f"clipfast.{op}", function)


def propose_multihead(module: Any) -> Proposal:
    """Propose a replacement for ``nn.MultiheadAttention``."""
    if not module.batch_first:
        return Proposal("attention", "batch_first=False")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return Proposal("attention", "it adds keys that are no tokens (bias_k, bias_v or add_zero_attn)")
    op = "attention" if module._qkv_same_embed_dim else "attention_qkv"
    return propose_heads(module.head_dim, op, multihead_attention)


def multihead_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | Packing | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    fp8: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``nn.MultiheadAttention``: [B, N, E] -> [B, N, E], and None for the weights.

    ``is_causal`` says that ``attn_mask`` is the causal mask, as in PyTorch, or the packing of texts in its place. With
    a recipe ``fp8``, self-attention projects in 8 bits.
    """
    is_other = key is not value or query.ndim != 3 or key_padding_mask is not None or need_weights
    if is_other or (attn_mask is not None) != is_causal or drops(module, module.dropout) or not computes(query):
        return type(module).forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    if query is not key or not module._qkv_same_embed_dim:
        return project_out(module, heads_attention(*project_apart(module, query, key), is_causal)), None
    qkv, bias = project_qkv(query, module.in_proj_weight, module.in_proj_bias, fp8)
    return project_out(module, self_attention(qkv, module.num_heads, attn_mask, bias, is_causal), fp8), None


def self_attention(
    qkv: Tensor, heads: int, mask: object, bias: Tensor | None, is_causal: bool, scale: float | None = None
) -> Tensor:
    """Compute an adopted model's self-attention on a packed projection: [B, N, 3 H D] -> [B, N, H D].

    ``mask`` may be the packing of texts or images that are one sequence, [1, T, 3 H D]; any other mask is not read.
    """
    options: Any = {"causal": is_causal, "scale": scale, "bias": bias}
    if isinstance(mask, Packing):
        return attention(qkv[0], heads, cu_seqlens=mask, **options)[None]
    return attention(qkv, heads, **options)


def drops(module: nn.Module, probability: float) -> bool:
    """Return True if a module of an adopted model applies dropout of this probability in its current mode."""
    return module.training and probability > 0


def project_out(module: Any, out: Tensor, fp8: str | None = None) -> Tensor:
    """Apply the output projection of an ``nn.MultiheadAttention``, which itself reads this layer and never calls it."""
    return project(out, module.out_proj.weight, module.out_proj.bias, fp8)


def project_apart(module: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, H, M, D] and keys and values [B, H, N, D] of an adopted model's cross-attention.

    The weights of ``module`` have the names of ``nn.MultiheadAttention``: one tensor, or one each where widths differ.
    """
    width, heads = x.shape[-1], (module.num_heads, -1)
    if module.in_proj_weight is not None:
        weight_q, weight_kv = module.in_proj_weight.split([width, 2 * width])
    else:
        weight_q, weight_kv = module.q_proj_weight, torch.cat([module.k_proj_weight, module.v_proj_weight])
    bias_q, bias_kv = (None, None) if module.in_proj_bias is None else module.in_proj_bias.split([width, 2 * width])
    q = F.linear(x, weight_q, bias_q).unflatten(-1, heads).transpose(1, 2)
    k, v = F.linear(context, weight_kv, bias_kv).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return an adopted model's queries, keys and values [B, H, N, D] of a packed projection [B, N, 3 H D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def heads_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None = None) -> Tensor:
    """Compute an adopted model's attention of [B, H, M, D] on [B, H, N, D]: [B, M, H D]."""
    # Under autocast, norms of queries and keys may have float32 where the values have 16 bits.
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    return attention_qkv(q, k, v, causal=is_causal, scale=scale).flatten(2)


# Layer norms of several libraries' models


def propose_norm(norm: Any) -> Proposal:
    """Propose a replacement for a layer norm, one of ``NORMS``."""
    if norm.weight is None or norm.bias is None:
        return Proposal("norms", "it has no weight or no bias")
    if len(norm.normalized_shape) != 1:
        return Proposal("norms", "it normalises over more than one dimension")
    if norm.weight.shape[0] > MAX_WIDTH:
        return Proposal("norms", f"rows are {norm.weight.shape[0]} wide, and at most {MAX_WIDTH} can be computed")
    if getattr(norm, "_fast_norm", False):
        return Proposal("norms", "timm's fast norm is on, which computes in 16 bits")
    return Proposal("norms", "clipfast.layer_norm", NORMS[class_name(norm)])


def same_dtype_norm(module: Any, x: Tensor) -> Tensor:
    """Compute an adopted model's layer norm [..., N] -> [..., N] that returns its input's dtype, under autocast too."""
    if not computes(x):
        return type(module).forward(module, x)
    return layer_norm(x, module.weight, module.bias, module.eps)


def autocast_norm(module: Any, x: Tensor) -> Tensor:
    """Compute an adopted layer norm [..., N] -> [..., N] that returns float32 under autocast, as PyTorch's does."""
    if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.float()
    return same_dtype_norm(module, x)


NORMS = {
    "torch.nn.modules.normalization.LayerNorm": autocast_norm,
    "timm.layers.norm.LayerNorm": autocast_norm,
    "timm.layers.norm.LayerNormFp32": same_dtype_norm,
    "open_clip.transformer.LayerNorm": same_dtype_norm,
    "open_clip.transformer.LayerNormFp32": same_dtype_norm,
    "open_clip.layers.LayerNorm": same_dtype_norm,
    "open_clip.layers.LayerNormFp32": same_dtype_norm,
    "open_clip.audio.whisper.LayerNorm": same_dtype_norm,
}


def add_norm(x: Tensor, branch: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Return an adopted model's ``x + branch`` and ``norm(x + branch)``, [..., N] each, in one pass if a kernel can.

    Under autocast, the norm has the dtype of the branch, to which the next linear layer would round it anyway.
    """
    is_same = branch.dtype == x.dtype
    is_rounded = torch.is_autocast_enabled(x.device.type) and torch.promote_types(branch.dtype, x.dtype) == x.dtype
    takes = branch.shape == x.shape and computes(x) and not is_left(x) and (is_same or is_rounded)
    return residual_norm(x, branch, norm, fused=takes and runs_ours(norm) and not has_hooks(norm))


# Activations of several libraries' models


def propose_mlp(module: Any) -> Iterator[Proposal]:
    """Propose a replacement for the MLP of an OpenCLIP block, which is an ``nn.Sequential``."""
    is_stack = class_name(module) == "torch.nn.modules.container.Sequential"
    if is_stack and list(module._modules) in (_LAYERS, [*_LAYERS[:2], "ln", "c_proj"]):
        yield propose_gelu(module.c_fc, module.gelu, sequential_mlp)


def sequential_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute the ``mlp`` of an OpenCLIP block: [..., E] -> [..., E]."""
    x = linear_gelu(module.c_fc, module.gelu, x)
    for layer in list(module)[2:]:
        x = layer(x)
    return x


def propose_gelu(linear: Any, act: nn.Module, function: Any) -> Proposal:
    """Propose a replacement for an MLP in which the activation kernel adds the bias of the layer before it."""
    op = _gelu_of(act)
    if op is None:
        name = f"{type(act).__name__} by tanh" if _is_by_tanh(act) else type(act).__name__
        return Proposal("activations", f"{name} is neither GELU by the error function nor QuickGELU")
    if not isinstance(linear, nn.Linear) or linear.bias is None:
        return Proposal("activations", "the layer before the activation is not linear, or has no bias")
    return Proposal("activations", f"clipfast.{'bias_gelu' if op is bias_gelu else 'bias_quick_gelu'}", function)


def _is_by_tanh(act: nn.Module) -> bool:
    """Return True if an activation of an adopted model approximates GELU by tanh."""
    return getattr(act, "approximate", "none") != "none"


def _gelu_of(act: nn.Module) -> Any:
    """Return the op that computes an adopted model's activation ``act`` of x + bias, or None."""
    return None if _is_by_tanh(act) else GELUS.get(class_name(act))


def linear_gelu(linear: Any, act: nn.Module, x: Tensor) -> Tensor:
    """Return ``act(linear(x))`` for two layers of an adopted model, by one of our ops if that can."""
    op = _gelu_of(act)
    fp8 = options_of(linear).get("fp8") if type(linear) is nn.Linear and is_untouched(linear) else None
    is_known = op is not None and is_plain(act, type(act)) and (fp8 is not None or is_plain(linear, nn.Linear))
    if not is_known or linear.bias is None or not computes(x):
        return act(linear(x))
    return op(project(x, linear.weight, None, fp8), linear.bias)


# Embeddings of several libraries' models


NO_PROJECTION = "its convolution has a hook, or is not a projection of square patches without a bias"


def is_projection(conv: Any) -> bool:
    """Return True if an adopted model's ``conv`` only projects square patches, which our patch embedding op can do."""
    if not is_plain(conv, nn.Conv2d) or conv.bias is not None or conv.groups != 1 or conv.padding not in ((0, 0), 0):
        return False
    height, width = conv.kernel_size
    return height == width and conv.stride == (height, width) and conv.dilation == (1, 1)


def is_table(table: Any) -> bool:
    """Return True if an adopted model's ``table`` is a plain look-up, which our text embedding op can do."""
    return is_plain(table, nn.Embedding) and only_looks_up(table)


def only_looks_up(table: Any) -> bool:
    """Return True if an adopted model's ``nn.Embedding`` sets no option such as max_norm, and only looks up rows."""
    options = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
    values = [getattr(table, name, None) for name in options]
    # ``not any(values)`` would be wrong: a padding_idx of 0 is an option that is set.
    return all(value is None or value is False for value in values)
