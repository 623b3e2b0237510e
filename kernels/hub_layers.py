"""Layers and an attention function for transformers that call the ops, for builds for Hugging Face's kernels hub
(``python -m clipfast.bench.hub``).

The hub's client replaces the ``forward`` of a model's layer by the ``forward`` of a layer here, which therefore has no
state of its own and reads the attributes of the model's layer.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .activation import bias_gelu, bias_quick_gelu
from .attention import attention_qkv
from .layer_norm import layer_norm


class LayerNorm(nn.Module):
    """``nn.LayerNorm`` over the last dimension, with a weight and a bias."""

    can_torch_compile: bool = True
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer norm [..., N] of the input [..., N], in its dtype."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class CLIPMLP(nn.Module):
    """The two linear layers of a block of transformers' CLIP and SigLIP, with the activation between them."""

    can_torch_compile: bool = True
    config: Any
    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the block's multilayer perceptron: [..., N] -> [..., N]."""
        activation = {"gelu": bias_gelu, "quick_gelu": bias_quick_gelu}.get(self.config.hidden_act)
        if activation is None:
            return self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return self.fc2(activation(F.linear(hidden_states, self.fc1.weight), self.fc1.bias))


def supports_flash_attn(*_: Any, **__: Any) -> bool:
    """Return True: transformers calls :func:`flash_attn_forward` of a package from the hub that has this function."""
    return True


def flash_attn_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute the attention of a transformers model that was loaded with ``attn_implementation="ORG/NAME"``.

    With a mask or dropout, which the op lacks, PyTorch's ``scaled_dot_product_attention`` computes it.

    Args:
        module: the layer; its ``is_causal`` decides if the argument is None.
        query, key, value: [B, H, N, D].
        attention_mask: [B, 1, N, N] as ``scaled_dot_product_attention`` takes it; ``is_causal`` is not used with it.
        scaling: factor on the scores, by default D ** -0.5.
        dropout: probability with which a weight becomes zero.
        is_causal: token i sees tokens 0 .. i only.

    Returns:
        [B, N, H, D], and None in place of the weights.
    """
    causal = attention_mask is None and bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if attention_mask is None and not dropout:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention_qkv(query, key, value, causal=causal, scale=scaling), None
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2), None
