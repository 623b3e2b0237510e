"""Patch embedding: pixels to the tokens of a vision transformer, all patches of an image or those that are kept.

``op`` holds the op, ``launches`` the launches of the Triton functions in ``kernels``, ``cpu`` the path without a GPU.
"""

from .op import patch_embed

__all__ = ["patch_embed"]
