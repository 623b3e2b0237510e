"""Layer norms of the residual stream: with the addition before them, and two in a row."""

from .op import layer_norm
from .pair_op import layer_norm_pair

__all__ = ["layer_norm", "layer_norm_pair"]
