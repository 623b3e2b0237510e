"""The k items that score highest with each query, by the product of features, for search."""

from .op import top_k

__all__ = ["top_k"]
