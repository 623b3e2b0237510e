"""Attention pooling on a CPU, in plain PyTorch, with the arguments and results of the launches.

The log-sum-exp is to the base e here (the kernels take base 2). Products are in float32 or wider, as in the kernels.
"""

import torch
from torch import Tensor

from ..dtypes import accumulate_dtype


def forward(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the pooled tokens [B, H, C] and the log-sum-exp [B, H] of the scores."""
    q, x = _wide(query, tokens)
    x, hidden = _without_hidden(x, seqlens)
    scores = q @ x.transpose(1, 2)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    return ((scores - lse).exp() @ x).to(query.dtype), lse.squeeze(-1)


def backward(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries [B, H, C] and of the tokens [B, N, C]."""
    do, q, x = _wide(grad_out, query, tokens)
    x, hidden = _without_hidden(x, seqlens)
    p = (q @ x.transpose(1, 2) - lse[..., None]).exp_()
    if hidden is not None:
        p.masked_fill_(hidden, 0)
    dp = do @ x.transpose(1, 2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dx = p.transpose(1, 2) @ do + ds.transpose(1, 2) @ q
    return (ds @ x).to(query.dtype), dx.to(tokens.dtype)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Return the operands of attention pooling in float32, or in float64 if they are float64."""
    dtype = accumulate_dtype(tensors[0].dtype)
    return [x.to(dtype) for x in tensors]


def _without_hidden(tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the tokens with zeros at the hidden ones, and the mask [B, 1, N] that is True for a hidden token.

    A hidden token may hold NaN, and NaN times a weight of zero is NaN.
    """
    if seqlens is None:
        return tokens, None
    hidden = torch.arange(tokens.shape[1], device=tokens.device) >= seqlens[:, None]
    return tokens.masked_fill(hidden[..., None], 0), hidden[:, None]
