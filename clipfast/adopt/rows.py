"""The towers of OpenCLIP, whose last block computes only the row that is read."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import single_query_attention
from ..models.transformer import take_rows
from .attention import project_out
from .attention_parts import drops
from .blocks import RESIDUAL, is_causal, why_not_causal
from .embeddings import is_table, text_embeds, text_tokens
from .norms import add_norm
from .places import ON_GPUS, Proposal, class_name, computes, has_hooks, is_untouched, on_cpus, runs_ours

KIND = "pooled_last_block"
_ROW = "one row, by clipfast.attention_pool"
_POOLS = ("first", "last", "argmax", "eos")
_LIBRARY = ("open_clip.transformer.", "open_clip.layers.")
_PLAIN = {
    *(library + name for library in _LIBRARY for name in ("LayerNorm", "LayerNormFp32", "QuickGELU", "LayerScale")),
    *(f"torch.nn.modules.activation.{name}" for name in ("MultiheadAttention", "GELU")),
    *(f"torch.nn.modules.linear.{name}" for name in ("Linear", "Identity", "NonDynamicallyQuantizableLinear")),
    "open_clip.transformer.ResidualAttentionBlock", "open_clip.transformer.Attention",
    "torch.nn.modules.container.Sequential", "torch.nn.modules.dropout.Dropout",
}  # fmt: skip


def propose_image_tower(module: Any) -> Proposal | None:
    """Say what to do with the last block of an image tower; None if ``module`` is none."""
    name = class_name(module)
    if name == "open_clip.timm_model.TimmModel":
        return Proposal(KIND, "a tower of timm computes every row of its last block")
    if name != "open_clip.transformer.VisionTransformer" or not hasattr(module, "_pool"):  # OpenCLIP < 3 has no such
        return None
    if module.attn_pool is not None or module.pool_type != "tok" or module.output_tokens:
        return Proposal(KIND, "every row of the last block is read")
    refusal = _why_not_row(module.transformer, len(module.positional_embedding))
    return Proposal(KIND, refusal) if refusal else Proposal(KIND, _ROW, image_tower)


def propose_text_tower(module: nn.Module) -> Iterator[Proposal]:
    """Yield what to do with the embedding of texts and with the last block; nothing if ``module`` is no text tower."""
    tower: Any = module
    name = class_name(module)
    if name == "open_clip.model.CLIP":
        # 3.3.0 has the one, later versions have both
        method = "_encode_text" if hasattr(type(module), "_encode_text") else "encode_text"
        refusal = _why_not_embed(tower)
        yield _proposal("text_embed", refusal, f"clipfast.text_embed{ON_GPUS}", encode_text, method, "embeds")
        refusal = _why_not_read(tower, tower.text_pool_type)
        yield _proposal(KIND, refusal, _ROW, encode_text, method, "pools")
    elif name == "open_clip.transformer.TextTransformer" and hasattr(module, "_embeds"):
        yield _proposal("text_embed", _why_not_embed(tower), f"clipfast.text_embed{ON_GPUS}", text_embeds, "_embeds")
        yield _proposal(KIND, _why_not_read(tower, tower.pool_type), _ROW, text_tower, "forward")
    elif name == "open_clip.transformer.ModernTextTransformer":
        yield Proposal("text_embed", "it adds no positions to texts")
        yield Proposal(KIND, "its last block has parts that CLIP's has not, such as an adapter")


def _proposal(
    kind: str, refusal: str, text: str, function: Callable[..., Any], method: str, option: str | None = None
) -> Proposal:
    return Proposal(kind, refusal) if refusal else Proposal(kind, text, function, method, option=option)


def _why_not_embed(tower: Any) -> str:
    """Return why our op cannot embed texts for ``tower``, or "" if it can."""
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return "a class token follows the text, or padding is hidden"
    return "" if is_table(tower.token_embedding) else "its table has a hook, or does more than look up"


def _why_not_read(tower: Any, pool_type: str) -> str:
    """Return why the last block of a text tower cannot compute one row alone, or "" if it can."""
    if pool_type not in _POOLS or getattr(tower, "output_tokens", False):
        return "every row of the last block is read"
    return why_not_causal(tower) or _why_not_row(tower.transformer, len(tower.positional_embedding))


def _why_not_row(stack: Any, num_tokens: int) -> str:
    """Return why the last block of ``stack`` cannot compute one row alone, or "" if it can."""
    if class_name(stack) != "open_clip.transformer.Transformer" or not is_untouched(stack):
        return "its stack of blocks is not OpenCLIP's own, or has a hook"
    if not len(stack.resblocks) or not getattr(stack, "batch_first", True):
        return "it has no blocks, or batch_first=False"
    last = stack.resblocks[-1]
    if class_name(last) != RESIDUAL or not all(class_name(part) in _PLAIN for part in last.modules()):
        return "its last block has parts that CLIP's has not, such as an adapter"
    if not all(is_untouched(part) for part in last.modules()):
        return "its last block has a hook, or something else has replaced a part of it"
    if not runs_ours(last.attn) or not _is_plain_attention(last.attn):
        return "its attention is not ours, or not plain"
    if num_tokens > MAX_TOKENS or last.attn.num_heads > MAX_HEADS:
        return f"more than {MAX_TOKENS} tokens or {MAX_HEADS} heads"
    return ""


def _is_plain_attention(attn: Any) -> bool:
    """Return True if ``attn`` projects its input, and does nothing else to it."""
    if isinstance(attn, nn.MultiheadAttention):
        return attn._qkv_same_embed_dim and not drops(attn, attn.dropout)
    parts = (attn.ln_q, attn.ln_k, attn.ln_inner)
    is_softmax = attn.in_proj_weight is not None and attn.logit_scale is None and attn.head_scale is None
    is_projection = is_softmax and all(type(part) is nn.Identity for part in parts)
    return is_projection and not drops(attn, attn.attn_drop.p) and not drops(attn, attn.out_drop.p)


@on_cpus
def image_tower(tower: Any, x: Tensor) -> Tensor:
    """Compute an OpenCLIP image tower that reads its class token: [B, 3, H, W] -> [B, output_dim]."""
    is_read = tower.attn_pool is None and tower.pool_type == "tok" and not tower.output_tokens
    if not is_read or has_hooks(tower.ln_post) or not computes(x):
        return type(tower).forward(tower, x)
    x = tower._embeds(x)
    if _why_not_row(tower.transformer, x.shape[1]):
        pooled = tower._pool(tower.transformer(x))[0]
    else:
        pooled = tower.ln_post(_read_row(tower.transformer, x, None, None, False))
    return pooled if tower.proj is None else pooled @ tower.proj


@on_cpus
def text_tower(tower: Any, text: Tensor, attention_mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Compute an OpenCLIP ``TextTransformer``: [B, L] -> [B, output_dim]. Versions from 4 on take a mask of padding."""
    if attention_mask is not None:
        return type(tower).forward(tower, text, attention_mask)
    if tower.output_tokens or tower.cls_emb is not None or has_hooks(tower.ln_final):
        return type(tower).forward(tower, text)
    x, mask = tower._embeds(text)
    return _project(tower, _pooled(tower, x, text, mask, tower.pool_type, getattr(tower, "eos_id", None), True))


