"""Text embedding: token ids and positions to tokens, in one pass."""

from .op import text_embed

__all__ = ["text_embed"]
