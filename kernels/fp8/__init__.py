"""Linear layers in 8 bits: rows that are quantised with a scale each, and the products of such rows."""

from ..fp8_rows import E4M3, E5M2, Fp8Rows, Fp8Weight
from .linear import CachedWeights, fp8_linear
from .op import quantize_rows, quantize_weight

__all__ = ["E4M3", "E5M2", "CachedWeights", "Fp8Rows", "Fp8Weight", "fp8_linear", "quantize_rows", "quantize_weight"]
