"""The input of text towers: checks, the decision whether texts may be packed, and the embedding of tokens."""

from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import text_embed
from .layers import HOOKS, MLP, Attention, Kind, LayerNorm, QuickGELU, is_plain
from .packed_text import PackedText
from .transformer import ResidualAttentionBlock, Transformer, plain_parts


def check_text(text: Tensor | PackedText, context_length: int, *, may_be_packed: bool = True) -> None:
    """Refuse a text that is not a batch of token ids, or packed although the tower reads padding.

    Raises:
        TypeError, ValueError: as ``encode_text`` says.
    """
    if isinstance(text, PackedText):
        if not may_be_packed:
            raise TypeError("encode_text: this text tower reads padding, so that its texts cannot be packed")
        if text.max_seqlen > context_length:
            raise ValueError(
                f"encode_text: texts must have at most {context_length} tokens, these are packed from "
                f"{text.max_seqlen} columns"
            )
        return
    if not isinstance(text, Tensor):
        raise TypeError(f"encode_text: text must be a tensor of token ids [B, L], got a {type(text).__name__}")
    if text.ndim != 2 or text.shape[1] > context_length:
        raise ValueError(
            f"encode_text: text must be [B, L] with L at most {context_length}, got shape {tuple(text.shape)}"
        )


def refuse_foreign(transformer: nn.Module) -> None:
    """Refuse packed texts for a stack of blocks that cannot compute them.

    Raises:
        TypeError: the stack, or one of its blocks, is not CLIP's.
    """
    for block in transformer.resblocks if isinstance(transformer, Transformer) else [transformer]:
        if not isinstance(block, ResidualAttentionBlock):
            raise TypeError(
                f"encode_text: a {type(block).__name__} in the text tower computes no packed texts: give them padded"
            )


def takes_packed(transformer: nn.Module) -> bool:
    """Return whether a stack of blocks takes packed texts, and no hook or module of the user's would see them.

    FSDP2 may have wrapped the blocks. A linear layer may be a module of the user's, such as LoRA's: it gets the tokens
    as [1, T, width], and must compute each by itself. With the backend "torch", texts stay padded, because the PyTorch
    references would compute packed texts one by one.
    """
    if _has_any_global_hook() or not _is_own(transformer, Transformer) or _is_altered(transformer):
        return False
    blocks: Any = transformer.resblocks
    for block in blocks:
        is_known = is_plain(block, ResidualAttentionBlock) and plain_parts(block) is not None
        if not is_known and not _has_own_parts(block):
            return False
        if not block.attn.causal or block.attn.backend == "torch":
            return False
    return True


def _has_own_parts(block: nn.Module) -> bool:
    """Return whether all modules of a block but its linear layers are clipfast's, and none has a hook of the user's."""
    if not _is_own(block, ResidualAttentionBlock):
        return False
    norm_1, attn, norm_2, mlp = map(block._modules.get, block.PARTS)
    if not (_is_own(attn, Attention) and _is_own(mlp, MLP)):
        return False
    own = _is_own(norm_1, LayerNorm) and _is_own(norm_2, LayerNorm) and _is_own(mlp.gelu, nn.GELU, QuickGELU)
    return own and not any(map(_is_altered, block.modules()))


def _is_own(module: Any, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Return whether a module is of one of the classes ``kinds``, or of a subclass by which FSDP2 has wrapped it."""
    return type(module) in kinds or (isinstance(module, kinds) and wrapped_by_fsdp(module))


def wrapped_by_fsdp(module: nn.Module) -> bool:
    """Return whether FSDP2 has wrapped a module. FSDP2's class is recognised by its name, as its import takes long."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _is_altered(module: nn.Module) -> bool:
    """Return whether a user has replaced a module's ``forward``, or given it a hook; FSDP2's hooks do not count."""
    own = module.__dict__
    hooks = [hook for name in HOOKS for hook in own[name].values()]
    return "forward" in own or any(not str(hook.__module__).startswith("torch.distributed.") for hook in hooks)


def embed_text(table: nn.Module, positional_embedding: Tensor, text: Tensor | PackedText, backend: str) -> Tensor:
    """Return ``table(text)`` with the embedding of each position added: [B, L] ids -> [B, L, width].

    Packed texts become one sequence, [1, T, width].
    """
    packing, ids = (text.packing, text.ids) if isinstance(text, PackedText) else (None, text)
    if is_plain(table, nn.Embedding):
        options = (table.padding_idx, table.max_norm, table.scale_grad_by_freq, table.sparse)
        # then the embedding is a plain look-up, without padding_idx or scaling
        if options == (None, None, False, False):
            try:
                x = text_embed(ids, table.weight, positional_embedding, cu_seqlens=packing, backend=backend)
            except IndexError as error:
                if isinstance(text, PackedText):
                    _refuse_outside(text, len(table.weight), error)
                raise
            return x if packing is None else x[None]
    if isinstance(text, PackedText):
        return (table(ids) + positional_embedding[text.positions])[None]
    return table(ids) + positional_embedding[: ids.shape[1]]


def _refuse_outside(text: PackedText, vocab: int, error: IndexError) -> None:
    """Refuse an id of packed texts that is no row of the token embedding; name its text and position in the batch."""
    outside = (text.ids < 0) | (text.ids >= vocab)
    if outside.any():
        token = int(outside.nonzero()[0])
        place = int((text.order == text.packing.sequence[token]).nonzero()), int(text.positions[token])
        raise IndexError(
            f"text_embed: text must be ids of the {vocab} rows of token_embedding, got {text.ids[token]} at {place}"
        ) from error
