"""The text embedding on a CPU: the same functions as in ``launches``, in PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype

# This calls PyTorch's op without its Python wrapper, which would take the host longer.
_embedding_backward: Any = torch.ops.aten.embedding_dense_backward.default._op


def forward(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the tokens [B, L, N] in ``dtype``, and the ids in 32 bits.

    Raises:
        IndexError: an id that is no row of the table.
    """
    wide, length = accumulate_dtype(token_embedding.dtype), text.shape[1]
    is_converted = text.dtype != torch.int32 and text.is_contiguous()
    is_short, is_empty = length < len(positional_embedding), token_embedding.numel() == 0

    def compute(
        text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, _: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Embed texts on the CPU: add the rows of token ids and of positions."""
        if is_empty:
            _refuse_outside(text, len(token_embedding))  # PyTorch does not look at the ids of an empty table
        try:
            rows = torch.embedding(token_embedding, text)
        except IndexError:
            _refuse_outside(text, len(token_embedding))
            raise
        if rows.dtype is not wide:
            rows = rows.to(wide)
        rows.add_(positional_embedding[:length] if is_short else positional_embedding)
        if is_converted:
            ids = text.to(torch.int32)
        else:  # an op must not return one of its arguments
            ids = text.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
        return rows if wide is dtype else rows.to(dtype), ids

    return compute


def forward_packed(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, bounds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the tokens [T, N] of packed texts in ``dtype``, and their ids and positions as int32 [2, T].

    Id and position are -1 for a token that belongs to no text.

    Raises:
        IndexError: an id that is no row of the table, or a position that is no row of ``positional_embedding``.
    """
    total, starts = text.shape[0], bounds[0]
    positions = torch.arange(total, dtype=torch.int32) - starts
    # The first token of no text is said to be ``total``, and the starts are in ascending order.
    all_have_text = total > 0 and starts[-1].item() < total
    places = positions if all_have_text else positions.clamp(min=0)
    sizes = token_embedding.shape[0], positional_embedding.shape[0]
    if token_embedding.numel() == 0 or sizes[1] == 0:  # PyTorch does not look at the ids of an empty table
        _refuse_wrong(text, positions, *sizes)
    try:
        rows = torch.embedding(token_embedding, text).to(accumulate_dtype(token_embedding.dtype))
        rows.add_(torch.embedding(positional_embedding, places))
    except IndexError:
        _refuse_wrong(text, positions, *sizes)
        raise
    ids = torch.stack([text.to(torch.int32), positions])
    if not all_have_text:
        has_text = positions >= 0
        ids.masked_fill_(~has_text, -1)
        rows.mul_(has_text[:, None])
    return rows.to(dtype), ids


def _refuse_wrong(text: Tensor, positions: Tensor, vocab: int, most: int) -> None:
    """Refuse packed texts with an id that is no row of its table, or with more than ``most`` tokens in a text."""
    _refuse_outside(text, vocab)
    longest = int(positions.max()) + 1 if positions.shape[0] else 0
    if longest > most:
        raise IndexError(f"text_embed: a text has {longest} tokens, more than {most} positions")


def _refuse_outside(text: Tensor, vocab: int) -> None:
    """Refuse an id that is no row of the table, with an IndexError."""
    outside = (text < 0) | (text >= vocab)
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"text_embed: text must be ids of the {vocab} rows of token_embedding, got {int(text[first])} at {first}"
        )


def backward_token(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the function that computes the gradient of the table of token embeddings, [V, N] in ``dtype``."""
    wide = accumulate_dtype(grad.dtype)

    def compute(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """Compute the gradient of the table of tokens' embeddings on the CPU."""
        # The order of the sums is fixed: one thread sums all gradients of a row of the table, in the order of tokens.
        out: Tensor = _embedding_backward(grad if grad.dtype is wide else grad.to(wide), ids, vocab, -1, False)
        return out if wide is dtype else out.to(dtype)

    return compute
