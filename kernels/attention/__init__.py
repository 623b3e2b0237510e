"""Softmax attention at CLIP's lengths.

``op`` holds the ops, and ``launches`` decides which kernels serve a shape: those in ``short`` hold a whole head, those
in ``looped`` walk it. ``tiles`` is what they share, ``cpu`` is the path without a GPU, and ``spec`` says what is
checked and measured.
"""

from .launches import Route, attention_route
from .op import attention, attention_qkv

__all__ = ["Route", "attention", "attention_qkv", "attention_route"]
