"""GELU and QuickGELU of a linear layer's output plus the layer's bias."""

from .op import bias_gelu, bias_quick_gelu

__all__ = ["bias_gelu", "bias_quick_gelu"]
