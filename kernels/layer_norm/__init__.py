"""Layer norm of the residual stream, with the residual addition that comes before it."""

from .op import layer_norm

__all__ = ["layer_norm"]
