"""Layer norms of the residual stream: with the addition before them, and two in a row."""

from .op import layer_norm

__all__ = ["layer_norm"]
