"""Linear layers in 8 bits: rows that are quantised with a scale each, and the products of such rows."""

from ..fp8_rows import E4M3, E5M2, Fp8Rows, Fp8Weight
from .linear import RECIPES, CachedWeights, fp8_linear
from .norm import layer_norm_fp8
from .op import bias_gelu_fp8, bias_quick_gelu_fp8, quantize_rows, quantize_weight

__all__ = [
    "E4M3", "E5M2", "RECIPES", "CachedWeights", "Fp8Rows", "Fp8Weight", "bias_gelu_fp8", "bias_quick_gelu_fp8",
    "fp8_linear", "layer_norm_fp8", "quantize_rows", "quantize_weight",
]  # fmt: skip
