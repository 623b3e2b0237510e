"""Layer norm of the residual stream, with the addition before it."""

from .op import layer_norm

__all__ = ["layer_norm"]
