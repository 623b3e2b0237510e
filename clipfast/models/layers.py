"""The layers that the blocks of a transformer are made of, with OpenCLIP's parameter names."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels import attention_pool, layer_norm

if TYPE_CHECKING:
    from .transformer import Attention


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the dtype of its input.

    Under autocast, PyTorch's would return float32, and the residual stream would have to be cast back.
    """

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to each element."""
        return x * torch.sigmoid(1.702 * x)


class InProjection(nn.Linear):
    """Projection to queries, keys and values: a layer that an adapter such as LoRA can wrap or replace.

    Its weight and bias belong to ``attn``, so that parameters and checkpoints have the names of
    ``nn.MultiheadAttention``.
    """

    def __init__(self, attn: "Attention") -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = attn.in_proj_weight.shape
        self.__dict__["attn"] = attn  # as a submodule, attn would be a child of its own child

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """[3 * width, width]."""
        return self.__dict__["attn"].in_proj_weight

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """[3 * width]."""
        return self.__dict__["attn"].in_proj_bias


def single_query_attention(
    q: Tensor,
    tokens: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    seqlens: Tensor | None,
    backend: str,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
) -> Tensor:
    """Compute attention of one query per sequence and head, without projecting every token.

    W_k multiplies the query instead of the tokens, and W_v multiplies what the query pooled. The result is the same,
    and one row is projected instead of all. The softmax sums to one, so that the bias of the values is added to the
    result. A bias of the keys cancels in the softmax.

    Args:
        q: [B, heads, head_dim], or [1, heads, head_dim] if every sequence has the same query.
        tokens: [B, N, width].
        weight_k, weight_v: [heads, head_dim, width].
        seqlens: [B], the number of leading tokens of each sequence that are seen; all if it is None.
        backend: as for :func:`clipfast.kernels.attention_pool`.
        bias_k, bias_v: [heads * head_dim], both or neither.

    Returns:
        [B, heads * head_dim].
    """
    query = torch.einsum("bhd,hdc->bhc", q * q.shape[-1] ** -0.5, weight_k)
    query = query.to(tokens.dtype).expand(len(tokens), -1, -1)
    pooled = attention_pool(query, tokens, seqlens=seqlens, backend=backend)
    out = torch.einsum("bhc,hdc->bhd", pooled, weight_v).flatten(1)
    if bias_k is None or bias_v is None:
        return out
    # The gradient of the keys' bias is zero, and must not be None, because DistributedDataParallel waits for it.
    return out + (bias_v + 0 * bias_k).to(out.dtype)
