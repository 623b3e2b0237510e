"""The text embedding on a CPU: the same functions as in ``launches``, by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tokens [B, L, N] in ``dtype``.

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
    rows = F.embedding(text, token_embedding).to(accumulate_dtype(token_embedding.dtype))
    return rows.add_(positional_embedding[: text.shape[1]]).to(dtype)


def backward_token(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table, [V, N] in ``dtype``."""
    # The order of the sums is fixed: each row of the table belongs to one thread, which adds in the order of tokens.
    wide = grad.to(accumulate_dtype(grad.dtype))
    return torch.ops.aten.embedding_dense_backward(wide, text, vocab, -1, False).to(dtype)
