"""The input of text towers: checks, and the embedding of tokens with their positions."""

from torch import Tensor, nn

from ..kernels import text_embed
from .layers import is_plain
from .packed_text import PackedText


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


def embed_text(table: nn.Module, positional_embedding: Tensor, text: Tensor | PackedText, backend: str) -> Tensor:
    """Return ``table(text)`` with the embedding of each position added: [B, L] ids -> [B, L, width].

    Packed texts become one sequence, [1, T, width].
    """
    packing, ids = (text.packing, text.ids) if isinstance(text, PackedText) else (None, text)
    if is_plain(table, nn.Embedding):
        options = (table.padding_idx, table.max_norm, table.scale_grad_by_freq, table.sparse)
        if options == (None, None, False, False):  # a plain look-up, without padding_idx or scaling
            x = text_embed(ids, table.weight, positional_embedding, cu_seqlens=packing, backend=backend)
            return x if packing is None else x[None]
    if isinstance(text, PackedText):
        return (table(ids) + positional_embedding[text.positions])[None]
    return table(ids) + positional_embedding[: ids.shape[1]]
