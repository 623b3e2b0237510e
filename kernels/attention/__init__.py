"""Softmax attention at CLIP's lengths.

``op`` holds the ops, ``launches`` says which kernel serves which shape: those in ``short`` hold a whole head, those in
``looped`` walk it. ``tiles`` is what they share, ``cpu`` the path without a GPU. ``pool`` is the attention of a few
queries on whole tokens.
"""

from .launches import Route, attention_route
from .op import attention, attention_qkv
from .pool import attention_pool

__all__ = ["Route", "attention", "attention_pool", "attention_qkv", "attention_route"]
