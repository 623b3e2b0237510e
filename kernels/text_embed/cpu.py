"""The text embedding on a CPU: the same functions as in ``launches``, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, L, N] in ``dtype``, and the ids in 32 bits.

    Raises:
        IndexError: an id that is no row of the table.
    """
    vocab = len(token_embedding)
    outside = (text < 0) | (text >= vocab)
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"text_embed: text must be ids of the {vocab} rows of token_embedding, got {int(text[first])} at {first}"
        )
    # An op must not return one of its arguments, so int32 ids are copied too.
    ids = text.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    rows = F.embedding(text, token_embedding).to(accumulate_dtype(token_embedding.dtype))
    return rows.add_(positional_embedding[: text.shape[1]]).to(dtype), ids


def backward_token(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table of token embeddings, [V, N] in ``dtype``."""
    # The order of the sums is fixed: each row of the table belongs to one thread, which adds in the order of tokens.
    wide = grad.to(accumulate_dtype(grad.dtype))
    return torch.ops.aten.embedding_dense_backward(wide, ids, vocab, -1, False).to(dtype)
