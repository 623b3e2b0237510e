"""Ranks of images and texts in each other's results, for recall@k."""

from .op import retrieval_ranks

__all__ = ["retrieval_ranks"]