@on_cpus
def encode_text(
    model: Any, text: Tensor, normalize: bool = False, *, embeds: bool = False, pools: bool = False
) -> Tensor:
    """Compute ``open_clip.CLIP.encode_text``: [B, L] -> [B, embed_dim].

    Args:
        model: the model.
        text: token ids.
        normalize: divide each feature vector by its length.
        embeds: embed by our op.
        pools: the last block computes one row only.
    """
    x = text_tokens(model, text) if embeds else None
    if x is None:
        dtype = model.transformer.get_cast_dtype()
        x = model.token_embedding(text).to(dtype) + model.positional_embedding.to(dtype)
    eos = getattr(model, "text_eos_id", None)
    x = _project(model, _pooled(model, x, text, model.attn_mask, model.text_pool_type, eos, pools))
    return F.normalize(x, dim=-1) if normalize else x


def _pooled(
    tower: Any, x: Tensor, text: Tensor, mask: Tensor | None, pool_type: str, eos: int | None, pools: bool
) -> Tensor:
    """Return the normalised row that is read of each text: [B, L, width] -> [B, width]; all rows if all are read."""
    causal = is_causal(mask, tower)
    can_pool = pools and pool_type in _POOLS and (causal or mask is None) and not has_hooks(tower.ln_final)
    if can_pool and computes(x) and not _why_not_row(tower.transformer, x.shape[1]):
        return tower.ln_final(_read_row(tower.transformer, x, _rows(text, pool_type, eos), mask, causal))
    x = tower.ln_final(tower.transformer(x, attn_mask=mask))
    return take_rows(x, _rows(text, pool_type, eos)) if pool_type in _POOLS else x


def _rows(text: Tensor, pool_type: str, eos: Any) -> Tensor | None:
    """Return the index [B] of the row that is read of each text; None stands for the first."""
    if pool_type == "first":
        return None
    if pool_type == "argmax":
        return text.argmax(-1)
    if pool_type == "eos":
        return (text == eos).int().argmax(-1)
    return text.new_full(text.shape[:1], text.shape[1] - 1, dtype=torch.int64)


def _project(tower: Any, x: Tensor) -> Tensor:
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _read_row(stack: Any, x: Tensor, rows: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
    """Compute row ``rows[b]`` of each sequence b after all blocks: [B, N, width] -> [B, width]."""
    *blocks, last = stack.resblocks
    for block in blocks:
        if stack.grad_checkpointing:
            x = checkpoint(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
    if stack.grad_checkpointing:
        return checkpoint(_last_row, last, x, rows, causal, use_reentrant=False)
    return _last_row(last, x, rows, causal)


def _last_row(block: Any, x: Tensor, rows: Tensor | None, causal: bool) -> Tensor:
    """Compute one row of what ``block`` returns for each sequence: [B, N, width] -> [B, width]."""
    branch = block.ls_1(_attend_row(block.attn, block.ln_1(x), rows, causal))
    x, normed = add_norm(take_rows(x, rows), branch, block.ln_2)
    return x + block.ls_2(block.mlp(normed))


def _attend_row(attn: Any, x: Tensor, rows: Tensor | None, causal: bool) -> Tensor:
    """Compute one row of what ``attn`` returns for each sequence: [B, N, width] -> [B, width]."""
    weight_q, weight_k, weight_v = attn.in_proj_weight.unflatten(0, (3, attn.num_heads, -1)).unbind()
    bias_q = bias_k = bias_v = None
    if attn.in_proj_bias is not None:
        bias_q, bias_k, bias_v = attn.in_proj_bias.unflatten(0, (3, -1)).unbind()
    q = F.linear(take_rows(x, rows), weight_q.flatten(0, 1), bias_q).unflatten(1, (attn.num_heads, -1))
    seqlens = None
    if causal:
        seqlens = torch.ones(len(x), dtype=torch.int32, device=x.device) if rows is None else rows + 1
    return project_out(attn, single_query_attention(q, x, weight_k, weight_v, seqlens, "auto", bias_k, bias_v))
