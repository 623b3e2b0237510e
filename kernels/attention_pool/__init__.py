"""Attention pooling: the attention of a few queries on whole tokens, which are keys and values at once."""

from .op import MAX_HEADS, MAX_TOKENS, attention_pool

__all__ = ["MAX_HEADS", "MAX_TOKENS", "attention_pool"]
