"""The best items of each query by the product of features, for search."""

from .op import top_k

__all__ = ["top_k"]
