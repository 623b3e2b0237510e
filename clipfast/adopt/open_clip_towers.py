"""Replacements in towers of OpenCLIP: embeddings in one kernel, and a last block that computes one row only."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import patch_embed, text_embed
from ..kernels.packing import Packing
from ..models.layers import attend_row, has_hooks, is_plain, take_rows
from ..models.packed_text import PackedText, has_values, pack_if_shorter
from ..models.texts import check_text
from . import packable
from .last_row import KIND, ROW, last_row, why_not_row
from .open_clip import hides_padding, is_causal, why_not_causal
from .parts import NO_PROJECTION, drops, is_projection, is_table, project_out
from .places import ON_GPUS, Proposal, class_name, computes, is_left, is_untouched, on_cpus, propose_unless, runs_ours

_EMBEDS = f"clipfast.text_embed{ON_GPUS}"
_POOLS = ("first", "last", "argmax", "eos")
_LIBRARY = ("open_clip.transformer.", "open_clip.layers.")
_STACK = "open_clip.transformer.Transformer"
_PLAIN = {
    *(library + name for library in _LIBRARY for name in ("LayerNorm", "LayerNormFp32", "QuickGELU", "LayerScale")),
    *(f"torch.nn.modules.activation.{name}" for name in ("MultiheadAttention", "GELU")),
    *(f"torch.nn.modules.linear.{name}" for name in ("Linear", "Identity", "NonDynamicallyQuantizableLinear")),
    *(f"torch.nn.modules.container.{name}" for name in ("Sequential", "ModuleList")),
    "open_clip.transformer.ResidualAttentionBlock", "open_clip.transformer.Attention",
    "torch.nn.modules.dropout.Dropout", _STACK,
}  # fmt: skip


def propose_tower(module: nn.Module) -> Iterator[Proposal]:
    """Propose replacements for the embedding and the last block of a tower of OpenCLIP."""
    tower: Any = module
    name = class_name(module)
    if name == "open_clip.transformer.VisionTransformer" and hasattr(module, "_embeds"):  # OpenCLIP < 3 lacks _embeds
        yield from _propose_image_tower(tower)
    elif name == "open_clip.modified_resnet.ModifiedResNet":
        yield Proposal("patch_embed", "a ResNet has convolutions in place of patches")
    elif name == "open_clip.timm_model.TimmModel":
        yield Proposal(KIND, "a tower of timm computes every row of its last block")
    elif name == "open_clip.model.CLIP":
        # OpenCLIP 3.3.0 has only encode_text; later versions have both encode_text and _encode_text.
        method = "_encode_text" if hasattr(type(module), "_encode_text") else "encode_text"
        yield propose_unless(_why_not_embed(tower), "text_embed", _EMBEDS, encode_text, method, "embeds")
        yield from _propose_rows_of_texts(tower, tower.text_pool_type, encode_text, method)
    elif name == "open_clip.transformer.TextTransformer" and hasattr(module, "_embeds"):
        yield propose_unless(_why_not_embed(tower), "text_embed", _EMBEDS, text_embeds, "_embeds")
        yield from _propose_rows_of_texts(tower, tower.pool_type, text_tower, "forward")
    elif name == "open_clip.transformer.ModernTextTransformer":
        yield Proposal("text_embed", "it adds no positions to texts")
        yield Proposal(KIND, "its last block has parts that CLIP's has not, such as an adapter")
        yield Proposal(packable.KIND, "it is not CLIP's text tower")
    elif name == "open_clip.hf_model.HFTextEncoder":
        yield Proposal(packable.KIND, "it is not CLIP's text tower")


def _propose_image_tower(tower: Any) -> Iterator[Proposal]:
    """Propose replacements for the embedding and the last block of an image tower of OpenCLIP."""
    refusal = "" if is_projection(tower.conv1) else NO_PROJECTION
    yield propose_unless(refusal, "patch_embed", "clipfast.patch_embed", image_tokens, "_embeds")
    if tower.attn_pool is not None or tower.pool_type != "tok" or tower.output_tokens:
        refusal = "every row of the last block is read"
    else:
        refusal = _why_not_row(tower.transformer, len(tower.positional_embedding))
    yield propose_unless(refusal, KIND, ROW, image_tower)


def _propose_rows_of_texts(tower: Any, pool_type: str, function: Any, method: str) -> Iterator[Proposal]:
    """Propose that a text tower of OpenCLIP computes one row in its last block, and packed texts."""
    yield propose_unless(_why_not_read(tower, pool_type), KIND, ROW, function, method, "pools")
    refusal = _why_not_packed(tower, pool_type, why_not_causal(tower))
    yield propose_unless(refusal, packable.KIND, packable.PACKS, function, method, "packs")


def _why_not_embed(tower: Any) -> str:
    """Return the reason why our op cannot embed texts for an OpenCLIP tower, or "" if it can."""
    if hides_padding(tower):
        return "a class token follows the text, or padding is hidden"
    return "" if is_table(tower.token_embedding) else "its table has a hook, or does more than look up"


def _why_not_read(tower: Any, pool_type: str) -> str:
    """Return the reason why the last block of an OpenCLIP text tower cannot compute a single row, or "" if it can."""
    if pool_type not in _POOLS or getattr(tower, "output_tokens", False):
        return "every row of the last block is read"
    return why_not_causal(tower) or _why_not_row(tower.transformer, len(tower.positional_embedding))


def _why_not_packed(tower: Any, pool_type: str, refusal: str | None) -> str:
    """Return the reason why an OpenCLIP text tower cannot compute packed texts, or "" if it can.

    ``refusal`` says why its mask is not causal, as :func:`why_not_causal` does.
    """
    if refusal is None:
        return "every token sees the padding"
    if refusal or pool_type not in ("argmax", "eos") or getattr(tower, "output_tokens", False):
        return refusal or "it does not read the end-of-text token, or not only this one"
    refusal = _why_not_embed(tower)
    if refusal:
        return refusal
    if has_hooks(tower.ln_final) or not ("_embeds" not in tower.__dict__ or runs_ours(tower, "_embeds")):
        return "its norm has a hook, or something else has replaced its embedding"
    stack = tower.transformer
    if class_name(stack) != _STACK or not len(stack.resblocks) or not getattr(stack, "batch_first", True):
        return "its stack of blocks is not OpenCLIP's own, has no blocks, or has batch_first=False"
    refusal = packable.why_not_packed(stack, lambda part: class_name(part) in _PLAIN)
    if not refusal and not all(map(_takes_packed, stack.resblocks)):
        return "its attention is not ours, or not plain"
    return refusal


def _takes_packed(block: Any) -> bool:
    """Return True if an OpenCLIP block runs our code, which takes the packing of several texts in place of a mask."""
    return runs_ours(block) and runs_ours(block.attn) and _is_plain_attention(block.attn)


def _why_not_row(stack: Any, num_tokens: int) -> str:
    """Return the reason why the last block of a stack of OpenCLIP cannot compute a single row, or "" if it can."""
    if class_name(stack) != _STACK or not is_untouched(stack):
        return "its stack of blocks is not OpenCLIP's own, or has a hook"
    if not len(stack.resblocks) or not getattr(stack, "batch_first", True):
        return "it has no blocks, or batch_first=False"
    last = stack.resblocks[-1]
    heads = getattr(getattr(last, "attn", None), "num_heads", 0)
    refusal = why_not_row(last, num_tokens, heads, lambda part: class_name(part) in _PLAIN)
    if not refusal and not (runs_ours(last.attn) and _is_plain_attention(last.attn)):
        return "its attention is not ours, or not plain"
    return refusal


def _is_plain_attention(attn: Any) -> bool:
    """Return True if attention of OpenCLIP does nothing to its input before the projections."""
    if isinstance(attn, nn.MultiheadAttention):
        return attn._qkv_same_embed_dim and not drops(attn, attn.dropout)
    parts = (attn.ln_q, attn.ln_k, attn.ln_inner)
    is_softmax = attn.in_proj_weight is not None and attn.logit_scale is None and attn.head_scale is None
    is_projection = is_softmax and all(type(part) is nn.Identity for part in parts)
    return is_projection and not drops(attn, attn.attn_drop.p) and not drops(attn, attn.out_drop.p)


@on_cpus
def image_tokens(tower: Any, images: Tensor) -> Tensor:
    """Compute the tokens that enter the blocks of an OpenCLIP image tower: [B, 3, H, W] -> [B, 1 + patches, width].

    Images may be uint8 as decoded, where the tower knows its mean and standard deviation (``image_mean`` and
    ``image_std``, which OpenCLIP's factory sets). Patches that are dropped are not read.
    """
    grid = _grid(tower, images)
    if grid is None:
        return type(tower)._embeds(tower, images)
    options = {"mean": tower.image_mean, "std": tower.image_std} if images.dtype == torch.uint8 else {}
    keep = _kept_patches(tower.patch_dropout, len(images), grid[0] * grid[1])
    keep = None if keep is None else keep.to(images.device)
    tokens = patch_embed(
        images, tower.conv1.weight, tower.class_embedding, tower.positional_embedding, keep=keep, **options
    )
    return tower.ln_pre(tokens if keep is not None else tower.patch_dropout(tokens))


def _grid(tower: Any, images: Tensor) -> tuple[int, int] | None:
    """Return the rows and columns of patches of ``images``; None if our op cannot embed them for OpenCLIP's tower."""
    if images.ndim != 4 or not is_projection(tower.conv1) or not computes(images):
        return None
    is_bytes = images.dtype == torch.uint8 and hasattr(tower, "image_mean") and hasattr(tower, "image_std")
    size = tower.conv1.kernel_size[0]
    height, width = images.shape[2:]
    grid = (height // size, width // size)
    is_whole = height % size == 0 and width % size == 0 and images.shape[1] == tower.conv1.in_channels
    is_taken = is_whole and (is_bytes or images.is_floating_point())
    return grid if is_taken and 1 + grid[0] * grid[1] == len(tower.positional_embedding) else None


def _kept_patches(dropout: Any, batch: int, num_patches: int) -> Tensor | None:
    """Draw the patches [B, K] that OpenCLIP's patch dropout keeps, from the same random numbers; None without dropout.

    None is also returned for a dropout module of another class, which the caller must call.
    """
    is_known = class_name(dropout) == "open_clip.transformer.PatchDropout" and is_plain(dropout, type(dropout))
    if not is_known or not dropout.training or dropout.prob == 0 or not dropout.exclude_first_token:
        return None
    kept = max(1, int(num_patches * (1 - dropout.prob)))
    return torch.randn(batch, num_patches).topk(kept, dim=-1).indices


def text_tokens(tower: Any, text: Tensor | PackedText) -> Tensor | None:
    """Compute tokens plus positions of an OpenCLIP text tower: [B, L] -> [B, L, width]; None if our op does not.

    Packed texts become one sequence, [1, T, width].
    """
    table, positions = tower.token_embedding, tower.positional_embedding
    dtype = tower.transformer.get_cast_dtype()
    is_same = is_table(table) and table.weight.dtype == positions.dtype == dtype
    packing, ids = (text.packing, text.ids) if isinstance(text, PackedText) else (None, text)
    is_text = packing is not None or (ids.ndim == 2 and ids.shape[1] <= len(positions))
    is_text = is_text and ids.dtype in (torch.int32, torch.int64)
    if not is_same or not is_text or not computes(table.weight) or is_left(table.weight):
        return None
    # Under autocast, the embeddings keep the dtype of the table, as in OpenCLIP.
    with torch.autocast(ids.device.type, enabled=False):
        tokens = text_embed(ids, table.weight, positions, cu_seqlens=packing)
    return tokens if packing is None else tokens[None]


def _embedded(tower: Any, text: Tensor | PackedText, by_op: bool) -> Tensor:
    """Compute tokens plus positions of an OpenCLIP text tower, as :func:`text_tokens`, by our op or the library's."""
    x = text_tokens(tower, text) if by_op else None
    if x is not None:
        return x
    dtype = tower.transformer.get_cast_dtype()
    positions = tower.positional_embedding.to(dtype)
    if isinstance(text, PackedText):
        return (tower.token_embedding(text.ids).to(dtype) + F.embedding(text.positions, positions))[None]
    return tower.token_embedding(text).to(dtype) + positions


@on_cpus
def text_embeds(tower: Any, text: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute OpenCLIP's ``TextTransformer._embeds``: the tokens [B, L, width], and the mask of L tokens."""
    if attention_mask is not None:
        return type(tower)._embeds(tower, text, attention_mask)
    tokens = text_tokens(tower, text)
    if tokens is None:
        return type(tower)._embeds(tower, text)
    mask, length = tower.attn_mask, tokens.shape[1]
    return tokens, mask if mask is None or len(mask) == length else mask[:length, :length]


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
def text_tower(
    tower: Any, text: Tensor | PackedText, attention_mask: Tensor | None = None, *, pools: bool = False,
    packs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute an OpenCLIP ``TextTransformer``: [B, L] -> [B, output_dim]. Versions from 4 on take a mask of padding.

    The options are those of :func:`encode_text`.
    """
    if attention_mask is not None:
        return type(tower).forward(tower, text, attention_mask)
    if tower.output_tokens or tower.cls_emb is not None or has_hooks(tower.ln_final):
        return type(tower).forward(tower, text)
    pool_type, eos = tower.pool_type, getattr(tower, "eos_id", None)
    text = _packed(tower, text, pool_type, eos, packs)
    if isinstance(text, PackedText):
        x, mask = _embedded(tower, text, runs_ours(tower, "_embeds")), text.packing
    else:
        x, mask = tower._embeds(text)
    return _text_features(tower, x, text, mask, pool_type, eos, pools)


@on_cpus
def encode_text(
    model: Any, text: Tensor | PackedText, normalize: bool = False, *, embeds: bool = False, pools: bool = False,
    packs: bool = False,
) -> Tensor:  # fmt: skip
    """Compute ``open_clip.CLIP.encode_text``: [B, L] -> [B, embed_dim].

    Args:
        model: the model.
        text: token ids, or packed texts.
        normalize: divide each feature vector by its length.
        embeds: embed by our op.
        pools: the last block computes one row only.
        packs: texts are packed where the tower takes them.
    """
    pool_type, eos = model.text_pool_type, getattr(model, "text_eos_id", None)
    text = _packed(model, text, pool_type, eos, packs)
    mask = text.packing if isinstance(text, PackedText) else model.attn_mask
    x = _text_features(model, _embedded(model, text, embeds), text, mask, pool_type, eos, pools)
    return F.normalize(x, dim=-1) if normalize else x


def _packed(tower: Any, text: Tensor | PackedText, pool_type: str, eos: int | None, packs: bool) -> Tensor | PackedText:
    """Return texts packed, if ``packs``, if OpenCLIP's text tower takes them, and if enough of them is padding.

    Raises:
        TypeError: the texts are packed already, and the tower cannot compute them.
        ValueError: texts were packed from more columns than there are positions, or up to another token than the tower
            reads.
    """
    positions = tower.positional_embedding
    if isinstance(text, PackedText):
        refusal = _why_not_packed(tower, pool_type, "" if is_causal(tower.attn_mask, tower) else "it is not causal")
        if refusal or not computes(positions):
            raise TypeError(f"this text tower of OpenCLIP cannot compute packed texts: {refusal or 'by its dtype'}")
        check_text(text, len(positions))
        is_known = pool_type == "eos" and eos is not None and text.device.type == "cpu"
        if is_known and not text.ids[text.last].eq(eos or 0).all():
            raise ValueError(
                f"this text tower of OpenCLIP reads the token {eos}, and texts were packed up to another one: give "
                "pack_texts the places of these tokens as last"
            )
        return text
    is_batch = packs and isinstance(text, Tensor) and text.ndim == 2 and text.shape[1] == len(positions)
    if not is_batch or not has_values(text) or not computes(positions) or not is_causal(tower.attn_mask, tower):
        return text
    return text if _why_not_packed(tower, pool_type, "") else pack_if_shorter(text, _rows(text, pool_type, eos))


def _text_features(
    tower: Any, x: Tensor, text: Tensor | PackedText, mask: Tensor | Packing | None, pool_type: str, eos: int | None,
    pools: bool,
) -> Tensor:  # fmt: skip
    """Return OpenCLIP's projection of the row that is read of each text: -> [B, output_dim]; or of all rows.

    Packed texts have a packing in the place of the mask.
    """
    causal = is_causal(mask, tower)
    packed = text if isinstance(text, PackedText) else None
    rows = _rows(text, pool_type, eos) if packed is None else packed
    can_pool = pools and pool_type in _POOLS and (causal or mask is None) and not has_hooks(tower.ln_final)
    num_tokens = x.shape[1] if packed is None else packed.max_seqlen
    if can_pool and computes(x) and not _why_not_row(tower.transformer, num_tokens):
        x = tower.ln_final(_read_row(tower.transformer, x, rows, mask, causal))
    else:
        x = tower.ln_final(tower.transformer(x, attn_mask=mask))
        x = take_rows(x, rows) if pool_type in _POOLS else x
    if packed is not None:
        x = x[packed.order]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def _rows(text: Any, pool_type: str, eos: Any) -> Tensor | None:
    """Return the index [B] of the row that an OpenCLIP text tower uses of each text; None means the first row."""
    if pool_type == "first":
        return None
    if pool_type == "argmax":
        return text.argmax(-1)
    if pool_type == "eos":
        return (text == eos).int().argmax(-1)
    return text.new_full(text.shape[:1], text.shape[1] - 1, dtype=torch.int64)


def _read_row(
    stack: Any, x: Tensor, rows: Tensor | PackedText | None, mask: Tensor | Packing | None, causal: bool
) -> Tensor:
    """Compute row ``rows[b]`` of each sequence b after all blocks of an OpenCLIP tower: [B, N, width] -> [B, width].

    Of packed texts, [1, T, width], it is the last row of each, in their packed order.
    """
    *blocks, last = stack.resblocks
    for block in blocks:
        if stack.grad_checkpointing:
            x = checkpoint(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
    if stack.grad_checkpointing:
        return checkpoint(_last_row, last, x, rows, causal, use_reentrant=False)
    return _last_row(last, x, rows, causal)


def _last_row(block: Any, x: Tensor, rows: Tensor | PackedText | None, causal: bool) -> Tensor:
    """Compute one row of the output of an OpenCLIP ``block`` for each sequence: [B, N, width] -> [B, width]."""
    attn = block.attn
    biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    out = attend_row(block.ln_1(x), rows, attn.num_heads, attn.in_proj_weight.chunk(3), biases, causal=causal)
    branch = block.ls_1(project_out(attn, out))
    return last_row(x, rows, branch, block.ln_2, lambda normed: block.ls_2(block.mlp(normed)))
